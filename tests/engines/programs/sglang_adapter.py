"""The storage backend alone, made by SGLang's own factory and moving pages of SGLang's own host pools.

Argument: {store: directory}. Each case works in a folder of its own; the result holds what each observed.
"""

import dataclasses
import json
import os
import pathlib
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import sglang_shim  # noqa: F401  before sglang
import torch
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang_pools import (
    SMALL,
    backend,
    cleared,
    config,
    indices_of,
    keys_of,
    mha_pool,
    mla_pool,
    page_bytes,
    same,
)

import dualkv

LAYERS, PAGE, PAGES = SMALL.layers, SMALL.page, SMALL.pages


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except dualkv.Error as error:
        return str(error)
    return ""


def files(store: str, ending: str = "kv") -> list[pathlib.Path]:
    return sorted(pathlib.Path(store).glob(f"*/??/*.{ending}"))


def file_of(store: str, key: str) -> pathlib.Path:
    (file,) = pathlib.Path(store).glob(f"*/{key[:2]}/{key}.kv")
    return file


def damage(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def case_round_trips(store: str) -> Any:
    """Saved from one pool, read by another backend into other pages of another pool."""
    observed = {}
    made = [(layout, mha_pool(layout)) for layout in ("layer_first", "page_first", "page_first_direct", "page_head")]
    made += [("page_first_direct, bfloat16", mha_pool("page_first_direct", torch.bfloat16))]
    made += [(f"{layout}, wider V", mha_pool(layout, v_dim=16)) for layout in ("page_first", "page_first_direct")]
    made += [(f"{layout}, MLA", mla_pool(layout)) for layout in ("layer_first", "page_first", "page_first_direct")]
    for name, pool in made:
        settings = config(mla="MLA" in name)
        keys, source, target = keys_of(name, 6), [9, 2, 5, 0, 14, 3], [4, 11, 1, 8, 7, 15]
        root = f"{store}/{name.replace(', ', '-').replace(' ', '-')}"
        pathlib.Path(root).mkdir()
        writer = backend(root, pool, settings)
        saved = writer.batch_set_v1(keys, indices_of(source))
        wider = 16 if "wider" in name else 0
        other = mla_pool(pool.layout) if "MLA" in name else mha_pool(pool.layout, pool.dtype, wider)
        reader = backend(root, cleared(other), config(mla="MLA" in name))
        hit = reader.batch_exists(keys)
        got = reader.batch_get_v1(keys, indices_of(target))
        untouched = [page for page in range(PAGES) if page not in target]
        observed[name] = {
            "saved": saved,
            "hit": hit,
            "got": got,
            "same": same(pool, source, other, target),
            "others_zero": all(not any(page_bytes(other, page)) for page in untouched),
            "files": len(files(root)),
        }
        writer.close()
        reader.close()
    return observed


def case_layouts(store: str) -> Any:
    """layer_first and page_first_direct have the same pages in storage; page_first has its own."""
    keys, pages = keys_of("layouts", 4), [1, 2, 3, 4]
    source, target = mha_pool("page_first_direct"), cleared(mha_pool("layer_first"))
    writer, reader = backend(store, source), backend(store, target)
    writer.batch_set_v1(keys, indices_of(pages))
    got = reader.batch_get_v1(keys, indices_of(pages))
    flat = [bool(torch.equal(source.get_data_page(p * PAGE), target.get_data_page(p * PAGE))) for p in pages]
    apart = backend(store, mha_pool("page_first"))
    return {"got": got, "same": flat, "page_first_sees": apart.batch_exists(keys)}


def case_missing(store: str) -> Any:
    """What is not there ends the run of hits; a hole does too."""
    pool = mha_pool("page_first_direct")
    keys, pages = keys_of("missing", 8), list(range(8))
    writer = backend(store, pool)
    writer.batch_set_v1(keys[:5], indices_of(pages[:5]))
    first = {"hit": writer.batch_exists(keys), "none": writer.batch_exists(keys[5:]), "empty": writer.batch_exists([])}
    other = cleared(mha_pool("page_first_direct"))
    reader = backend(store, other)
    first["got"] = reader.batch_get_v1(keys, indices_of(pages))
    first["same"] = same(pool, pages[:5], other, pages[:5])
    file_of(store, keys[1]).unlink()
    late = cleared(mha_pool("page_first_direct"))
    after = backend(store, late)
    first["hit_over_hole"] = after.batch_exists(keys)
    first["got_over_hole"] = after.batch_get_v1(keys[:5], indices_of(pages[:5]))
    first["same_before_hole"] = same(pool, [0], late, [0])
    first["hit_after"] = after.batch_exists(keys)
    first["counters"] = after.stats()["counters"]
    return first


def case_corrupt(store: str) -> Any:
    """A flipped bit: the page is not reported, the ones before it are exact, a new save heals."""
    pool = mha_pool("layer_first")
    keys, pages = keys_of("corrupt", 6), list(range(6))
    writer = backend(store, pool)
    writer.batch_set_v1(keys, indices_of(pages))
    damage(file_of(store, keys[3]))
    other = cleared(mha_pool("layer_first"))
    reader = backend(store, other)
    observed = {"hit": reader.batch_exists(keys), "got": reader.batch_get_v1(keys, indices_of(pages))}
    observed["same"] = same(pool, pages[:3], other, pages[:3])
    observed["hit_after"] = reader.batch_exists(keys)
    observed["exists_after"] = [reader.exists(key) for key in keys]
    observed["again"] = reader.batch_get_v1(keys, indices_of(pages))
    observed["moved_aside"] = len(files(store, "corrupt"))
    observed["fresh_sees"] = backend(store, mha_pool("layer_first")).batch_exists(keys)
    observed["counters"] = reader.stats()["counters"]
    healer = backend(store, pool)
    observed["healed"] = healer.batch_set_v1(keys, indices_of(pages))
    late = cleared(mha_pool("layer_first"))
    observed["got_healed"] = backend(store, late).batch_get_v1(keys, indices_of(pages))
    observed["same_healed"] = same(pool, pages, late, pages)
    return observed


def fp8_kinds(store: str, keys: list[str], pages: torch.Tensor) -> list[int]:
    """Pages seen of KV in e4m3: by an engine of the same kind, and by one of e5m2. Both lie in uint8."""
    import dualkv.integrations.sglang.pages as adapter

    asked, seen = adapter.get_server_args, []
    for kind in ("fp8_e4m3", "fp8_e5m2"):
        adapter.get_server_args = lambda kind=kind: types.SimpleNamespace(kv_cache_dtype=kind)
        one = backend(store, mha_pool("page_first_direct", torch.uint8))
        if not seen:
            one.batch_set_v1(keys, pages)
        seen.append(one.batch_exists(keys))
    adapter.get_server_args = asked
    return seen


def case_apart(store: str) -> Any:
    """Whose pages are not interchangeable don't see each other's."""
    keys, pages = keys_of("apart", 3), indices_of([0, 1, 2])
    backend(store, mha_pool("page_first_direct")).batch_set_v1(keys, pages)
    half = mha_pool("page_first_direct", torch.bfloat16)
    mla = mla_pool("page_first_direct")
    writer = backend(store, mla, config(mla=True))
    observed = {
        "same": backend(store, mha_pool("page_first_direct")).batch_exists(keys),
        "tp_rank": backend(store, mha_pool("page_first_direct"), config(tp_rank=1)).batch_exists(keys),
        "tp_size": backend(store, mha_pool("page_first_direct"), config(tp_size=4)).batch_exists(keys),
        "pp_rank": backend(store, mha_pool("page_first_direct"), config(pp_rank=1)).batch_exists(keys),
        "cp_rank": backend(store, mha_pool("page_first_direct"), config(attn_cp_rank=1)).batch_exists(keys),
        "model": backend(store, mha_pool("page_first_direct"), config(model_name="other")).batch_exists(keys),
        "salt": backend(store, mha_pool("page_first_direct"), namespace="v2").batch_exists(keys),
        "dtype": backend(store, half).batch_exists(keys),
        "fp8": fp8_kinds(store, keys, pages),
        "mla": writer.batch_exists(keys),
    }
    before = len(files(store))
    second = backend(store, mla_pool("page_first_direct"), config(mla=True, tp_rank=1))
    observed["mla_rank_1_set"] = second.batch_set_v1(keys, pages)
    observed["mla_rank_1_files"] = len(files(store)) - before
    writer.batch_set_v1(keys, pages)
    observed["mla_rank_0_files"] = len(files(store)) - before
    observed["mla_rank_1_sees"] = second.batch_exists(keys)
    observed["namespaces"] = len(list(pathlib.Path(store).iterdir()))
    return observed


def case_options(store: str) -> Any:
    """Wrong options and pools are refused with their name."""
    pool = mha_pool("page_first_direct")
    odd = types.SimpleNamespace(kv_buffer=torch.zeros(4), layout="layer_first", page_size=PAGE, layer_num=LAYERS)
    moved = mha_pool("page_first_direct")
    moved.layout = "page_first"  # not what the memory is
    split = mha_pool("page_first_direct")
    split.layout = "page_first_kv_split"
    scaled = mha_pool("page_first")
    scaled.size_per_token += 2  # part of a page lies elsewhere
    shards = mla_pool("page_first_direct")
    shards.dcp_size = 2
    state = MambaStateBufferInfo(temporal=torch.zeros(LAYERS, 8, 4, 4, 4), conv=(torch.zeros(LAYERS, 8, 4, 4),))
    mamba = MambaPoolHost(state, 1.0, 0, device_capacity=8, pin_memory=False, layout="page_first")
    one = backend(store, pool)
    without = config()
    without.extra_config = {"backend_name": "dualkv"}
    return {
        "unknown": raised(lambda: backend(store, pool, stagin="1MiB")),
        "no_store": raised(
            lambda: StorageBackendFactory._load_backend_class("dualkv.integrations.sglang", "DualKVHiCache", "dualkv")(
                without, {}
            )
        ),
        "bad_store": raised(lambda: backend(store, pool, store="/no/scheme")),
        "bad_deadline": raised(lambda: backend(store, pool, deadline_s=0)),
        "bad_store_option": raised(lambda: backend(store, pool, store_options={"durabel": True})),
        "small_staging": raised(lambda: backend(store, pool, staging=4096)),
        "no_kv": raised(lambda: backend(store, odd)),
        "mamba": raised(lambda: one.register_mem_host_pool_v2(mamba, PoolName.MAMBA)),
        "wrong_shape": raised(lambda: backend(store, moved)),
        "wrong_layout": raised(lambda: backend(store, split)),
        "more_state": raised(lambda: backend(store, scaled)),
        "dcp": raised(lambda: backend(store, shards, config(mla=True))),
        "fp8": raised(lambda: backend(store, mha_pool("page_first_direct", torch.uint8))),
        "mha_under_mla": raised(lambda: backend(store, pool, config(mla=True))),
    }


def case_tensors(store: str) -> Any:
    """The interface without interface_v1: pages as flat tensors, the same pages in storage."""
    pool = mha_pool("page_first_direct")
    keys, pages = keys_of("tensors", 4), [3, 1, 2, 7]
    one = backend(store, pool)
    observed = {"set": [one.set(keys[0], pool.get_data_page(pages[0] * PAGE))]}
    observed["batch_set"] = one.batch_set(keys[1:3], [pool.get_data_page(p * PAGE) for p in pages[1:3]])
    observed["exists"] = [one.exists(key) for key in keys]
    target = [pool.get_dummy_flat_data_page() for _ in keys]
    got = one.batch_get(keys, target)
    observed["got"] = [page is target[i] for i, page in enumerate(got)]
    observed["same"] = [
        bool(torch.equal(target[i], pool.get_data_page(pages[i] * PAGE)))
        for i in range(len(keys))
        if got[i] is not None
    ]
    fresh = one.get(keys[0])
    observed["new_memory"] = bool(torch.equal(fresh, pool.get_data_page(pages[0] * PAGE)))
    observed["wrong_size"] = one.get(keys[0], torch.zeros(3))
    observed["not_a_tensor"] = one.set(keys[3], None)
    other = cleared(mha_pool("layer_first"))  # and by whole batches, in another layout
    observed["v1"] = backend(store, other).batch_get_v1(keys[:3], indices_of([0, 1, 2]))
    observed["v1_same"] = [
        bool(torch.equal(other.get_data_page(i * PAGE), pool.get_data_page(pages[i] * PAGE))) for i in range(3)
    ]
    flat, (key,) = mha_pool("page_head"), keys_of("heads", 1)
    heads = backend(store, flat)
    observed["page_head_set"] = heads.set(key, flat.get_data_page(0))
    observed["page_head_same"] = bool(torch.equal(heads.get(key), flat.get_data_page(0)))
    damage(file_of(store, key))
    observed["page_head_corrupt"] = heads.get(key, flat.get_dummy_flat_data_page())
    return observed


def case_pools(store: str) -> Any:
    """v2: a draft model's pool beside the KV, with the policies SGLang's own file backend knows."""
    kv, draft = mha_pool("page_first_direct"), mha_pool("page_first_direct")
    keys, pages = keys_of("pools", 6), list(range(6))
    one = backend(store, kv)
    (kv_folder,) = pathlib.Path(store).iterdir()
    one.register_mem_host_pool_v2(draft, PoolName.DRAFT)
    one.batch_set_v1(keys, indices_of(pages))
    drafts = PoolTransfer(name=PoolName.DRAFT, host_indices=indices_of(pages[:4]), keys=keys[:4])
    observed = {"set": one.batch_set_v2([drafts])}
    whole = one.batch_exists_v2(keys, [PoolTransfer(name=PoolName.DRAFT)])
    observed["all_pages"] = [whole.kv_hit_pages, whole.extra_pool_hit_pages]
    tail = PoolTransfer(name=PoolName.DRAFT, keys=[""] * 2, hit_policy=PoolHitPolicy.TRAILING_PAGES)
    (draft_folder,) = [folder for folder in pathlib.Path(store).iterdir() if folder != kv_folder]
    (draft_folder / keys[1][:2] / f"{keys[1]}.kv").unlink()
    fresh = backend(store, cleared(mha_pool("page_first_direct")))
    target = cleared(mha_pool("page_first_direct"))
    fresh.register_mem_host_pool_v2(target, PoolName.DRAFT)
    found = fresh.batch_exists_v2(keys, [tail])
    observed["trailing"] = [found.kv_hit_pages, found.restorable_prefix_pages]
    got = fresh.batch_get_v2([PoolTransfer(name=PoolName.DRAFT, host_indices=indices_of([8, 9]), keys=keys[2:4])])
    observed["got"] = got
    observed["same"] = same(draft, [2, 3], target, [8, 9])
    observed["unknown_pool"] = fresh.batch_get_v2([PoolTransfer(name=PoolName.MAMBA, keys=keys[:1])])
    groups = PoolTransfer(name=PoolName.DRAFT, hit_policy=PoolHitPolicy.BLOCK_GROUPS)
    observed["unknown_policy"] = fresh.batch_exists_v2(keys, [groups]).kv_hit_pages
    observed["again"] = raised(lambda: fresh.register_mem_host_pool_v2(draft, PoolName.DRAFT))
    return observed


def case_late(store: str) -> Any:
    """Storage that never answers: a call ends by its deadline, and the pages are not advertised for a while."""
    pool = mha_pool("page_first_direct")
    keys, pages = keys_of("late", 3), indices_of([0, 1, 2])
    backend(store, pool).batch_set_v1(keys, pages)
    late = backend(store, pool, deadline_s=0.4, forget_failed_s=1.0, store_options={"faults": {"drop_rate": 1.0}})
    began = time.monotonic()
    observed = {"hit": late.batch_exists(keys), "got": late.batch_get_v1(keys, pages)}
    observed["seconds"] = time.monotonic() - began
    observed["hit_after"] = late.batch_exists(keys)
    time.sleep(1.1)
    observed["hit_later"] = late.batch_exists(keys)
    observed["counters"] = late.stats()["counters"]
    late.close()
    return observed


def case_errors(store: str) -> Any:
    """Reads that fail with EIO are misses; what storage can't take is not reported as saved."""
    pool = mha_pool("page_first_direct")
    keys, pages = keys_of("errors", 3), indices_of([0, 1, 2])
    backend(store, pool).batch_set_v1(keys, pages)
    failing = backend(store, pool, store_options={"faults": {"error_rate": 1.0}})
    observed = {"got": failing.batch_get_v1(keys, pages), "hit_after": failing.batch_exists(keys)}
    observed["misaligned"] = failing.batch_get_v1(keys, pages + 1)
    observed["too_few"] = failing.batch_set_v1(keys, pages[:4])
    observed["scattered"] = failing.batch_set_v1(keys[:1], torch.tensor([0, 1, 3, 2]))
    observed["counters"] = failing.stats()["counters"]
    one = backend(store, pool)
    for folder in pathlib.Path(store).glob("*/??"):
        folder.rmdir() if not list(folder.iterdir()) else None
    new = keys_of("unsaved", 2)
    observed["no_folder"] = [one.batch_set_v1(new, indices_of([0, 1])), one.batch_exists(new)]
    return observed


def case_threads(store: str) -> Any:
    """SGLang looks up, reads and saves from threads of its own; close() comes in between."""
    pool = mha_pool("page_first_direct", shape=dataclasses.replace(SMALL, pages=64))
    one = backend(store, pool)
    began, wrong, misses = time.monotonic(), [], []

    def work(number: int) -> None:
        for turn in range(100_000):
            keys = keys_of(f"{number}/{turn}", 4)
            pages = list(range(number * 16, number * 16 + 8))
            saved = one.batch_set_v1(keys, indices_of(pages[:4]))
            hit = one.batch_exists(keys)
            got = one.batch_get_v1(keys, indices_of(pages[4:]))
            if not all(saved) or hit != 4 or not all(got):
                misses.append(time.monotonic() - began)  # closed
                break
            if not all(same(pool, pages[:4], pool, pages[4:])):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    saved = one.stats()["counters"]["pages_saved"]
    one.close()
    for thread in threads:
        thread.join(20)
    return {
        "saved_some": saved > 0,
        "wrong": wrong,
        "closed_in_between": len(misses),
        "ended": not any(thread.is_alive() for thread in threads),
        "missed_early": [s for s in misses if s < 0.5],
        "internal_errors": [name for name in one.stats()["counters"] if name.endswith("internal")],
    }


def case_end(store: str) -> Any:
    """clear(), metrics, parents, close()."""
    pool = mha_pool("page_first_direct")
    keys, pages = keys_of("end", 4), indices_of([0, 1, 2, 3])
    one = backend(store, pool, config(metrics=True))
    other = backend(store, pool, config(tp_rank=1))
    one.batch_set_v1(keys[:2], pages[: 2 * PAGE])
    one.batch_set_v1(keys[2:], pages[2 * PAGE :], HiCacheStorageExtraInfo(prefix_keys=keys[:2]))
    trailer = file_of(store, keys[2]).read_bytes()[-4096:]
    observed: dict[str, Any] = {"parent": trailer[88:120].hex() == keys[1]}
    other.batch_set_v1(keys, pages)
    one.batch_get_v1(keys, pages)
    metrics = one.get_stats()
    observed["metrics"] = [metrics.backup_pgs, metrics.prefetch_pgs, all(b > 0 for b in metrics.prefetch_bandwidth)]
    observed["metrics_again"] = one.get_stats().prefetch_pgs
    observed["clear_refused"] = raised(one.clear)
    observed["hit_after_refusal"] = one.batch_exists(keys)
    remover = backend(store, pool, clear_removes=True)
    observed["cleared"] = remover.clear()
    observed["hit_after_clear"] = [one.batch_exists(keys), other.batch_exists(keys)]
    other.close()
    other.close()
    observed["after_close"] = [
        other.batch_get_v1(keys, pages),
        other.batch_set_v1(keys_of("closed", 4), pages),
        other.get(keys[0], pool.get_dummy_flat_data_page()),
    ]
    return observed


def main() -> None:
    root = pathlib.Path(json.loads(sys.argv[1])["store"])
    torch.manual_seed(11)
    observed = {}
    for name, case in list(globals().items()):
        if not name.startswith("case_"):
            continue
        store = root / name
        store.mkdir(parents=True)
        began = time.monotonic()
        observed[name.removeprefix("case_")] = case(str(store))
        print(f"{name}: {time.monotonic() - began:.2f} s", flush=True)
    pathlib.Path(os.environ["RESULT"]).write_text(json.dumps(observed), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Checks of RDMA devices and GPUs."""

import ctypes
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualkv.doctor.check import Check, Context, read_text

_CHILD_S = 8.0  # a driver without its persistence daemon takes seconds
# In a child: a driver that crashes or hangs takes only the child with it.
_LIST_GPUS = """
import dataclasses, json, dualkv
try:
    print(json.dumps({"gpus": [dataclasses.asdict(gpu) for gpu in dualkv.gpus()]}))
except dualkv.Error as error:
    print(json.dumps({"error": str(error)}))
"""


def _port(device: Path, port: Path) -> str:
    gids = [read_text(gid) or "" for gid in (port / "gids").glob("*")]
    used = sum(bool(gid.strip("0:")) for gid in gids)
    # "4: ACTIVE" -> "ACTIVE"
    state = (read_text(port / "state") or "unknown state").rpartition(" ")[2]
    layer, rate = (read_text(port / name) or f"unknown {name}" for name in ("link_layer", "rate"))
    return f"{device.name} port {port.name}: {state}, {layer}, {rate}, {used} GIDs"


def check_rdma(context: Context) -> Iterator[Check]:
    """Verbs devices, from their files, and the library that opens them."""
    devices = sorted((context.sys / "class/infiniband").glob("*"))
    ports = [_port(device, port) for device in devices for port in sorted((device / "ports").glob("*"))]
    if not devices:
        yield Check("RDMA", "absent", "no verbs devices: nodes meet by tcp or shm")
        return
    found = "; ".join(ports or [device.name for device in devices])
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        yield Check("RDMA", "warn", f"{found}; but {error}", "install rdma-core (libibverbs1, ibverbs-providers)")
        return
    if not any(": ACTIVE," in port for port in ports):
        yield Check("RDMA", "warn", f"{found}; no port is active", "bring its network up; `ibv_devinfo`, `rdma link`")
        return
    yield Check("RDMA", "ok", found)


def _list_gpus() -> dict[str, Any]:
    try:
        child = subprocess.run([sys.executable, "-c", _LIST_GPUS], capture_output=True, text=True, timeout=_CHILD_S)
    except subprocess.TimeoutExpired:
        return {"error": f"the driver did not answer within {_CHILD_S:g} s"}
    except OSError as error:
        return {"error": f"no process could be started to ask it: {error}"}
    if child.returncode != 0:
        return {"error": f"the driver ended its process with {child.returncode}"}
    return dict(json.loads(child.stdout))


def check_cuda(context: Context) -> Iterator[Check]:
    """The driver, the GPUs it shows and what copies to and from them, and the modules that GPUDirect needs."""
    version = read_text(context.proc / "driver/nvidia/version")
    found = _list_gpus()
    if version is None and "error" in found:
        yield Check("CUDA", "absent", "no driver: caches in host memory only")
    else:
        yield from _gpus(version, found)
    modules = re.findall(r"^(nvidia_peermem|nvidia_fs) ", read_text(context.proc / "modules") or "", re.MULTILINE)
    loaded = f"{' and '.join(sorted(modules))} loaded" if modules else "neither nvidia_peermem nor nvidia_fs is loaded"
    used = "nvidia_fs serves gpu_gds, nvidia_peermem gpu_rdma where there is no dma-buf; all else goes by pinned memory"
    yield Check("GPUDirect", "ok" if modules else "absent", f"{loaded}; {used}")


def _gpus(version: str | None, found: dict[str, Any]) -> Iterator[Check]:
    number = re.search(r"\b\d+\.\d+(\.\d+)?\b", version or "")
    driver = f"driver {number[0]}" if number else "driver of unknown version"
    if "error" in found or not found["gpus"]:
        cure = "a libcuda.so.1 of the driver's version, the devices in the container (`--gpus all`)"
        yield Check("CUDA", "warn", f"{driver}, but {found.get('error', 'it shows no GPU')}", cure)
        return
    missing = {f"no {engine}: {why}" for gpu in found["gpus"] for engine, why in gpu["missing"].items()}
    names = Counter(gpu["name"] for gpu in found["gpus"])
    shown = ", ".join(f"{count} x {name}" for name, count in names.items())
    detail = f"{driver}, CUDA {found['gpus'][0]['cuda']}: {shown}"
    if missing:
        cure = "a driver of CUDA 12.8 or later, and a wheel that was built where nvcc is found (docs/gpu.md)"
        yield Check("CUDA", "warn", f"{detail}; {'; '.join(sorted(missing))}", cure)
    else:
        yield Check("CUDA", "ok", f"{detail}; copies by kernel, batch and memcpy")

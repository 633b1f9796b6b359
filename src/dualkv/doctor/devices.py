"""Checks of RDMA devices, and of GPUs, which this release finds but does not use."""

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dualkv.doctor.check import Check, Context, read_text

_CHILD_S = 8.0  # a driver without its persistence daemon takes seconds
_NO_GPU = "this release does not use GPU memory yet"
# In a child: a driver that crashes or hangs takes only the child with it.
_COUNT_GPUS = """
import ctypes, json
out = {}
try:
    cuda = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_int(0)
    out["init"] = cuda.cuInit(0)
    out["count"] = cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value
except OSError as error:
    out["error"] = str(error)
print(json.dumps(out))
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


def _count_gpus() -> dict[str, object]:
    command = [sys.executable, "-I", "-S", "-c", _COUNT_GPUS]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_S)
    except subprocess.TimeoutExpired:
        return {"error": f"cuInit did not return within {_CHILD_S:g} s"}
    except OSError as error:
        return {"error": f"no process could be started to ask it: {error}"}
    if child.returncode != 0:
        return {"error": f"cuInit ended its process with {child.returncode}"}
    return dict(json.loads(child.stdout))


def check_cuda(context: Context) -> Iterator[Check]:
    """The driver, its library, how many GPUs it shows, and the modules that GPUDirect needs."""
    version = read_text(context.proc / "driver/nvidia/version")
    found = _count_gpus()
    if version is None and "error" in found:
        yield Check("CUDA", "absent", f"no driver; {_NO_GPU}")
    else:
        yield _cuda(version, found)
    modules = re.findall(r"^(nvidia_peermem|nvidia_fs) ", read_text(context.proc / "modules") or "", re.MULTILINE)
    loaded = f"{' and '.join(sorted(modules))} loaded" if modules else "neither nvidia_peermem nor nvidia_fs is loaded"
    yield Check("GPUDirect", "ok" if modules else "absent", f"{loaded}; {_NO_GPU}")


def _cuda(version: str | None, found: dict[str, object]) -> Check:
    number = re.search(r"\b\d+\.\d+(\.\d+)?\b", version or "")
    driver = f"driver {number[0]}" if number else "driver of unknown version"
    cure = "a libcuda.so.1 of the driver's version, the devices in the container (`--gpus all`)"
    if "error" in found:
        return Check("CUDA", "warn", f"{driver}, but {found['error']}; {_NO_GPU}", cure)
    if found["init"] != 0:
        return Check("CUDA", "warn", f"{driver}, but cuInit returned {found['init']}; {_NO_GPU}", cure)
    return Check("CUDA", "ok", f"{driver}, {found['count']} GPUs; {_NO_GPU}")

"""Checks of the transports: TCP buffers and lane marks, and reading another process for shm."""

import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator

from dualkv.doctor.check import Check, Context, errno_text
from dualkv.doctor.cures import FALLBACKS
from dualkv.lanes import LANES, mark
from dualkv.sizes import format_size

_LEAST_BUFFER_BYTES = 4 << 20  # 10 Gbit/s over 3 ms
_CHILD_S = 4.0
_IOVEC = "class Iovec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]"
_HOLDER = """
import ctypes, sys
held = ctypes.create_string_buffer(bytes.fromhex(sys.argv[1]))
print(ctypes.addressof(held), flush=True)
sys.stdin.read()
"""
_READER = f"""
import ctypes, sys
{_IOVEC}
pid, address, size = map(int, sys.argv[1:])
buffer = ctypes.create_string_buffer(size)
local, remote = Iovec(ctypes.addressof(buffer), size), Iovec(address, size)
call = ctypes.CDLL(None, use_errno=True).process_vm_readv
got = call(pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0))
print(buffer.raw.hex() if got == size else ctypes.get_errno())
"""


def check_tcp_buffers(context: Context) -> Iterator[Check]:
    """How far the kernel may grow a connection's buffers. dualkv sets no sizes itself, so net.core does not bind it."""
    details, cures = [], []
    for name in ("net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"):
        values = (context.sysctl(name) or "").split()
        if len(values) != 3:
            yield Check("TCP buffers", "absent", f"{name} can't be read")
            return
        details.append(f"{name} up to {format_size(int(values[2]))}")
        if int(values[2]) < _LEAST_BUFFER_BYTES:
            cures.append(f"`sysctl {name}='{values[0]} {values[1]} {16 << 20}'`")
    for name in ("net.core.rmem_max", "net.core.wmem_max"):
        value = context.sysctl(name)
        details.append(f"{name} {format_size(int(value)) if value else 'not readable'}")
    yield Check("TCP buffers", "warn" if cures else "ok", ", ".join(details), "; ".join(cures))


def _refused_marks(family: socket.AddressFamily, level: int, option: int) -> Iterator[str]:
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
        for lane, marks in LANES.items():
            try:
                mark(sock, lane)
            except OSError as error:
                yield f"{family.name} {lane}: {errno_text(error.errno or 0)}"
                continue
            in_force = sock.getsockopt(level, option) >> 2, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
            if in_force != (marks.dscp, marks.so_priority):
                yield f"{family.name} {lane}: DSCP and priority are {in_force}"


def check_tcp_marks(_: Context) -> Iterator[Check]:
    """Whether a socket takes the marks of both lanes."""
    refused = list(_refused_marks(socket.AF_INET, socket.IPPROTO_IP, socket.IP_TOS))
    with contextlib.suppress(OSError):  # a host without IPv6
        refused += _refused_marks(socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    if refused:
        yield Check("TCP marks", "warn", f"refused: {'; '.join(refused)}", FALLBACKS["lane_not_marked"].cure)
        return
    lanes = ", ".join(f"{lane} DSCP {m.dscp} and SO_PRIORITY {m.so_priority}" for lane, m in LANES.items())
    yield Check("TCP marks", "ok", f"sockets take {lanes}")


def _python(program: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-I", "-S", "-c", program, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _end(child: "subprocess.Popen[str]") -> str:
    """What the child still prints; it is gone afterwards."""
    try:
        return child.communicate(timeout=_CHILD_S)[0]
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()[0]


def read_sibling() -> str:
    """Has one child read another's memory, as two engines do over shm: empty if it could, else why not."""
    pattern = secrets.token_bytes(64)
    holder = _python(_HOLDER, pattern.hex())
    try:
        address = holder.stdout.readline().strip() if holder.stdout else ""
        answer = _end(_python(_READER, str(holder.pid), address, str(len(pattern)))).strip()
    finally:
        _end(holder)
    if answer == pattern.hex():
        return ""
    return errno_text(int(answer)) if answer.isdigit() and len(answer) < 5 else "wrong bytes, or none"


def check_shm(context: Context) -> Iterator[Check]:
    """Whether processes of this user may read each other: what the shm transport pulls with."""
    if not hasattr(ctypes.CDLL(None), "process_vm_readv"):
        yield Check("shm", "absent", "this libc has no process_vm_readv; use tcp")
        return
    try:
        why = read_sibling()
    except OSError as error:  # no process can be started here
        yield Check("shm", "absent", f"not tried: {error}")
        return
    scope = context.sysctl("kernel.yama.ptrace_scope")
    tail = f"kernel.yama.ptrace_scope={'absent' if scope is None else scope}"
    cure = (
        "run both as one user with `sysctl kernel.yama.ptrace_scope=0` or CAP_SYS_PTRACE in one pid namespace; or tcp"
    )
    if why:
        yield Check("shm", "warn", f"one process could not read another of this user: {why}; {tail}", cure)
    elif scope not in (None, "0"):
        user = "root" if os.geteuid() == 0 else "this user"
        yield Check("shm", "warn", f"{user} may read other processes, but {tail} keeps others from it", cure)
    else:
        yield Check("shm", "ok", f"one process read another of this user; {tail}")

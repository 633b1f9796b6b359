"""Runs ``dualkv ...`` in a process whose seccomp filter refuses io_uring with EPERM, as many container runtimes do.

``python seccomp_no_uring.py doctor /tmp --json``; exit code 77 where no filter can be installed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_FIRST, _LAST = 425, 427  # io_uring_setup, io_uring_enter, io_uring_register: the same on x86_64 and aarch64
_LOAD, _JUMP_GE, _JUMP_GT, _RETURN = 0x20, 0x35, 0x25, 0x06  # BPF_LD|W|ABS, BPF_JMP|JGE|K, BPF_JMP|JGT|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Instruction(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def refuse_io_uring() -> None:
    """For this thread and those it starts from now on, for good. Raises OSError where it can't be done."""
    if os.uname().machine not in ("x86_64", "aarch64"):
        raise OSError(errno.ENOTSUP, "the filter knows x86_64 and aarch64 only")
    program = (
        _Instruction(_LOAD, 0, 0, 0),  # the system call's number
        _Instruction(_JUMP_GE, 0, 2, _FIRST),
        _Instruction(_JUMP_GT, 1, 0, _LAST),
        _Instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM),
        _Instruction(_RETURN, 0, 0, _ALLOW),
    )
    filters = _Program(len(program), (_Instruction * len(program))(*program))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filters))


def _prctl(option: int, first: int, second: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_ulong(value) for value in (first, second, 0, 0))
    if libc.prctl(option, *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def main() -> None:
    try:
        refuse_io_uring()
    except OSError as error:
        print(f"no seccomp filter can be installed: {error}", file=sys.stderr)
        sys.exit(77)
    from dualkv.cli.main import main as dualkv_main  # its threads must inherit the filter

    dualkv_main()


if __name__ == "__main__":
    main()

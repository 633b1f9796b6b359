"""Throughput of RDMA writes before a network fails and after it is back. Measures; asserts nothing.

Run in the VM: ``make rdma RDMA_COMMAND=".venv/bin/python tests/rdma/recovery.py"``.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import dualkv
from dualkv.bench.transfer import Sender, TransferCase, sender

WIRE = "d0"
ROUNDS = 9


def rate(sending: Sender) -> float:
    """Median MB/s."""
    runs = [sending.ours() for _ in range(ROUNDS)]
    return statistics.median(run.bytes / run.seconds for run in runs) / 1e6


def inline(sending: Sender) -> int:
    return sum(sending.fallbacks().get(name, 0) for name in ("rdma_inline",))


def main() -> None:
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    case = TransferCase("rdma", 64 << 10, 64, "known", 1, None, (devices[0], devices[-1]))
    out = {}
    with sender(case) as sending:
        sending.ours()
        for fault, command in (
            ("link down and up", f"ip link set {WIRE} down; sleep 3; ip link set {WIRE} up; wires"),
            ("again", f"ip link set {WIRE} down; sleep 0.3; ip link set {WIRE} up; wires"),
        ):
            before = rate(sending)
            shell = subprocess.Popen(["bash", "-c", command])
            during, began = [], time.monotonic()
            while shell.poll() is None or time.monotonic() - began < 1:
                during.append(sending.ours())
            sending._wait_for_rdma()
            back = time.monotonic() - began
            count = inline(sending)
            after = rate(sending)
            out[fault] = {
                "before_mb_per_s": round(before, 1),
                "sends_during": len(during),
                "slowest_send_during_s": round(max(run.seconds for run in during), 3),
                "all_by_rdma_again_after_s": round(back, 2),
                "after_mb_per_s": round(after, 1),
                "after_of_before": round(after / before, 3),
                "inline_afterwards": inline(sending) - count,
            }
    json.dump(out, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    try:
        main()
    except dualkv.Error as error:
        sys.exit(str(error))

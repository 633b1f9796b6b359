"""The one table of fallbacks: what happened, the cure, and the check that looks at the cause (docs/settings.md)."""

import dataclasses

from dualkv.doctor.check import STAGING_BYTES
from dualkv.sizes import format_size

HUGE_PAGE_BYTES = 2 << 20


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A fallback the library counts. ``check`` may know a cure for this very machine, which then goes first."""

    what: str
    cure: str
    check: str


_MEMLOCK = "raise the memlock limit (`ulimit -l`, `LimitMEMLOCK=infinity`, `--ulimit memlock=-1`)"

FALLBACKS = {
    "no_direct": Fallback(
        "the file system refuses O_DIRECT: reads go through the page cache",
        'another file system, or direct="off"',
        "O_DIRECT",
    ),
    "no_uring": Fallback(
        "io_uring is not built in or refused: four threads read",
        "liburing's headers when building; `sysctl kernel.io_uring_disabled=0`; a seccomp profile that permits "
        'io_uring_setup; a higher memlock limit; or backend="pread"',
        "io_uring",
    ),
    "uring_buffers_not_registered": Fallback(
        "the kernel maps staging anew for each read", f"{_MEMLOCK}; blocks of at most 1 GiB", "registered buffers"
    ),
    "staging_not_locked": Fallback(
        "mlock was refused: staging may be paged out", f"{_MEMLOCK}; or lock_memory=False", "memlock"
    ),
    "no_huge_pages": Fallback(
        "no huge pages were left for staging",
        f"`sysctl vm.nr_hugepages={STAGING_BYTES // HUGE_PAGE_BYTES}` for each {format_size(STAGING_BYTES)} of "
        "staging; or huge_pages=False",
        "huge pages",
    ),
    "staging_not_bound": Fallback(
        "staging could not be bound to numa_node", "a node the machine has and the process's cpuset allows", "NUMA"
    ),
    "shm_not_mapped": Fallback(
        "memory that a peer on this host shares could not be mapped: it is read with process_vm_readv",
        "the same user and pid namespace for both, and /proc mounted",
        "shm",
    ),
    "copy_by_cpu": Fallback(
        "copy='nic', and the CPU copied: the queue pair was not up, or the memory was not registered (yet)",
        "a higher memlock limit; `dualkv doctor` on the RDMA port",
        "RDMA",
    ),
    "copy_by_gpu": Fallback(
        "copy='nic', and the GPU copied by itself: no slot of gpu_rdma, no queue pair, or host memory not registered",
        "a larger gpu_rdma; a higher memlock limit; `dualkv doctor` on the RDMA port",
        "RDMA",
    ),
    "staging_not_pinned": Fallback(
        "the CUDA driver refused to pin the staging: copies to GPUs go through a buffer of the driver's",
        f"{_MEMLOCK}; less staging",
        "CUDA",
    ),
    "gpu_copy_engine": Fallback(
        "copies to or from a GPU went by another engine than gpu_copy says: the host side is not pinned",
        "staging that can be pinned; or gpu_copy='auto'",
        "CUDA",
    ),
    "gpu_copy_staged": Fallback(
        "a GPU does not see the memory of another: the driver takes copies between them by the host's memory",
        "NVLink, or a PCIe switch both are behind, without ACS; `nvidia-smi topo -p2p r` shows which see each other",
        "CUDA",
    ),
    "gpu_bounce_full": Fallback(
        "a peer's write found no pinned memory before a GPU: another node read the block instead",
        "a larger gpu_bounce",
        "CUDA",
    ),
    "gpu_not_verified": Fallback(
        "gpu_verify is on, and not all of a cache can be summed up on its GPU",
        "a wheel that was built where nvcc is found, planes of whole 64 bytes; or gpu_verify=False",
        "CUDA",
    ),
    "no_gds": Fallback(
        "gpu_gds is on, and cuFile or the checksum kernel can't be had: reads come to the staging",
        "GPUDirect Storage (libcufile, nvidia-fs), a wheel that was built where nvcc is found, Layer Blocks of whole "
        "64 bytes; gpu_gds=0 turns it off",
        "GPUDirect",
    ),
    "gds_compatibility": Fallback(
        "cuFile has no nvidia-fs: it reads to the host's memory itself and copies",
        "`modprobe nvidia-fs`, and `gdscheck -p` for what the file system allows; or gpu_gds=0",
        "GPUDirect",
    ),
    "gds_read_failed": Fallback(
        "a read by cuFile failed, or what it brought was wrong: it was read again, to the staging",
        "cufile.log, `gdscheck -p`; or gpu_gds=0",
        "GPUDirect",
    ),
    "no_gpu_rdma": Fallback(
        "gpu_rdma is on, and NICs don't reach the GPU's memory, or it can't sum it up: both ways go by pinned memory",
        "a NIC and a kernel with dma-buf (Linux 5.12, the open NVIDIA kernel modules) or `modprobe nvidia-peermem`; a "
        "wheel that was built where nvcc is found, Layer Blocks of whole 64 bytes; gpu_rdma=0 turns it off",
        "GPUDirect",
    ),
    "gpu_rdma_returned": Fallback(
        "what was to leave a GPU by a NIC did not, and went by pinned memory: no queue pair, or unregistered memory",
        "`last_failure` of the link's rdma in Node.stats() says why",
        "GPUDirect",
    ),
    "gpu_failed": Fallback(
        "copies by a GPU failed, or did not end: loads into its memory fail",
        "the kernel's log (Xid), `nvidia-smi`; then a new process",
        "CUDA",
    ),
    "rdma_inline": Fallback(
        "a frame of an rdma link went over TCP: no queue pair was up, or its memory was not registered (yet)",
        "`last_failure` of the link's rdma in Node.stats() says why",
        "RDMA",
    ),
    "rdma_not_registered": Fallback(
        "the NIC refused memory: transfers to and from it go over TCP",
        "a higher memlock limit (`ulimit -l unlimited`, `LimitMEMLOCK=infinity`); or on_demand_paging=True",
        "memlock",
    ),
    "rdma_registration_budget": Fallback(
        "memory beyond the budget is not registered: transfers to and from it go over TCP",
        "a larger `registered` in rdma_options",
        "RDMA",
    ),
    "rdma_device_fault": Fallback(
        "an RDMA device failed, or one of its completion queues overran", "the kernel's log (dmesg)", "RDMA"
    ),
    "lane_not_marked": Fallback(
        "a socket refused its DSCP or priority: that connection's lane is not told apart",
        "CAP_NET_ADMIN for priorities above 6, or lower ones",
        "TCP marks",
    ),
}

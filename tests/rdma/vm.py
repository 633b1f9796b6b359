"""Runs a command on a kernel with soft-RoCE: a small VM over this machine's own files, for machines without RDMA.

The guest's root is this machine's, read-only under a tmpfs; what the command leaves in /out comes back. Its two RDMA
devices, rxe0 and rxe1, sit on the ends of a veth pair, d0 (10.77.0.1) and d1 (10.77.0.2). A module of our own
(service_levels/) has them keep the service levels that soft-RoCE drops.
"""

from __future__ import annotations

import argparse
import gzip
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = (
    *("virtio_pci", "9pnet_virtio", "9p", "overlay", "veth", "af_packet"),
    *("ib_uverbs", "rdma_ucm", "crc32_generic", "rdma_rxe", "service_levels", "sch_htb", "cls_u32"),
)
OUR_MODULE = Path(__file__).resolve().parent / "service_levels"

INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /lower /upper /root /out
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in MODULES; do modprobe $module || echo "no module $module"; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /lower
mount -t tmpfs -o size=75% tmpfs /upper
mkdir -p /upper/changed /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/changed,workdir=/upper/work overlay /root
mkdir -p /root/out
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576 out /root/out
for each in proc sys dev; do mount --move /$each /root/$each; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm; mount -t devpts devpts /root/dev/pts
exec switch_root /root /bin/bash /out/run.sh
"""

# Each end has the other's address as its own machine's too: the rules send RDMA between them over the wire, which is
# where a lane's marks can be seen and a link can fail. TCP between them stays on lo.
RUN = """export HOME=/root PATH={path}
ulimit -l unlimited
ip link set lo up
ip link add d0 mtu 4200 type veth peer name d1 mtu 4200
ip addr add 10.77.0.1/24 dev d0; ip addr add 10.77.0.2/24 dev d1
ip link set d0 up; ip link set d1 up
for each in all d0 d1; do
  echo 1 > /proc/sys/net/ipv4/conf/$each/accept_local; echo 0 > /proc/sys/net/ipv4/conf/$each/rp_filter
done
ip rule add pref 10 iif d0 lookup local; ip rule add pref 11 iif d1 lookup local
ip rule add pref 20 from 10.77.0.1 to 10.77.0.2 lookup 100; ip rule add pref 21 from 10.77.0.2 to 10.77.0.1 lookup 101
ip rule add pref 30 lookup local; ip rule del pref 0
cat > /usr/local/bin/wires <<'END'
#!/bin/bash
  ip route replace 10.77.0.2 dev d0 table 100; ip route replace 10.77.0.1 dev d1 table 101
  ip neigh replace 10.77.0.2 dev d0 lladdr $(cat /sys/class/net/d1/address) nud permanent
  ip neigh replace 10.77.0.1 dev d1 lladdr $(cat /sys/class/net/d0/address) nud permanent
END
chmod +x /usr/local/bin/wires; wires
rdma link add rxe0 type rxe netdev d0; rdma link add rxe1 type rxe netdev d1
cd {folder}
timeout -k 10 {seconds} bash -c {command} </dev/null
echo $? > /out/status
sync
echo o > /proc/sysrq-trigger
while :; do :; done
"""


def sh(*command: str, **options: object) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options).stdout  # type: ignore[call-overload,no-any-return]


def unpack(packages: Sequence[str], tree: Path) -> None:
    """Downloads Debian's packages into a folder: they are not installed. Does nothing where the folder is there."""
    if tree.is_dir():
        return
    half = tree.with_suffix(".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    print(f"downloading {', '.join(packages)}", flush=True)
    sh("apt-get", "download", "-q", *packages, cwd=half)
    for package in half.glob("*.deb"):
        sh("dpkg-deb", "-x", str(package), str(half))
        package.unlink()
    half.rename(tree)


def depends(package: str) -> list[str]:
    listed = sh("apt-cache", "depends", "--important", package)
    return [line.split()[-1] for line in listed.splitlines() if "Depends:" in line]


def fetch_kernel(work: Path) -> Path:
    """Debian's stock kernel and our module; the folder that has boot/ and lib/modules/."""
    tree = work / "kernel"
    if not tree.is_dir() and not sh("apt-cache", "search", "--names-only", "^linux-image-amd64$"):
        sh("apt-get", "update", "-qq")
    unpack(depends("linux-image-amd64")[:1], tree)
    version = next((tree / "lib/modules").iterdir()).name
    built = tree / "lib/modules" / version / "updates/service_levels.ko"
    sources = list(OUR_MODULE.iterdir())
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        build_module(sources, version, work, built)
    return tree


def build_module(sources: Sequence[Path], version: str, work: Path, built: Path) -> None:
    headers = f"linux-headers-{version}"
    needed = [each for each in depends(headers) if each.startswith(("linux-headers", "linux-kbuild"))]
    tree = work / "headers"
    unpack([headers, *needed], tree)
    common = next(each for each in needed if each.endswith("-common"))
    (tree / "usr/src" / headers / "Makefile").write_text(f"include {tree}/usr/src/{common}/Makefile\n")
    folder = work / "module"
    folder.mkdir(exist_ok=True)
    for source in sources:
        shutil.copy(source, folder)
    sh("make", "-s", "-C", str(tree / "usr/src" / headers), f"M={folder}", "CC=gcc", "modules")
    built.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "service_levels.ko", built)


def make_initramfs(work: Path, kernel: Path) -> Path:
    """busybox, the modules that are needed, and init."""
    image = work / "initramfs.gz"
    version = next((kernel / "lib/modules").iterdir()).name
    tree = work / "initramfs"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "bin/busybox")
    sh("depmod", "-b", str(kernel), version)
    for module in MODULES:
        listed = sh("modprobe", "-d", str(kernel), "-S", version, "--show-depends", module)
        for line in listed.splitlines():
            if not line.startswith("insmod"):
                continue
            source = Path(line.split()[1])
            target = tree / source.relative_to(kernel)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    folder = kernel / "lib/modules" / version
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(folder / name, tree / "lib/modules" / version / name)
    sh("depmod", "-b", str(tree), version)
    init = tree / "init"
    init.write_text(INIT.replace("MODULES", " ".join(MODULES)))
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=tree, check=True, stdout=subprocess.PIPE
    ).stdout
    image.write_bytes(gzip.compress(archive, 1))
    return image


def run(command: str, work: Path, out: Path, seconds: float) -> int:
    """Boots, runs the command in this folder, and returns its exit status; 124 if it ran out of time."""
    work.mkdir(parents=True, exist_ok=True)
    work, out = work.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    kernel = fetch_kernel(work)
    image = make_initramfs(work, kernel)
    (out / "status").unlink(missing_ok=True)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    (out / "run.sh").write_text(
        RUN.format(folder=shlex.quote(str(Path.cwd())), path=path, seconds=int(seconds), command=shlex.quote(command))
    )
    # A processor without AVX and FMA, which qemu emulates so slowly that torch's products took 24 times as long.
    qemu = [
        "qemu-system-x86_64", "-cpu", "Nehalem", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "4096",
        "-nographic", "-no-reboot", "-nic", "none",
        "-kernel", str(next((kernel / "boot").glob("vmlinuz-*"))), "-initrd", str(image),
        "-append", "console=ttyS0 panic=-1 quiet",
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        "-virtfs", f"local,path={out},mount_tag=out,security_model=none",
    ]  # fmt: skip
    # The command has its own limit; this one is for a guest that does not come up.
    subprocess.run(qemu, check=True, stdin=subprocess.DEVNULL, timeout=seconds + 120)
    status = out / "status"
    if not status.exists():
        print("the guest ended without running the command to its end", file=sys.stderr)
        return 1
    return int(status.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/rdma"), help="kernel and initramfs are kept here")
    parser.add_argument("--out", type=Path, default=Path("build/rdma/out"), help="/out of the guest")
    parser.add_argument("--seconds", type=float, default=1800, help="the command's limit")
    parser.add_argument("command", nargs="+", help="run by bash, in this folder")
    given = parser.parse_args()
    return run(" ".join(given.command), given.work, given.out, given.seconds)


if __name__ == "__main__":
    sys.exit(main())

"""The layers of the design, as data: who may include or import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Folder under cpp/ -> folders it may include. All may include <dualkv/...>.
CPP = {
    "base": {"base", "monocypher", "xxhash"},
    "shim": {"shim"},
    "memory": {"base", "memory", "shim"},
    "storage": {"base", "memory", "shim", "storage"},
    "rdma": {"base", "memory", "rdma", "shim"},
    "transport": {"base", "memory", "rdma", "shim", "transport"},
    "policy": {"base", "policy"},
    "sim": {"base", "sim"},  # policies as everybody sees them: through include
    "node": {"base", "memory", "node", "policy", "rdma", "storage", "transport"},
    "limits": {"base", "limits", "memory", "shim"},
}
# Vendor headers and the one file that may include each.
VENDOR = {
    "liburing.h": "cpp/shim/uring.h",
    "infiniband/verbs.h": "cpp/shim/verbs.h",
    "monocypher/monocypher.h": "cpp/base/hash.cpp",
    "xxhash/xxhash.h": "cpp/base/checksum_kernel.h",
}
# Package under src/dualkv -> packages of dualkv it may import. "" is the top level.
PYTHON = {
    "": {""},
    "traces": {"traces"},
    "engines": {"", "engines"},
    "demo": {"", "demo", "testbed", "traces"},
    "report": {"", "bench", "demo", "report", "sim"},
    "doctor": {"", "doctor"},
    "fabric": {"", "fabric"},
    "testbed": {"", "fabric", "testbed"},
    "bench": {"", "bench", "fabric", "testbed"},
    "integrations": {"", "integrations"},
    "planner": {"", "planner"},
    "sim": {"", "demo", "engines", "planner", "sim", "traces"},
    "proxy": {"", "proxy"},
    "cli": {"", "bench", "cli", "demo", "doctor", "fabric", "planner", "proxy", "report", "sim", "testbed"},
}


def includes(path: Path) -> list[str]:
    return re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text())


def test_cpp_includes_follow_the_layers() -> None:
    wrong = []
    for path in (ROOT / "cpp").rglob("*.[ch]*"):
        layer = path.relative_to(ROOT / "cpp").parts[0]
        for name in includes(path):
            folder = name.split("/")[0]
            project = folder in CPP or folder in ("monocypher", "xxhash")
            if "/" in name and project and folder not in CPP[layer]:
                wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert wrong == []


def test_vendor_headers_stay_behind_their_shim() -> None:
    for header, allowed in VENDOR.items():
        users = [
            str(path.relative_to(ROOT))
            for folder in ("cpp", "include", "bindings")
            for path in (ROOT / folder).rglob("*.[ch]*")
            if header in includes(path)
        ]
        assert users == [allowed]


def test_public_headers_and_bindings_see_only_include_and_the_standard_library() -> None:
    for folder, extra in (("include", ()), ("bindings", ("bindings.h", "pybind11/"))):
        for path in (ROOT / folder).rglob("*.[ch]*"):
            for name in includes(path):
                fine = name.startswith(("dualkv/", *extra)) or "/" not in name or name.startswith("sys/")
                assert fine, f"{path}: {name}"
                assert not name.endswith(".h") or name.startswith(("dualkv/", *extra)), f"{path}: {name}"


def test_sibling_backends_do_not_see_each_other() -> None:
    backends = {"uring_reader.h", "pread_reader.h", "socket_transport.h", "loopback_transport.h"}
    for path in (ROOT / "cpp").rglob("*.[ch]*"):
        assert not backends & {name.split("/")[-1] for name in includes(path)}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                f"{node.module}.{alias.name}" if node.module == "dualkv" else str(node.module) for alias in node.names
            }
    return found


def test_python_imports_follow_the_layers() -> None:
    package = ROOT / "src" / "dualkv"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(PYTHON) - {""}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        layer = parts[0] if len(parts) > 1 else "cli" if path.name == "__main__.py" else ""
        for name in imports(path):
            words = name.split(".")
            if words[0] != "dualkv":
                continue
            target = words[1] if len(words) > 1 and words[1] in folders else ""
            assert target in PYTHON[layer] or target == layer, f"{path.relative_to(ROOT)} imports {name}"


def test_importing_dualkv_is_light() -> None:
    program = "import sys, dualkv; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "numpy" in loaded
    assert not loaded & {"torch", "cupy", "matplotlib", "click", "rich", "pandas", "aiohttp", "vllm"}

"""Every example runs; the C++ one builds against an installed package."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_python_example_runs(script: Path) -> None:
    out = run(sys.executable, script)
    assert "every byte right: True" in out


def test_both_sides_read_in_the_parts_example() -> None:
    out = run(sys.executable, ROOT / "examples" / "engine_from_parts.py")
    shares = [int(count) for count in re.findall(r"'\w+': (\d+)", out)]
    assert len(shares) == 2
    assert min(shares) > 0


def test_cpp_example_builds_against_the_installed_package(tmp_path: Path) -> None:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    run("cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Debug")  # half the time of Release
    run("cmake", "--build", build, "-j2")
    run("cmake", "--install", build, "--prefix", prefix, "--component", "cpp")
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", tmp_path / "example", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "example")
    out = run(tmp_path / "example" / "dual_path", tmp_path / "kv")
    assert "every byte right on both sides: yes" in out
    assert "decode read" in out


def test_embedding_page_runs(tmp_path: Path) -> None:
    """The page's Python blocks, one after another, are a program."""
    page = (ROOT / "docs" / "embedding.md").read_text()
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    script = tmp_path / "embedding.py"
    script.write_text(program)
    assert "exact: True" in run(sys.executable, script, cwd=tmp_path)


def test_readme_code_runs(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text(program.replace("/tmp/dualkv-readme", f"{tmp_path}/kv"))
    run(sys.executable, script, cwd=tmp_path)

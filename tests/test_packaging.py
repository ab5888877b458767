"""What the sdist and the wheel hold."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.full  # compiles the core twice

PROGRAM = """
import sys
from scikit_build_core import build
print(getattr(build, "build_" + sys.argv[1])(sys.argv[2]), file=sys.stderr)
"""


def _build(kind: str, source: Path, out: Path) -> Path:
    # Without isolation, so that no network is needed; a build folder of its own.
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "SKBUILD_BUILD_DIR": str(out / "build")}
    command = [sys.executable, "-c", PROGRAM, kind, str(out)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (found,) = (*out.glob("*.whl"), *out.glob("*.tar.gz"))
    return found


def test_a_wheel_built_from_the_sdist_is_whole(tmp_path: Path) -> None:
    sdist = _build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "source", filter="data")
    assert {"CMakeLists.txt", "csrc/ops.h", "kernels/rms_norm.py", "Makefile"} <= names
    assert not any(name.startswith(("build/", ".venv/")) or name.endswith(".so") for name in names)
    (source,) = (tmp_path / "source").iterdir()
    wheel = _build("wheel", source, tmp_path / "wheel")
    found = set(zipfile.ZipFile(wheel).namelist())
    for folder, installed in (("kernels", "fastllm/kernels"), ("bench", "fastllm/bench")):
        expected = {f"{installed}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert expected and expected <= found, expected - found
    modules = {f"{p.relative_to(ROOT)}" for p in (ROOT / "fastllm").rglob("*.py")}
    assert modules <= found, modules - found
    assert any(name.startswith("fastllm/_C.") and name.endswith(".so") for name in found)
    assert not any(name.startswith(("tests/", "csrc/", "kernels/", "bench/")) for name in found)
    assert wheel.stat().st_size < 32 << 20

"""The compiled core: no symbol of a high ISA level leaks; C++ tests, sanitized and emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastllm import _C

ROOT = Path(__file__).parent.parent
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
QEMU = shutil.which("qemu-x86_64")


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol that a file defines."""
    out = subprocess.run(
        ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = (re.match(r"[0-9a-f]+ (\S) (.*)", line) for line in out.splitlines())
    return [(m[1], m[2]) for m in found if m]


def leaks(found: list[tuple[str, str]]) -> list[str]:
    """Weak or unique symbols: of those the linker keeps one copy for all, whatever its level."""
    return [f"{kind} {name}" for kind, name in found if kind in "WwVvu"]


def level_objects() -> list[Path]:
    """Objects of the ISA levels in build trees, where the checkout has any."""
    return [
        p for level in LEVELS for p in ROOT.glob(f"build/*/CMakeFiles/fastllm_{level}.dir/**/*.o")
    ]


def test_no_weak_symbol_of_an_isa_level_is_in_the_extension() -> None:
    found = symbols(Path(_C.__file__))
    of_levels = [s for s in found if re.search(rf"fastllm::({'|'.join(LEVELS)})::", s[1])]
    # A stripped wheel shows none: then its build tree, if there, is the evidence (next test).
    assert not leaks(of_levels)


@pytest.mark.skipif(not level_objects(), reason="no build tree: installed from a wheel")
def test_objects_of_isa_levels_define_no_weak_symbol() -> None:
    for path in level_objects():
        found = symbols(path)
        assert found
        assert not leaks(found), f"{path.name}: {leaks(found)}"


def build(folder: Path, sanitize: str) -> Path:
    """Configure and build the C++ tests; the path of the executable."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DFASTLLM_NATIVE_TESTS=ON", f"-DFASTLLM_SANITIZE={sanitize}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(configure, check=True, capture_output=True)
    command = ["cmake", "--build", str(folder), "--target", "fastllm_native_tests", "-j2"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "fastllm_native_tests"


def run(command: list[str], **variables: str) -> str:
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"), "")


@pytest.mark.full
def test_native_tests_pass(plain: Path) -> None:
    assert "kernels of the table ran" in run([str(plain)])


@pytest.mark.full
@pytest.mark.skipif(QEMU is None, reason="qemu-user is not installed")
def test_the_generic_level_runs_on_a_processor_without_avx(plain: Path) -> None:
    assert QEMU is not None
    out = run([QEMU, "-cpu", "Nehalem", str(plain)], FASTLLM_ISA="generic")
    assert re.search(r"levels: generic$", out, re.MULTILINE)
    assert "sampling: ok" in out


@pytest.mark.full
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_native_tests_pass_under_sanitizers(tmp_path: Path, sanitize: str) -> None:
    path = build(tmp_path, sanitize)
    run(
        [str(path)],
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
        ASAN_OPTIONS="detect_leaks=0",  # pools are kept for detached workers on purpose
    )

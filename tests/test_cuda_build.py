"""The CUDA kernels without a GPU: what ptxas makes of them, their results on an emulated device.

The emulation (tests/native/cuda) runs the device code as it is, with the fragment layouts that the
PTX ISA documents, and checks every access, bank conflicts of ldmatrix, and races by running warps
and asynchronous copies in several orders.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from fastllm.ops import quant_matmul_cuda as low_batch
from fastllm.ops.paged_attention import _cuda_attention, cuda_shared_bytes

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "tests" / "native" / "cuda"
CXX = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# Of one streaming multiprocessor: registers, shared memory, shared memory of one block; a block
# takes 1 KiB more than it asks for.
REGISTERS = 65536
SHARED = {"sm_80": (167936, 166912), "sm_90a": (233472, 232448)}
SHARED_OF_BLOCK = (101376, *(of_block for _, of_block in SHARED.values()))  # sm_89, 80, 90
THREADS = 128


class Kernel(NamedTuple):
    """What ptxas says of one instance."""

    name: str
    registers: int
    stack: int
    spilled: int


def compile_kernels(arch: str, out: Path, name: str = "paged_attention") -> list[Kernel]:
    """Compile csrc/cuda/<name>.cu for one architecture; its kernels as ptxas made them."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-Xptxas", "-v"]
    command += ["-cubin", "-o", str(out), str(ROOT / "csrc" / "cuda" / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in pattern.findall(done.stderr)
    ]


def label(mangled: str) -> str:
    """Short name of an instance: `split Bf16 int8 groups 2`."""
    element = "Bf16" if "Bf16" in mangled else "Fp16"
    if "combine" in mangled:
        return f"combine {element}"
    found = re.search(r"Lb([01])ELi(\d+)ELb([01])E", mangled)
    assert found, mangled
    kind = "int8" if found[1] == "1" else "alias" if found[3] == "1" else "half"
    return f"split {element} {kind} groups {found[2]}"


def check_arch(arch: str, tmp_path: Path, shared: dict[tuple[str, int, int], int]) -> None:
    kernels = {label(k.name): k for k in compile_kernels(arch, tmp_path / "kernels.cubin")}
    for name, kernel in sorted(kernels.items()):
        print(f"{arch}: {name}: {kernel.registers} registers, {kernel.spilled} bytes spilled")
    # 2 element types x (3 widths of V x 2 caches, 1 aliased) and 2 combinations.
    assert len(kernels) == 16
    bad = [k for k in kernels.values() if k.spilled or k.stack]
    assert not bad, "\n".join(map(str, bad))
    of_multiprocessor, of_block = SHARED[arch]
    for (cache, dim, value_dim), size in shared.items():
        aliased = dim == 576
        if aliased and arch == "sm_80":
            assert size > of_block  # the launch reports it
            continue
        groups = 8 if aliased else {64: 1, 128: 2}.get(max(dim, value_dim), 4)
        kernel = kernels[f"split Bf16 {'alias' if aliased else cache} groups {groups}"]
        registers = -(-kernel.registers // 8) * 8 * THREADS
        blocks = min(REGISTERS // registers, of_multiprocessor // (size + 1024))
        print(f"{arch}: {cache} {dim}/{value_dim}: {size} bytes shared, {blocks} blocks")
        assert size <= of_block
        assert blocks >= (1 if max(dim, value_dim) > 192 else 2 if arch == "sm_90a" else 1)


def build(out: Path, *flags: str, name: str = "paged_attention") -> Path:
    """Compile the kernels of csrc/cuda/<name>.cu for the emulated device."""
    assert CXX is not None, "no C++ compiler"
    command = [CXX, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [*flags, f"-I{NATIVE}", f"-I{ROOT / 'csrc'}"]
    command += [str(NATIVE / f"test_{name}.cpp")]
    command += [str(ROOT / "csrc" / "cuda" / f"{name}_args.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda") / "test_paged_attention")


def run(path: Path, mode: str) -> str:
    done = subprocess.run([str(path), mode], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def shared(emulated: Path) -> dict[tuple[str, int, int], int]:
    """Bytes of shared memory of a block by cache, D and Dv."""
    rows = (line.split() for line in run(emulated, "shared").splitlines())
    return {(cache, int(dim), int(value)): int(size) for cache, dim, value, size in rows}


def test_emulated_kernels_are_within_their_rounding_of_float64(emulated: Path) -> None:
    cases = re.match(r"(\d+) cases", run(emulated, "quick"))
    assert cases and int(cases[1]) >= 80


def test_the_row_knows_the_shared_memory_of_a_block(
    shared: dict[tuple[str, int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a block does not fit (256/256 in bf16 on sm_89), the row refuses: Triton's serves."""
    for (cache, dim, value_dim), size in shared.items():
        if dim > 256:  # the aliased layout of compressed pages is not this op's
            continue
        codes = cache == "int8"
        assert cuda_shared_bytes(dim, value_dim, codes) == size
        q, table = torch.empty(1, 8, dim, dtype=torch.bfloat16), torch.empty(1, 4)
        dtype = torch.int8 if codes else q.dtype
        pages = [torch.empty(1, 2, 16, d, dtype=dtype) for d in (dim, value_dim)]
        for limit in SHARED_OF_BLOCK:
            device = SimpleNamespace(shared_memory_per_block_optin=limit)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, d=device: d)
            assert _cuda_attention(q, *pages, table) == (size <= limit)
    assert shared["half", 256, 256] > min(SHARED_OF_BLOCK)


@pytest.mark.full
def test_every_emulated_case_is_within_its_rounding_of_float64(emulated: Path) -> None:
    cases = re.match(r"(\d+) cases", run(emulated, "full"))
    assert cases and int(cases[1]) >= 3000


@pytest.mark.full
def test_emulated_kernels_have_no_undefined_behaviour(tmp_path: Path) -> None:
    flags = ["-g", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    run(build(tmp_path / "sanitized", *flags), "quick")


@needs_nvcc
def test_kernels_compile_for_sm_90a_without_spills(
    tmp_path: Path, shared: dict[tuple[str, int, int], int]
) -> None:
    check_arch("sm_90a", tmp_path, shared)


@pytest.mark.full
@needs_nvcc
def test_kernels_compile_for_sm_80_without_spills(
    tmp_path: Path, shared: dict[tuple[str, int, int], int]
) -> None:
    check_arch("sm_80", tmp_path, shared)


@pytest.fixture(scope="module")
def emulated_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda") / "test_moe_gate", name="moe_gate")


def test_the_emulated_router_chooses_weighs_and_sorts(emulated_router: Path) -> None:
    cases = re.match(r"(\d+) cases", run(emulated_router, "quick"))
    assert cases and int(cases[1]) >= 60


@pytest.mark.full
def test_the_emulated_router_is_right_in_every_case(emulated_router: Path) -> None:
    cases = re.match(r"(\d+) cases", run(emulated_router, "full"))
    assert cases and int(cases[1]) >= 450


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.full)])
def test_the_router_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    kernels = compile_kernels(arch, tmp_path / "kernels.cubin", "moe_gate")
    for kernel in kernels:
        print(f"{arch}: {kernel.name}: {kernel.registers} registers, {kernel.spilled} spilled")
    assert len(kernels) == 5  # 1, 2, 4, 8 and 16 logits a lane
    bad = [k for k in kernels if k.spilled or k.stack or k.registers > REGISTERS // 512]
    assert not bad, "\n".join(map(str, bad))


@pytest.fixture(scope="module")
def emulated_product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda") / "test_quant_matmul", name="quant_matmul")


def test_the_emulated_low_batch_product_is_within_its_rounding(emulated_product: Path) -> None:
    cases = re.match(r"(\d+) cases", run(emulated_product, "quick"))
    assert cases and int(cases[1]) >= 50


@pytest.mark.full
def test_the_emulated_low_batch_product_is_right_in_every_case(emulated_product: Path) -> None:
    cases = re.match(r"(\d+) cases", run(emulated_product, "full"))
    assert cases and int(cases[1]) >= 190


@needs_nvcc
@pytest.mark.parametrize(
    "arch",
    [pytest.param("sm_90a", marks=pytest.mark.full), pytest.param("sm_80", marks=pytest.mark.full)],
)
def test_the_low_batch_product_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    kernels = compile_kernels(arch, tmp_path / "kernels.cubin", "quant_matmul")
    for kernel in kernels:
        print(f"{arch}: {kernel.name}: {kernel.registers} registers, {kernel.spilled} spilled")
    assert len(kernels) == 31  # 5 kinds of codes x 8, 16 and 32 tokens x 16 and 32 rows, the sum
    bad = [k for k in kernels if k.spilled or k.stack]
    assert not bad, "\n".join(map(str, bad))


def test_the_low_batch_row_knows_splits_and_formats() -> None:
    """Sizes of scratch are counted in Python as the launcher counts them."""
    text = (ROOT / "csrc" / "cuda" / "quant_matmul_params.h").read_text()
    for name, value in {
        "kProductWarps": low_batch.WARPS,
        "kProductTokens": low_batch.MAX_TOKENS,
        "kSegmentBytes": low_batch.SEGMENT_BYTES,
        "kMostSplits": low_batch.MAX_SPLITS,
        "kManyRows": low_batch.MANY_ROWS,
        "kWantedBlocks": low_batch.WANTED_BLOCKS,
    }.items():
        assert re.search(rf"\b{name} = {value};", text), name
    assert low_batch.splits_of("int4_g128", 4096, 4096) == 1
    assert low_batch.splits_of("int4_g128", 1024, 8192) == 2
    assert low_batch.splits_of("int8", 20, 12288) == 6
    assert len(low_batch.CUDA_FORMATS) == 15


@pytest.mark.full
@needs_nvcc
def test_the_project_builds_its_cuda_library(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DFASTLLM_CUDA=on"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(configure, check=True, capture_output=True)
    command = ["cmake", "--build", str(tmp_path), "--target", "fastllm_cuda", "-j2"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "libfastllm_cuda.a").stat().st_size > 0

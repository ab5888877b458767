"""Every Triton kernel compiles for sm_80 and sm_90 at its shipped tiles, fits, and does not spill.

On sm_89, which stands for all GPUs with 99 KB of shared memory a block, those that must be smaller.

The launches come from the launchers themselves (fastllm.kernels.ahead_of_time), so a change of a
tile is compiled as it would run. Needs no GPU: Triton carries ptxas.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from fastllm.kernels import ahead_of_time, tuning
from fastllm.kernels.ahead_of_time import SHARED_LIMIT, Resources

# Each tile family once where it is tightest: with the products below 39 calls.
QUICK = {
    90: [
        "quant_matmul fp8_block fp8 m=2048",
        "quant_matmul q6_k int8 m=2048 gated",
        "quant_matmul_input_grad nf4_dq",
        "attention 128 bf16 causal fast",
        "attention 192/128 bf16 all fast",
        "attention 128 bf16 window",
        "attention_backward 128/128 bf16 causal",
        "paged_attention prefill 64 bf16 int8 all",
        "paged_attention decode 128 bf16 int8 fast",
        "mla prefill 16 bf16",
        "rms_norm",
        "add_rms_norm_backward",
        "sampling",
        "kl_gradient js",
        "moe bf16 gelu_tanh m=4096",
    ],
    80: [
        "quant_matmul int4_asym_g128 bf16 m=2048 gated",
        "quant_matmul q5_k int8 m=1",
        "mla decode 128 bf16 fast",
        "attention 128 bf16 window fast",
        "attention_backward 128/128 bf16 causal",
        "paged_attention decode 256 bf16 plain",
        "rope",
        "kl_rows js",
        "loss_rows walk=True",
        "quant_moe q4_1 int8 m=4096",
    ],
}
# With 99 KB of shared memory: what has tiles of its own there, or comes near the limit.
SMALL = [
    "attention 192/128 bf16 causal fast",
    "attention 256 bf16 causal fast",
    "attention 256 f32 causal",
    "attention 512 bf16 causal",
    "attention 512 f32 causal",
    "attention_backward 128/128 bf16 causal",
    "attention_backward 128/128 bf16 all",
    "attention_backward 160/160 bf16 causal",
    "attention_backward 512/512 bf16 causal",
    "attention_backward 512/512 f32 causal",
    "paged_attention prefill 256 bf16 plain fast",
    "paged_attention prefill 256 f32 plain",
    "paged_attention decode 128 bf16 plain fast",
    "mla prefill 128 bf16 fast",
    "linear bf16 m=2048",
    "moe bf16 m=4096",
    "moe_backward bf16 m=4096",
    "quant_moe q4_1 bf16 m=4096",
    "quant_matmul fp8_block bf16 m=2048 gated",
    "quant_matmul int8 bf16 m=2048",
]


def check(found: list[Resources]) -> None:
    """No spills, shared memory within the limit; the message is the table."""
    table = "\n".join(
        f"sm_{r.arch}: {r.registers} registers, {r.spills} spilled, {r.shared} shared, {r.name}"
        for r in found
    )
    print(table)
    bad = [r for r in found if r.spills or r.shared > SHARED_LIMIT[r.arch]]
    assert found and not bad, f"{len(bad)} kernels spill or do not fit:\n" + "\n".join(
        map(str, bad)
    )


def test_every_kernel_has_a_shipped_launch() -> None:
    """The table of launches names every `*_kernel` of the folder: none goes uncompiled."""
    names = ahead_of_time.KERNEL_MODULES
    modules = [importlib.import_module(f"fastllm.kernels.{name}") for name in names]
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    with ahead_of_time.recorded() as launches:
        for call in ahead_of_time.shipped_launches().values():
            call()
    assert {launch.kernel.__name__ for launch in launches} == written


@pytest.mark.parametrize("arch", QUICK)
def test_tightest_kernels_fit_without_spills(arch: int) -> None:
    check(ahead_of_time.compile_all(QUICK[arch], (arch,)))


@pytest.mark.parametrize("arch, instruction", [(80, "mma m16 k16"), (90, "wgmma m64 k16")])
def test_one_token_and_many_run_the_same_instruction(arch: int, instruction: str) -> None:
    """Row bits may depend on the matrix instruction, so few and many tokens must share it."""
    names = ["linear bf16 m=1", "linear bf16 m=2048"]
    names += ["quant_matmul q4_1 bf16 m=1", "quant_matmul q4_1 bf16 m=2048"]
    names += [f"paged_attention {phase} 128 bf16 plain" for phase in ("decode", "prefill")]
    names += ["attention 128 bf16 causal"]
    found = ahead_of_time.compile_all(names, (arch,))
    check(found)
    products = {r.name: r.products for r in found if r.products}
    assert len(products) == len(names)
    assert set(products.values()) == {(instruction,)}, products


@pytest.mark.parametrize(
    "capability, arch",
    [
        ((8, 0), 80),
        ((8, 6), 89),
        ((8, 7), 80),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 0), 90),
        ((12, 0), 89),
    ],
)
def test_devices_take_tiles_that_their_shared_memory_holds(
    capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tuning.architecture(torch.device("cuda", 0)) == arch


@pytest.mark.full
def test_kernels_fit_small_shared_memory() -> None:
    check(ahead_of_time.compile_all(SMALL, (89,)))


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90])
def test_all_kernels_fit_without_spills(arch: int) -> None:
    check(ahead_of_time.compile_all(list(ahead_of_time.shipped_launches()), (arch,)))

"""The LM-head losses through their Triton rows under the interpreter, against float64.

Runs as interpreter_cases.py does. The cases are those of the ops' OpInfo, judged by the same bound
as the native kernels; the drivers run too, from the choice of chunks to the last gradient.
"""

from __future__ import annotations

import torch
from interpreter_cases import BF16, F32, NAMES, Case, excess, main, randn, same

OPS_WITH_TARGETS = ("linear_cross_entropy", "linear_logprob", "linear_logits_backward")
DIVERGENCES = ("linear_kl", "linear_kl_backward", "linear_kl_top", "linear_kl_top_backward")


def triton_row(name: str):  # type: ignore[no-untyped-def]
    """What serves an op on a GPU."""
    from fastllm.ops.registry import OPS

    return next(row.fn for row in OPS[name].tables["cuda"] if row.name == "triton")


def judged_case(name: str, number: int, dtype: torch.dtype) -> float:
    """Case `number` of those of the op that hold a plain weight; raises where it is wrong."""
    from fastllm.ops.registry import OPS
    from fastllm.testing.check import case_arguments, case_judge
    from fastllm.testing.opinfo import all_infos

    info = all_infos()[name]
    plain = [case for case in info.cases(dtype) if case.label.startswith("plain")]
    case = plain[number]
    got = triton_row(name)(*case_arguments(info, case))
    case_judge(OPS[name], info, case).check(got, f"triton {case.label}")
    return 0.0


def packed_case(format: str) -> float:
    """A packed weight in the GPU's layout gives what its values in rows give, nearly."""
    from fastllm.ops import packed_layout as layout
    from fastllm.quantize.packed import pack_ref

    rows = randn(70, 64, dtype=BF16)
    w = pack_ref(format, rows, 70, 64, 1)
    assert torch.equal(layout.dequantize(w.data, w.scales, format, 70, 64), rows.float())
    x, target = randn(5, 64, dtype=BF16, seed=1), torch.tensor([3, 69, -100, 0, 7])
    call = triton_row("linear_cross_entropy")
    options = (target, -100, "sum", 0.0, 0.0, 0.0, 1)
    got = call(x, w.data, w.scales, format, 70, "bf16", None, *options)
    want = call(x, rows, None, "", 70, "bf16", None, *options)
    return max(same(a, b) for a, b in zip(got[:3], want[:3], strict=True))


def quantized_case(format: str, width: int) -> float:
    """The gradient of x through a quantized weight is the definition's."""
    from fastllm.ops.registry import OPS
    from fastllm.quantize.packed import pack_ref

    blocks = torch.randint(
        0, 60, (70, 64 // 32 * width), generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    w = pack_ref(format, blocks, 70, 64, 1)
    x, target = randn(5, 64, dtype=BF16, seed=1), torch.tensor([3, 69, -100, 0, 7])
    args = (x, w.data, w.scales, format, 70, "bf16", None, target, -100, "sum", 0.0, 0.0, 0.0, 1)
    dx = triton_row("linear_cross_entropy")(*args)[2]
    return excess(dx, OPS["linear_cross_entropy"].ref(*args)[2].double(), BF16)


def parity_case(dtype: torch.dtype) -> float:
    """Log-probabilities equal those of `log_probs` on the head's logits, bit for bit."""
    from fastllm.kernels.linear import linear
    from fastllm.kernels.log_probs import log_probs

    x, weight = randn(6, 40, dtype=dtype), randn(1100, 40, dtype=dtype, seed=1)
    ids = torch.tensor([0, 5, 512, 1023, 1024, 1099])
    want = log_probs(linear(x, weight, None, F32), ids[:, None])[:, 0]
    head = (x, weight, None, "", 1100, "bf16", None)
    logprob, _, _ = triton_row("linear_logprob")(*head, ids, -100, 1.0, 0.0, 0)
    alone, _, _ = triton_row("linear_logprob")(x[3:4], *head[1:], ids[3:4], -100, 1.0, 0.0, 0)
    return max(same(logprob, want), same(alone, want[3:4]))


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    cases: dict[str, Case] = {}
    for dtype in (F32, BF16):
        for name in OPS_WITH_TARGETS:
            for number in (0, 3, 4, 5) if dtype == BF16 else (4,):
                key = f"{name} {NAMES[dtype]} {number}"
                cases[key] = lambda a=(name, number, dtype): judged_case(*a)
        for name in DIVERGENCES:  # without the case of one id
            for number in (2, 3, 4) if dtype == BF16 else (3,):
                key = f"{name} {NAMES[dtype]} {number}"
                cases[key] = lambda a=(name, number, dtype): judged_case(*a)
        cases[f"linear_logprob {NAMES[dtype]} parity"] = lambda d=dtype: parity_case(d)
    cases["linear_cross_entropy packed"] = lambda: packed_case("bf16")
    cases["linear_cross_entropy q4_1"] = lambda: quantized_case("q4_1", 20)
    return cases


def full_cases() -> dict[str, Case]:
    """Further cases for the full run."""
    cases: dict[str, Case] = {}
    for name, count in [(n, 7) for n in OPS_WITH_TARGETS] + [(n, 6) for n in DIVERGENCES]:
        for number in range(count):
            key = f"{name} f32 all {number}"
            cases[key] = lambda a=(name, number, F32): judged_case(*a)
    return cases


if __name__ == "__main__":
    main(quick_cases, full_cases)

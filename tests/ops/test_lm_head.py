"""Properties of the LM-head losses: parity with generation, what rows cost, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import _C
from fastllm.ops import (
    linear,
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
    log_probs,
    quant_matmul,
    sampling,
)
from fastllm.quantize.packed import PackedWeight, pack
from fastllm.testing.memory import peak_extra_bytes
from fastllm.testing.opinfo import generator


def head(
    tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, gradients: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, target)."""
    g = generator()
    x = torch.randn(tokens, k, generator=g).to(dtype).requires_grad_(gradients)
    weight = (torch.randn(n, k, generator=g) * 0.2).to(dtype).requires_grad_(gradients)
    return x, weight, torch.randint(0, n, (tokens,), generator=g)


def greedy_sampling(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, raw log-probability, log-probability at the temperature) as the engine samples them."""
    rows = logits.shape[0]
    ones = torch.ones(rows)
    none = torch.empty(0, logits.shape[1])
    return sampling(
        logits, ones * temperature, torch.zeros(rows).int(), ones, 0 * ones, ones, 0 * ones,
        0 * ones, torch.arange(rows), torch.arange(rows).int(), torch.zeros(rows).byte(),
        none.int(), none.byte(), torch.full((rows, 1), -1).int(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probabilities_are_those_of_generation_bit_for_bit(
    dtype: torch.dtype, temperature: float
) -> None:
    x, weight, target = head(150, 1300, 48, dtype)
    for isa in _C.isas():
        _C.set_isa(isa)
        logits = linear(x, weight, None, torch.float32)
        ids, raw, scaled = greedy_sampling(logits, temperature)
        assert torch.equal(linear_logprob(x, weight, ids)[0], raw)
        assert torch.equal(linear_logprob(x, weight, ids, temperature=temperature)[0], scaled)
        loss = linear_cross_entropy(x, weight, target, reduction="none")
        assert torch.equal(-loss, log_probs(logits, target[:, None])[:, 0])
        alone = linear_cross_entropy(x[7:9], weight, target[7:9], reduction="none")
        assert torch.equal(alone, loss[7:9])


def packed(format: str, n: int, k: int) -> PackedWeight:
    rows = torch.randint(0, 60, (n, k // 32 * 20), generator=generator()).to(torch.uint8)
    return pack(format, rows, n, k)


def test_a_packed_weight_gives_the_log_probabilities_of_its_product() -> None:
    weight = packed("q4_1", 600, 64)
    x, _, target = head(20, 600, 64)
    x.requires_grad_()
    for activation in ("int8", "bf16"):
        args = (weight.data, weight.scales, weight.format, weight.n, None, activation)
        want = log_probs(quant_matmul(x, *args, torch.float32), target[:, None])[:, 0]
        got, _ = linear_logprob(x, weight, target, activation=activation)
        assert torch.equal(got, want)
        (by_op,) = torch.autograd.grad(got.sum(), x)
        (by_logits,) = torch.autograd.grad(want.sum(), x)
        torch.testing.assert_close(by_op, by_logits, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_those_of_torch_in_float64(reduction: str) -> None:
    x, weight, target = head(700, 530, 20, torch.float32, gradients=True)  # more than one block
    target[::5] = -100
    shape = target.shape if reduction == "none" else ()
    upstream = torch.randn(shape, generator=generator(1))
    got = linear_cross_entropy(x, weight, target, reduction=reduction, label_smoothing=0.1)
    grads = torch.autograd.grad(got, (x, weight), upstream)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = F.cross_entropy(F.linear(*leaves), target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-6)
    for a, b in zip(grads, torch.autograd.grad(want, leaves, upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-5)


def test_ignored_rows_change_nothing_even_when_they_hold_nan() -> None:
    x, weight, target = head(40, 600, 32, gradients=True)
    keep = torch.arange(40) % 3 != 0
    spoiled = torch.where(keep[:, None], x.detach(), float("nan")).requires_grad_()
    loss = linear_cross_entropy(spoiled, weight, target.where(keep, -100), reduction="sum")
    dx, dweight = torch.autograd.grad(loss, (spoiled, weight))
    few = x.detach()[keep].requires_grad_()
    want = linear_cross_entropy(few, weight, target[keep], reduction="sum")
    dfew, dwant = torch.autograd.grad(want, (few, weight))
    assert torch.equal(loss, want) and torch.equal(dweight, dwant)
    assert torch.equal(dx[keep], dfew) and not dx[~keep].any()


def test_nothing_to_learn_is_nan_as_in_torch_with_gradients_of_zero() -> None:
    x, weight, target = head(4, 600, 32, gradients=True)
    loss = linear_cross_entropy(x, weight, torch.full_like(target, -100))
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))
    empty = linear_cross_entropy(x[:0], weight, target[:0], reduction="none")
    assert empty.shape == (0,)


def test_a_row_of_nan_stays_alone() -> None:
    x, weight, target = head(5, 600, 32, gradients=True)
    with torch.no_grad():
        x[2] = float("nan")
    loss = linear_cross_entropy(x, weight, target, reduction="none")
    logprob, entropy = linear_logprob(x, weight, target)
    for result in (loss, logprob, entropy, linear_kl(x, weight, x, weight)):
        assert result.isnan().tolist() == [False, False, True, False, False]
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx[2].isnan().any() and not dx[[0, 1, 3, 4]].isnan().any()


def test_infinite_logits_are_judged_as_the_sampler_judges_them() -> None:
    x, weight = torch.ones(1, 1), torch.tensor([[1.0], [float("-inf")], [2.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([1])).item() == float("inf")
    logprob, entropy = linear_logprob(x, weight, torch.tensor([2]))
    assert logprob.item() == pytest.approx(-0.31326169) and entropy.isfinite()
    assert linear_logprob(x, -weight, torch.tensor([2]))[0].isnan()  # +inf


def test_a_kept_graph_can_be_run_again_and_gradients_do_not_share_memory() -> None:
    x, weight, target = head(9, 600, 32, gradients=True)
    loss = linear_cross_entropy(x, weight, target)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    first = weight.grad.clone()
    weight.grad.zero_()
    loss.backward(torch.tensor(2.0))
    torch.testing.assert_close(weight.grad, 2 * first)


def test_a_gradient_kept_in_float32_is_not_rounded_first() -> None:
    x, weight, target = head(9, 600, 32)
    wide, narrow = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    wide.grad_dtype = torch.float32
    for parameter in (wide, narrow):
        linear_cross_entropy(x, parameter, target).backward()
    assert wide.grad is not None and narrow.grad is not None
    assert wide.grad.dtype == torch.float32 and narrow.grad.dtype == torch.bfloat16
    assert torch.equal(wide.grad.bfloat16(), narrow.grad)
    assert not torch.equal(wide.grad, narrow.grad.float())


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_teacher_of_all_ids_is_the_dense_teacher(kind: str) -> None:
    x, weight, _ = head(6, 530, 32, torch.float32, gradients=True)
    teacher_x, teacher_weight = torch.randn(6, 16, generator=generator(3)), weight[:, :16].detach()
    logq = F.log_softmax(linear(teacher_x, teacher_weight) / 2, 1)
    dense = linear_kl(x, weight, teacher_x, teacher_weight, kind=kind, temperature=2.0)
    ids = torch.arange(530).expand(6, 530).contiguous()
    top = linear_kl(x, weight, teacher_ids=ids, teacher_logprobs=logq, kind=kind, temperature=2.0)
    torch.testing.assert_close(dense, top, atol=1e-5, rtol=1e-5)
    few, at = logq.topk(7)
    part = linear_kl(x, weight, teacher_ids=at, teacher_logprobs=few, kind=kind, temperature=2.0)
    assert (part >= 0).all() and (part <= dense + 1e-5).all()
    for a, b in zip(
        torch.autograd.grad(dense.sum(), (x, weight)),
        torch.autograd.grad(top.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    def peak(tokens: int) -> int:
        x, weight, target = head(tokens, 16384, 16, gradients=True)

        def step() -> Any:
            loss = linear_cross_entropy(x, weight, target)
            logprob, _ = linear_logprob(x, weight, target)
            return torch.autograd.grad(loss + logprob.sum(), (x, weight))

        step()
        return peak_extra_bytes(step)

    few, many = peak(1024), peak(4096)
    # The logits of the 3,072 rows more would be 200 MB; what may grow is x and a number a row.
    assert many - few < 8 << 20, f"{few >> 20} MB with 1,024 rows, {many >> 20} MB with 4,096"


def test_memory_is_the_weight_gradient_and_half_of_the_logits() -> None:
    x, weight, target = head(512, 70_000, 300, gradients=True)

    def step() -> Any:
        return torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))

    found = step()
    halves = (weight.nbytes + 512 * weight.shape[0] * 2) >> 20
    peak = peak_extra_bytes(step) >> 20  # logits of 128 rows in float32 would be 34 MB more
    assert peak < halves + 16, f"{peak} MB; gradients of weight and logits are {halves} MB"
    logits = F.linear(x.detach().float(), weight.detach().float())
    d = F.softmax(logits, 1)
    d[torch.arange(512), target] -= 1
    want = (d / 512).bfloat16().float().T @ x.detach().float()
    torch.testing.assert_close(found[1].float(), want, atol=2e-5, rtol=2e-2)


def test_rows_of_any_shape_and_strides_are_rows() -> None:
    x, weight, target = head(12, 600, 32, torch.float32)
    want = linear_cross_entropy(x, weight, target, reduction="none")
    got = linear_cross_entropy(x.view(3, 4, 32), weight, target.view(3, 4), reduction="none")
    assert torch.equal(got, want.view(3, 4))
    columns = x.T.contiguous().T  # strides (1, 12)
    assert torch.equal(linear_cross_entropy(columns, weight, target.int(), reduction="none"), want)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"target": torch.tensor([0, 600])}, "target 600 of row 1"),
        ({"target": torch.tensor([-1, 5])}, "target -1 of row 0"),
        ({"target": torch.tensor([0.0, 1.0])}, "target must be int64"),
        ({"target": torch.tensor([0])}, "target must be int64"),
        ({"x": torch.zeros(2, 32, dtype=torch.float16)}, "x must be"),
        ({"weight": torch.zeros(600, 31)}, "weight must have shape"),
        ({"weight": torch.zeros(600, 32).bfloat16()}, "weight is torch.bfloat16"),
        ({"weight": torch.zeros(0, 32)}, "weight has no rows"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"activation": "int4"}, "activation 'int4'"),
        ({"softcap": -1.0}, "softcap"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], name: str) -> None:
    good = {
        "x": torch.zeros(2, 32),
        "weight": torch.zeros(600, 32),
        "target": torch.zeros(2).long(),
    }
    for loss in (linear_cross_entropy, linear_logprob):
        with pytest.raises(ValueError, match=name):
            loss(**good | change)  # type: ignore[operator]


def test_bad_options_are_named() -> None:
    x, weight, target = head(2, 600, 32, torch.float32)
    ids, logprobs = torch.tensor([[1, 2], [3, 3]]), torch.zeros(2, 2)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            linear_logprob(x, weight, target, temperature=temperature)
    for options, name in (
        ({"reduction": "avg"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
    ):
        with pytest.raises(ValueError, match=name):
            linear_cross_entropy(x, weight, target, **options)  # type: ignore[arg-type]
    for options, name in (
        ({}, "give the teacher"),
        ({"teacher_x": x}, "give the teacher"),
        ({"teacher_x": x, "teacher_weight": weight[:9]}, "one vocabulary"),
        ({"teacher_x": x[:1], "teacher_weight": weight}, "teacher_x must have rows"),
        ({"teacher_x": x, "teacher_weight": weight.double()}, "teacher_weight is"),
        ({"teacher_x": x, "teacher_weight": weight, "kind": "tv"}, "kind 'tv'"),
        ({"teacher_x": x, "teacher_weight": weight, "kind": "js", "beta": 0.0}, "beta"),
        ({"teacher_ids": ids, "teacher_logprobs": logprobs}, "twice"),
        ({"teacher_ids": ids + 598, "teacher_logprobs": logprobs}, "outside the vocabulary"),
        ({"teacher_ids": ids, "teacher_logprobs": logprobs.double()}, "teacher_logprobs"),
    ):
        with pytest.raises(ValueError, match=name):
            linear_kl(x, weight, **options)  # type: ignore[arg-type]


def refused(result: Tensor, x: Tensor, weight: Tensor, name: str) -> None:
    """Raise AssertionError unless gradients of a result exist and recording them is refused."""
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(result, (x, weight), create_graph=True)
    assert all(g.any() for g in torch.autograd.grad(result, (x, weight)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    x, weight, target = head(9, 600, 32, gradients=True)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    refused(loss, x, weight, "linear_cross_entropy")
    logprob, entropy = linear_logprob(x, weight, target)
    refused((logprob + entropy).sum(), x, weight, "linear_logprob")
    teacher = x.detach() + 1, weight.detach()
    refused(linear_kl(x, weight, *teacher).sum(), x, weight, "linear_kl")
    ids, logprobs = target[:, None], torch.full((9, 1), -1.0)
    top = linear_kl(x, weight, teacher_ids=ids, teacher_logprobs=logprobs)
    refused(top.sum(), x, weight, "linear_kl")

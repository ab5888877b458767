"""GPTQ: the textbook's codes, smaller errors of outputs in every format, input that is broken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm.errors import NumericalError
from fastllm.ops import packed_layout as layout
from fastllm.quantize.clip import clipped, gains_by_clipping
from fastllm.quantize.gptq import Grid, Rounding, factor_, permute_, with_codes
from fastllm.quantize.moments import Moments, output_error
from fastllm.quantize.packed import PackedWeight, quantize_weight, unpack

N, K = 24, 256


def problem(seed: int = 0, tokens: int = 600) -> tuple[Tensor, Moments]:
    """A weight and inputs whose channels differ in size and are correlated."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.eye(K) + 0.15 * torch.randn(K, K, generator=g)
    x = torch.randn(tokens, K, generator=g) @ mixing * (0.1 + torch.rand(K, generator=g))
    moments = Moments(K, gram=True)
    moments.add(x)
    return torch.randn(N, K, generator=g) * 0.05, moments


def gram_of(moments: Moments) -> Tensor:
    assert moments.gram is not None
    return moments.gram


def textbook(weight: Tensor, gram: Tensor, start: PackedWeight, order: Tensor) -> Tensor:
    """Codes by the published algorithm: the inverse of the gram matrix, column after column."""
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(K)
    inverse = torch.linalg.inv(gram[order][:, order].double())
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, grid = weight[:, order].double(), Grid(start)
    codes = torch.empty(N, K, dtype=torch.uint8)
    for i, column in enumerate(order.tolist()):
        codes[:, column], values = grid.nearest(left[:, i].float(), column)
        error = (left[:, i] - values) / factor[i, i]
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_the_published_algorithm(act_order: bool) -> None:
    weight, moments = problem()
    start = quantize_weight(weight, "int4_g128")
    order = torch.arange(K)
    if act_order:
        order = gram_of(moments).diagonal().argsort(stable=True).flip(0)
    expected = textbook(weight, gram_of(moments), start, order)
    rounding = Rounding(gram_of(moments).clone(), act_order=act_order)
    packed = rounding.round(weight, start)
    found = layout.stored_codes(packed.data, packed.format, N)
    assert (found != expected).float().mean() < 1e-3  # sums in float32 and float64
    assert torch.equal(packed.scales, start.scales)


@pytest.mark.parametrize(
    "format",
    ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "int4_g32", "int4_g128",
     "int4_asym_g64", "int8", "nf4", "nf4_dq", "fp8", "fp8_block"],
)  # fmt: skip
def test_outputs_differ_less_than_rounded_to_nearest(format: str) -> None:
    weight, moments = problem()
    plain = quantize_weight(weight, format, moments.importance)
    before = output_error(unpack(plain) - weight, gram_of(moments))
    rounding = Rounding(gram_of(moments).clone())
    packed = rounding.round(weight, plain)
    after = output_error(unpack(packed) - weight, gram_of(moments))
    assert packed.format == format and after < 0.7 * before
    error, total = rounding.output_error(weight, packed)
    assert error == pytest.approx(after, rel=1e-3)
    assert total == pytest.approx(output_error(weight, gram_of(moments)), rel=1e-3)


def test_columns_of_large_inputs_first_is_better() -> None:
    errors = []
    for act_order in (True, False):
        weight, moments = problem(3)
        start = quantize_weight(weight, "int4_g128", moments.importance)
        packed = Rounding(gram_of(moments).clone(), act_order=act_order).round(weight, start)
        errors.append(output_error(unpack(packed) - weight, gram_of(moments)))
    assert errors[0] < errors[1]


def test_inputs_that_are_never_there_change_nothing() -> None:
    weight, moments = problem()
    gram = gram_of(moments)
    dead = torch.arange(0, K, 5)
    gram[dead] = 0
    gram[:, dead] = 0
    start = quantize_weight(weight, "int8")
    packed = Rounding(gram, act_order=True).round(weight, start)
    assert torch.equal(unpack(packed)[:, dead], unpack(start)[:, dead])


def test_a_gram_matrix_is_permuted_and_factored_in_place() -> None:
    size = 600  # more than one panel
    g = torch.Generator().manual_seed(1)
    x = torch.randn(900, size, generator=g)
    gram = x.t() @ x
    order = torch.randperm(size, generator=g)
    expected = gram[order][:, order]
    permute_(gram, order)
    assert torch.equal(gram, expected)
    factor_(gram, 0.01)
    lower = gram.tril()
    damped = expected + 0.01 * expected.diagonal().mean() * torch.eye(size)
    assert (lower @ lower.t() - damped).abs().max() < 1e-5 * damped.abs().max()
    assert torch.equal(gram.triu(1), expected.triu(1))


def test_damping_grows_until_a_matrix_can_be_factored() -> None:
    gram = torch.ones(300, 300)
    gram[0, 0] = -1.0  # no sum of squares: the smallest damping is not enough
    factor_(gram, 0.01)
    assert gram.isfinite().all() and (gram.diagonal() > 0).all()
    with pytest.raises(NumericalError, match="more damping"):
        factor_(torch.diag(torch.tensor([1e6, -1e6, 1.0])), 1e-5)


def test_broken_inputs_are_errors() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        Rounding(torch.full((64, 64), float("nan")))
    with pytest.raises(ValueError, match="activations hold NaN"):
        Moments(4, gram=False).add(torch.tensor([[1.0, 2.0, float("inf"), 0.0]]))


def test_given_codes_are_held_by_every_format() -> None:
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(20, K, generator=g)
    for format in layout.QUANTIZED:
        packed = quantize_weight(weight, format)
        codes = layout.stored_codes(packed.data, format, 20)
        assert torch.equal(with_codes(packed, codes).data, packed.data), format


def test_clipping_lowers_the_weighted_error_of_nf4() -> None:
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(16, K, generator=g) ** 3
    importance = torch.rand(K, generator=g)

    def error(values: Tensor) -> float:
        return float(
            ((unpack(quantize_weight(values, "nf4")) - weight).square() * importance).sum()
        )

    assert error(clipped(weight, "nf4", importance)) < 0.97 * error(weight)
    assert not gains_by_clipping("int8") and not gains_by_clipping("q4_k")
    assert clipped(weight, "int8", importance) is weight

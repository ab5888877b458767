"""Linear layers: parameters, packed caches of them, and products that run as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastllm.nn.linear import Linear, ParallelLinear


def _linear(rows: int, bias: bool, dtype: torch.dtype, seed: int) -> Linear:
    g = torch.Generator().manual_seed(seed)
    layer = Linear(48, rows, bias, "bf16" if dtype == torch.bfloat16 else "fp32")
    weight = torch.randn(rows, 48, generator=g).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, generator=g).to(dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_packed_product_has_the_bits_of_the_plain_one(dtype: torch.dtype, bias: bool) -> None:
    layer = _linear(37, bias, dtype, 0)
    x = torch.randn(5, 48).to(dtype)
    plain = layer(x)
    layer.pack_()
    assert torch.equal(layer(x), plain)


def test_the_cache_follows_the_parameter_when_asked_and_is_not_saved() -> None:
    layer = _linear(16, False, torch.float32, 0)
    layer.pack_()
    x = torch.randn(3, 48)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), before)  # explicit refresh: nobody guesses
    layer.pack_()
    assert torch.equal(layer(x), 2 * before)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
def test_parallel_linears_have_the_bits_of_separate_ones(biases: tuple[bool, ...]) -> None:
    members = [
        _linear(rows, bias, torch.float32, i)
        for i, (rows, bias) in enumerate(zip((32, 20, 12), biases, strict=True))
    ]
    group = ParallelLinear(members, "abc")
    x = torch.randn(4, 48)
    for member in members:
        member.pack_()
    separate = group(x)
    group.pack_()
    for one, other in zip(group(x), separate, strict=True):
        assert torch.equal(one, other)


def test_a_weight_that_is_packed_alone_cannot_be_packed_again() -> None:
    layer = _linear(16, False, torch.float32, 0)
    layer.pack_()
    layer.weight = None
    with pytest.raises(ValueError, match="nothing to pack"):
        layer.pack_()
    with pytest.raises(ValueError, match="nothing to pack"):
        ParallelLinear([layer, layer], "ab").pack_()

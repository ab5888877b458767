"""RoPE: the reference's bits, the rotation's properties, and bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import rope
from fastllm.ops.rope import rope_ref


def arguments(dtype: torch.dtype, dim: int = 64, rotated: int = 64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(6, 3, dim, generator=g).to(dtype)
    angles = torch.randn(50, rotated // 2, generator=g)
    positions = torch.tensor([0, 49, 3, 3, 17, 1], dtype=torch.int32)
    return x, positions, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 80), (128, 32), (24, 10)])
def test_every_isa_gives_the_bits_of_the_reference(
    dtype: torch.dtype, dim: int, rotated: int
) -> None:
    args = arguments(dtype, dim, rotated)
    want = rope_ref(*args)
    for isa in _C.isas():
        _C.set_isa(isa)
        assert torch.equal(rope(*args), want), isa


def test_scores_depend_on_the_distance_only() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, generator=g)
    frequencies = 10000.0 ** -(torch.arange(32) / 32)
    angles = torch.arange(1000)[:, None] * frequencies
    tables = angles.cos(), angles.sin()

    def score(m: int, n: int) -> float:
        at = [torch.tensor([p], dtype=torch.int32) for p in (m, n)]
        return (rope(q, at[0], *tables) * rope(k, at[1], *tables)).sum().item()

    assert score(7, 3) == pytest.approx(score(904, 900), abs=1e-3)


def test_its_gradient_is_the_opposite_rotation() -> None:
    x, *rest = arguments(torch.float32)
    x.requires_grad_()
    y = rope(x, *rest)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach())


def test_bad_arguments_are_named() -> None:
    x, positions, cos, sin = arguments(torch.float32)
    with pytest.raises(ValueError, match="x must have shape"):
        rope(x[0], positions, cos, sin)
    with pytest.raises(ValueError, match="positions must be int32"):
        rope(x, positions.long(), cos, sin)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 49\)"):
        rope(x, positions, cos[:49], sin[:49])
    with pytest.raises(ValueError, match=r"positions must lie in"):
        rope(x, positions - 1, cos, sin)
    with pytest.raises(ValueError, match="cos must be float32"):
        rope(x[..., :32], positions, cos, sin)
    with pytest.raises(ValueError, match="sin must be float32"):
        rope(x, positions, cos, sin[:, :5])


def test_the_kernel_reads_inside_the_tables_whatever_the_positions() -> None:
    x, _, cos, sin = arguments(torch.float32)
    positions = torch.tensor([-(2**31), -1, 50, 2**31 - 1, 0, 49], dtype=torch.int32)
    y = torch.empty_like(x)
    _C.rope(y, x, positions, cos, sin)
    assert torch.equal(y, rope_ref(x, positions.clamp(0, 49), cos, sin))

"""SwiGLU: an element's bits depend on itself alone; limits; bad arguments."""

from __future__ import annotations

import pytest
import torch

from fastllm import _C
from fastllm.ops import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_does_not_depend_on_its_column(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    for isa in _C.isas():
        _C.set_isa(isa)
        whole = swiglu(gate, up)
        for begin, end in ((1, 300), (0, 7), (299, 300), (13, 100)):
            assert torch.equal(swiglu(gate[begin:end], up[begin:end]), whole[begin:end]), isa


def test_limits_are_right() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, float("inf"), float("nan")])
    for isa in _C.isas():
        _C.set_isa(isa)
        y = swiglu(gate, torch.ones(7))
        torch.testing.assert_close(y, torch.nn.functional.silu(gate), equal_nan=True)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"up must be torch\.float32 of shape"):
        swiglu(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"up must be torch\.float32 of shape"):
        swiglu(torch.ones(3, 4), torch.ones(3, 4).bfloat16())
    with pytest.raises(ValueError, match="gate must have at least one dimension"):
        swiglu(torch.tensor(1.0), torch.tensor(1.0))

"""`sdpa` against torch's function: its sample inputs, layouts, padding masks and errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm.ops import sdpa
from fastllm.ops.registry import OPS
from fastllm.testing.check import Judge


def _graded(fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Any, dtype: Any) -> Any:
    """Output and gradients of q, k, v with everything floating in `dtype`."""

    def cast(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().to(dtype).requires_grad_()
        return x

    leaves = [cast(x) for x in args]
    rest = {name: cast(x) if name != "attn_mask" else _mask(x, dtype) for name, x in kwargs.items()}
    out = fn(*leaves, **rest)
    grads = torch.autograd.grad(out, leaves[:3], torch.ones_like(out) * 0.5)
    return [out.detach(), *grads]


def _mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.detach().to(dtype)


def check(args: tuple[Any, ...], kwargs: Any, dtype: torch.dtype, what: str) -> None:
    """`sdpa` within the project's bound; other draws are the same values in another order."""

    def draw(number: int) -> tuple[Any, Any]:
        mixed = tuple(_shuffled(x, number) if isinstance(x, Tensor) else x for x in args)
        exact = _graded(F.scaled_dot_product_attention, mixed, kwargs, torch.float64)
        return exact, _graded(_flash, mixed, kwargs, dtype)

    # A sample has about 100 numbers, and those of a row share the error of its log-sum-exp.
    Judge(draw, draws=40).check(_graded(sdpa, args, kwargs, dtype), what)


def _flash(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """torch's function where it takes its flash kernel, which has four dimensions.

    Its kernel for three keeps P for the backward; all others, ours too, compute it from a
    log-sum-exp rounded to float32: with logits of 200 gradients are 3 to 10 times as far off.
    """
    if q.ndim > 3:
        return F.scaled_dot_product_attention(q, k, v, **kwargs)
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].ndim == 3:
        kwargs["attn_mask"] = kwargs["attn_mask"][:, None]
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], **kwargs)
    return out[:, 0]


def _shuffled(x: Tensor, seed: int) -> Tensor:
    if seed == 0:
        return x
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))
    return x.flatten()[order].view(x.shape)


def test_the_signature_is_torchs() -> None:
    doc = " ".join((F.scaled_dot_product_attention.__doc__ or "").split())
    parameters = inspect.signature(sdpa).parameters.values()
    said = ", ".join(
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in parameters
    )
    assert doc.startswith(f"scaled_dot_product_attention({said})")
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["scale", "enable_gqa"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sample_inputs_of_torchs_op_database(dtype: torch.dtype) -> None:
    database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    info = next(op for op in database if op.name == "nn.functional.scaled_dot_product_attention")
    count = 0
    for i, sample in enumerate(info.sample_inputs("cpu", torch.float32, requires_grad=False)):
        if sample.kwargs.get("dropout_p", 0.0):
            torch.manual_seed(0)
            want = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
            torch.manual_seed(0)
            assert torch.equal(sdpa(sample.input, *sample.args, **sample.kwargs), want)
            continue
        check((sample.input, *sample.args), sample.kwargs, dtype, f"sample {i}")
        count += 1
    assert count >= 10


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "causal, fewer queries than keys": ((2, 4, 5, 16), (2, 4, 9, 16), {"is_causal": True}),
    "causal, more queries than keys": ((2, 4, 9, 16), (2, 4, 5, 16), {"is_causal": True}),
    "grouped": ((2, 6, 7, 24), (2, 2, 7, 24), {"enable_gqa": True, "is_causal": True}),
    "five dimensions": ((2, 3, 4, 7, 16), (2, 3, 4, 8, 16), {}),
    "three dimensions": ((3, 7, 16), (3, 8, 16), {"is_causal": True}),
    "a head dim of no multiple of 8": ((1, 2, 7, 13), (1, 2, 8, 13), {"scale": 0.7}),
    "one query": ((2, 2, 1, 64), (2, 2, 70, 64), {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    q, kv, kwargs = LAYOUTS[name]
    check((random(q, 1), random(kv, 2), random(kv, 3)), kwargs, torch.float32, name)


def test_values_wider_than_keys() -> None:
    args = random((1, 2, 5, 16), 1), random((1, 2, 6, 16), 2), random((1, 2, 6, 40), 3)
    check(args, {}, torch.float32, "value dim 40")


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 1, 1, 9), (1, 9), (2, 1, 7, 9)], ids=str)
def test_padding_masks_are_served_by_our_kernel(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.tensor([True] * 6 + [False] * 3).expand(shape)
    if shape == (2, 1, 1, 9):
        mask = torch.stack([mask[0], mask[0].flip(-1)])
    args = random((2, 3, 7, 16), 1), random((2, 3, 9, 16), 2), random((2, 3, 9, 16), 3)
    check(args, {"attn_mask": mask}, torch.float32, str(shape))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    sdpa(*args, attn_mask=mask)


def test_a_mask_of_its_own_for_each_query_is_torchs() -> None:
    args = random((2, 3, 7, 16), 1), random((2, 3, 9, 16), 2), random((2, 3, 9, 16), 3)
    mask = torch.rand(7, 9) < 0.8
    assert torch.equal(
        sdpa(*args, attn_mask=mask), F.scaled_dot_product_attention(*args, attn_mask=mask)
    )
    bias = random((3, 7, 9), 4)
    assert torch.equal(
        sdpa(*args, attn_mask=bias), F.scaled_dot_product_attention(*args, attn_mask=bias)
    )


BAD = {
    "a mask of another length": (((1, 1, 4, 8),) * 3, {"attn_mask": torch.ones(4, 5).bool()}),
    "other head dim": (((1, 1, 4, 8), (1, 1, 4, 16), (1, 1, 4, 8)), {}),
    "two dimensions too few": (((8,), (8,), (8,)), {}),
    "heads that do not divide": (
        ((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), {"enable_gqa": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_torch_refuses_is_refused_with_torchs_error(name: str) -> None:
    shapes, kwargs = BAD[name]
    args = [random(shape, i) for i, shape in enumerate(shapes)]
    with pytest.raises(Exception) as theirs:
        F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        sdpa(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_gives_the_dtype_of_torchs(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 16).to(dtype).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v)
        mixed = sdpa(q, k.bfloat16(), v) if dtype != torch.float64 else got
    assert got.dtype == want.dtype == mixed.dtype
    torch.testing.assert_close(got, want)
    assert torch.equal(got, mixed)


def test_torchs_own_serves_what_torch_func_differentiates() -> None:
    x = torch.randn(2, 3, 5, 16)
    for transform in (torch.func.grad, torch.func.vmap):
        got, want = (
            transform(lambda y, f=f: f(y, y, y, is_causal=True).sum())(x)
            for f in (sdpa, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor(True),
        torch.tensor([True, False])[:, None, None, None],
        torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).lt(0.6).t()[:, None, None],
    ],
    ids=["scalar", "sequences", "transposed"],
)
def test_any_strides_of_a_padding_mask_are_served(
    mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPS["attention"], "ref", None)
    q, k, v = torch.randn(3, 2, 3, 5, 16).unbind()
    tidy = mask.expand(2, 1, 1, 5).contiguous()
    assert torch.equal(sdpa(q, k, v, mask), sdpa(q, k, v, tidy))

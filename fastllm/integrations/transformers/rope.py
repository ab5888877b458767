"""Rotary embeddings of attention layers on our kernel, without copies of the queries and keys.

An attention layer of transformers calls `apply_rotary_pos_emb`, a global of its own file. The layer
gets the same forward with another function behind that name, see `swap.rebind`; the file itself is
not touched. How its function pairs the columns, and in which dtype it returns them, is found by
running it on small inputs; a function that fits nothing stays.

`cos` and `sin` come once per forward of the model and are the same in every layer, so what the
kernel reads of them, one half in float32, is made once and kept with the tensor `cos`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ...ops import rope
from ...ops.registry import is_transformed
from .parts import Offer
from .probe import agrees, answer, coarsest, normal, stand_in
from .swap import rebind, swap

NAME = "rope"
_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEPT = "fastllm_rows"  # attribute of a tensor `cos`: what was made of it


class Rotation(NamedTuple):
    """How a function rotates.

    repeated: cos and sin hold every angle twice, in two equal halves, else once. interleaved: the
    columns of a pair are neighbours, and lie in two halves in the result. results: (dtype of the
    queries, of cos) and the dtype of the result, for each pair that the kernel serves.
    """

    repeated: bool
    interleaved: bool
    results: tuple[tuple[tuple[torch.dtype, torch.dtype], torch.dtype], ...]


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """Whether `module` is an attention layer whose rotary embedding `ops.rope` computes."""
    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    called = [n for n in names if n.startswith("apply_") and "rot" in n]
    if not called:
        return None
    functions = {n: forward.__globals__.get(n) for n in called}
    unknown = [n for n, f in functions.items() if n not in _FUNCTIONS or not callable(f)]
    if unknown:
        return Offer(reason=f"it rotates by {unknown[0]}, which has no kernel")
    if hasattr(forward, "__wrapped__"):
        return Offer(reason="its forward is wrapped by a decorator")
    rotations = {n: rotation_of(f) for n, f in functions.items() if f is not None}
    other = [n for n, rotation in rotations.items() if rotation is None]
    if other:
        return Offer(reason=f"its {other[0]} pairs the columns in another way")
    if any(rotation and rotation.repeated for rotation in rotations.values()):
        reason = _halves_differ(model, forward.__globals__["__name__"])
        if reason:
            return Offer(reason=reason)
    bound = _bound(forward, tuple(rotations.items()))
    return Offer(replaced=True, install=functools.partial(swap, module, NAME, bound))


@functools.cache
def rotation_of(function: Callable[..., Any]) -> Rotation | None:
    """How `function(q, k, cos, sin)` rotates; None: in a way that `ops.rope` does not know."""
    for repeated, interleaved in ((True, False), (True, True), (False, False)):
        results = []
        for pair in [(q, cos) for q in _DTYPES for cos in _DTYPES]:
            arguments, exact = _problem(repeated, interleaved, *pair)
            found = answer(function, *arguments)
            if not isinstance(found, tuple) or len(found) != 2:
                continue
            dtype = coarsest(*pair, found[0].dtype)
            if all(agrees(y, right, dtype) for y, right in zip(found, exact, strict=True)):
                results.append((pair, found[0].dtype))
        if results and results[0][0] == (torch.float32, torch.float32):  # shows small differences
            return Rotation(repeated, interleaved, tuple(results))
    return None


def _problem(
    repeated: bool, interleaved: bool, q_dtype: torch.dtype, cos_dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(q, k, cos, sin) of two sequences and what they become, in float64."""
    q, k = (normal(2, heads, 3, 8, seed=heads).to(q_dtype) for heads in (4, 2))
    angle = normal(2, 3, 4, seed=1)
    cos, sin = angle.cos().to(cos_dtype), angle.sin().to(cos_dtype)
    c, s = cos.double()[:, None], sin.double()[:, None]

    def rotated(x: Tensor) -> Tensor:
        x = (halves_of_pairs(x) if interleaved else x).double()
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    if repeated:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    return (q, k, cos, sin), (rotated(q), rotated(k))


def _halves_differ(model: nn.Module, file: str) -> str:
    """Why the tables of the rotary embeddings defined in `file` cannot be used; "" if they can."""
    found = [
        module
        for module in model.modules()
        if type(module).__module__ == file and "Rotary" in type(module).__name__
    ]
    if not found:
        return "the model has no rotary embedding whose tables could be tried"
    for module in found:
        for layer_type in getattr(module, "layer_types", None) or (None,):
            tables = _tables_of(module, layer_type)
            if not isinstance(tables, tuple) or len(tables) != 2:
                return f"{type(module).__name__} does not give cos and sin of positions"
            for table in tables:
                if table.is_meta:
                    return "on the meta device: load its weights first"
                first, second = table.chunk(2, dim=-1)
                if not torch.equal(first, second):
                    return f"the two halves of the tables of {type(module).__name__} differ"
    return ""


def _tables_of(module: nn.Module, layer_type: str | None) -> Any:
    """cos and sin of a few positions by a copy of a rotary embedding, which may keep state."""
    buffers = {name: b.clone() for name, b in module._buffers.items() if b is not None}
    device = next((b.device for b in buffers.values()), torch.device("cpu"))
    x = torch.zeros(1, device=device, dtype=torch.float32)
    positions = torch.tensor([[0, 1, 5, 7]], device=device)
    more = () if layer_type is None else (layer_type,)
    return answer(type(module).forward, stand_in(module, **buffers), x, positions, *more)


def halves_of_pairs(x: Tensor) -> Tensor:
    """`x` `[..., 2 n]` with its even columns first, then its odd ones, contiguous."""
    return x.view(*x.shape[:-1], x.shape[-1] // 2, 2).mT.flatten(-2)


@functools.cache
def _bound(
    forward: Callable[..., Any], rotations: tuple[tuple[str, Rotation], ...]
) -> Callable[..., Any]:
    """`forward` with our functions behind the names; one for all layers of a class."""
    own = forward.__globals__  # type: ignore[attr-defined]
    return rebind(forward, {name: rotate_with(how, own[name]) for name, how in rotations})


@functools.cache
def rotate_with(rotation: Rotation, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function (q, k, cos, sin) that rotates like `theirs`, which serves what the kernel cannot.

    q and k are `[B, H, S, D]`, in any strides with contiguous columns; cos and sin `[B, S, R]`, or
    `[1, S, R]` for all sequences. The results are views of `[B, S, H, D]`.
    """
    known = dict(rotation.results)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        out = None if rest or named else known.get((q.dtype, cos.dtype))
        if out is None or not _fits(q, k) or is_transformed():
            return theirs(q, k, cos, sin, *rest, **named)
        batch, _, tokens, _ = q.shape
        rows = _rows(cos, sin, rotation.repeated, batch, tokens)
        if rows is None:
            return theirs(q, k, cos, sin)
        if out is not q.dtype:
            q, k = q.to(out), k.to(out)
        return _rotated(q, rotation.interleaved, *rows), _rotated(k, rotation.interleaved, *rows)

    return rotate


def _fits(q: Tensor, k: Tensor) -> bool:
    """Whether q and k are plain tensors `[B, H, S, D]` that share B, S and a dtype."""
    return (
        type(q) is Tensor
        and type(k) is Tensor
        and q.ndim == k.ndim == 4
        and k.dtype == q.dtype
        and k.shape[0] == q.shape[0]
        and k.shape[2] == q.shape[2]
    )


def _rows(
    cos: Tensor, sin: Tensor, repeated: bool, batch: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The row of each token and the float32 tables of the angles, as `ops.rope` takes them.

    None where cos and sin are not tables of that many sequences and tokens, or want a gradient.
    """
    # An inference tensor does not count its changes, and a CUDA graph changes it without us.
    capturing = cos.is_cuda and torch.cuda.is_current_stream_capturing()
    if is_compiling() or cos.is_inference() or capturing:
        return _new_rows(cos, sin, repeated, batch, tokens)
    key = (cos._version, sin._version, id(sin), batch, tokens)
    kept = getattr(cos, _KEPT, None)
    if kept is None or kept[0] != key:
        # `sin` is kept too: its id stays its own.
        kept = (key, sin, _new_rows(cos, sin, repeated, batch, tokens))
        setattr(cos, _KEPT, kept)
    rows: tuple[Tensor, Tensor, Tensor] | None = kept[2]
    return rows


def _new_rows(
    cos: Tensor, sin: Tensor, repeated: bool, batch: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    plain = type(cos) is Tensor and type(sin) is Tensor and sin.dtype == cos.dtype
    fits = cos.ndim == 3 and sin.shape == cos.shape and cos.shape[1] == tokens
    if not (plain and fits and cos.shape[0] in (1, batch)):
        return None
    if cos.requires_grad or sin.requires_grad:
        return None
    sequences, _, columns = cos.shape
    half = columns // 2 if repeated else columns
    tables = [t[..., :half].reshape(-1, half).float().contiguous() for t in (cos, sin)]
    rows = torch.arange(sequences * tokens, dtype=torch.int32, device=cos.device)
    return rows if sequences == batch else rows.repeat(batch), tables[0], tables[1]


def _rotated(x: Tensor, interleaved: bool, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[B, H, S, D]` rotated, in the same shape: a view of `[B, S, H, D]`."""
    batch, heads, tokens, columns = x.shape
    x = x.squeeze(2) if tokens == 1 else x.transpose(1, 2).flatten(0, 1)  # [B * S, H, D]
    y = rope(halves_of_pairs(x) if interleaved else x, rows, cos, sin, check_values=False)
    if tokens == 1:  # a decode step: one view each way
        return y.unsqueeze(2)
    return y.view(batch, tokens, heads, columns).transpose(1, 2)

"""A mask that says what is hidden instead of holding `[B, 1, Tq, Tk]` booleans.

Our attention reads the description. To everybody else it is the boolean tensor that transformers
would have made: the first operation on it (a slice, a sum, a move) works on that tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


class LazyMask(Tensor):
    """True where query i of a sequence sees key j, `[B, 1, Tq, Tk]` bool.

    Query i stands at key position `offset + i`.

    Attributes:
        held: what `kind` says. kind "keys": bool `[B, Tk]`, False hides a key from all queries.
            kind "documents": int32 `[n + 1]`, where the packed documents begin in the flattened
            `[B * Tq]` tokens, and the end; a token sees its own document only. kind "": empty.
        offset: key position of query 0; can be negative or past the keys.
        left: keys before its own position that a query sees; -1 is all.
        right: the same after it; 0 is causal attention.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    held: Tensor
    kind: str
    offset: int
    left: int
    right: int

    @staticmethod
    def __new__(
        cls, data: Tensor, size: tuple[int, ...], kind: str, offset: int, left: int, right: int
    ) -> LazyMask:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, dtype=torch.bool, device=data.device
        )

    def __init__(
        self, data: Tensor, size: tuple[int, ...], kind: str, offset: int, left: int, right: int
    ) -> None:
        self.held = data
        self.kind, self.offset, self.left, self.right = kind, offset, left, right
        self._dense: Tensor | None = None
        self._lent = False  # somebody may hold a view of it, or has written into it

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["held"], (self.kind, self.offset, self.left, self.right)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Any, ...], size: Any, stride: Any
    ) -> LazyMask:
        return LazyMask(inner["held"], size, *context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # checkpointing detaches what it passes on
            return args[0].again()
        if func.is_view or func._schema.is_mutable:
            _pytree.tree_map_only_(LazyMask, LazyMask._lend, (args, kwargs or {}))
        args, kwargs = _pytree.tree_map_only(LazyMask, LazyMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"LazyMask({tuple(self.shape)}, kind={self.kind!r}, offset={self.offset}, "
            f"left={self.left}, right={self.right})"
        )

    def again(self) -> LazyMask:
        """The same description as another tensor."""
        size = tuple(self.shape)
        new = LazyMask(self.held, size, self.kind, self.offset, self.left, self.right)
        new._dense, new._lent = self._dense, self._lent
        return new

    def dense(self) -> Tensor:
        """The booleans `[B, 1, Tq, Tk]` themselves; made once."""
        if torch.compiler.is_compiling():
            return self._spelled_out()
        if self._dense is None:
            self._dense = self._spelled_out()
        return self._dense

    def overwritten(self) -> bool:
        """Whether somebody has written into the booleans: they hold then, not the description."""
        if not self._lent or self._dense is None:
            return False
        return not torch.equal(self._dense, self._spelled_out())

    def _lend(self) -> LazyMask:
        self._lent = True
        return self

    def _spelled_out(self) -> Tensor:
        batch, _, queries, keys = self.shape
        device = self.held.device
        position = torch.arange(queries, device=device)[:, None] + self.offset
        distance = torch.arange(keys, device=device) - position  # [Tq, Tk]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left >= 0:
            seen = seen & (distance >= -self.left)
        if self.right >= 0:
            seen = seen & (distance <= self.right)
        seen = seen[None, None]
        if self.kind == "keys":
            seen = seen & self.held[:, None, None, :]
        elif self.kind == "documents":
            tokens = torch.arange(batch * queries, device=device, dtype=torch.int32)
            document = torch.searchsorted(self.held, tokens, right=True).view(batch, 1, -1)
            seen = seen & (document[..., :, None] == document[..., None, :])
        return seen.expand(batch, 1, queries, keys)

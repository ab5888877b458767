"""A mixture of experts in place of an MLP: each token passes through a few of many gated MLPs.

    gate = router(x);   y = sum over a token's slots of weight * expert(x)  (+ shared MLP of x)

Nothing is dropped and no expert has a capacity. Experts lie in two tensors a layer; like linears
they are parameters, or packed weights alone, or both, and all forms give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from fastllm.nn.linear import Linear
from fastllm.nn.mlp import MLP
from fastllm.nn.routing import Routing
from fastllm.ops.moe import moe
from fastllm.ops.moe_gate import Gate, moe_gate
from fastllm.ops.moe_route import moe_route
from fastllm.ops.quant_moe import quant_moe
from fastllm.quantize.packed_experts import PackedExperts, pack_experts, repack_


class Balance(Protocol):
    """What watches a layer's router while it is trained."""

    def record(self, gate: Gate) -> Tensor:
        """Take note of a forward pass; returns `gate.topk_weights`, to which losses that depend on
        the router may be attached. Runs again where layers are computed again in the backward.
        """


class Exchange(Protocol):
    """What brings tokens to the experts of other processes, and their outputs back."""

    def combine(
        self, experts: Experts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """The sum over the experts of all processes, float32 [T, hidden]."""


class Router(Linear):
    """Scores every expert for every token and takes the best; logits are float32.

    bias_correction: a float32 buffer, added to the scores for the choice and not to the weights
    (2408.15664). It is no parameter: its owner moves it in place.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self, hidden: int, experts: int, routing: Routing, *, bias_correction: bool = False,
        activation: str = "bf16",
    ) -> None:  # fmt: skip
        super().__init__(hidden, experts, False, activation)
        self.routing = routing
        bias = torch.empty(experts, device="meta") if bias_correction else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves take the bias along; casts leave it float32, with all its bits."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def choose(self, x: Tensor) -> Gate:
        """x [T, hidden] -> ids and weights [T, k] of the chosen experts, and statistics."""
        bias, rule = self.e_score_correction_bias, self.routing
        return moe_gate(self(x, torch.float32), rule.per_token, bias=bias, **rule.options)

    def route(self, x: Tensor) -> tuple[Gate, tuple[Tensor, Tensor]]:
        """`choose`, and the sorted slots (offsets, slots) of all experts."""
        return self.assign(self(x, torch.float32))

    def assign(self, logits: Tensor) -> tuple[Gate, tuple[Tensor, Tensor]]:
        """What `route` makes of its logits, float32 [T, experts]."""
        bias, rule = self.e_score_correction_bias, self.routing
        return moe_route(logits, rule.per_token, bias=bias, **rule.options)


class Experts(nn.Module):
    """The experts of a layer: down(silu(gate(x)) * up(x)) each.

    `gate_up_proj` is [count, 2 * inner, hidden], the rows of gate first; `down_proj` is
    [count, hidden, inner]. first: these are the experts `first` to `first + count` of more, and
    results hold their contributions alone; None: these are all.
    """

    def __init__(
        self, count: int, hidden: int, inner: int, *, first: int | None = None,
        activation: str = "bf16",
    ) -> None:  # fmt: skip
        super().__init__()
        self.count, self.hidden, self.inner, self.first = count, hidden, inner, first
        self.activation = activation
        self.gate_up_proj: nn.Parameter | None = _empty(count, 2 * inner, hidden)
        self.down_proj: nn.Parameter | None = _empty(count, hidden, inner)
        self.packed_gate_up: PackedExperts | None = None
        self.packed_down: PackedExperts | None = None

    def pack_(self) -> None:
        """Make the packed caches from the parameters; those that are there are written in place."""
        if self.gate_up_proj is None or self.down_proj is None:
            raise ValueError("these experts are packed alone: there is nothing to pack")
        self.packed_gate_up = pack_parameters(self.gate_up_proj, self.packed_gate_up)
        self.packed_down = pack_parameters(self.down_proj, self.packed_down)

    def packed(self, name: str) -> PackedExperts | None:
        """What is packed of "gate_up_proj" or "down_proj"."""
        return {"gate_up_proj": self.packed_gate_up, "down_proj": self.packed_down}[name]

    def packs(self) -> Iterator[PackedExperts]:
        """The packed weights that there are."""
        for packed in (self.packed_gate_up, self.packed_down):
            if packed is not None:
                yield packed

    def forward(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, base: Tensor | None = None,
        out_dtype: torch.dtype | None = None, dispatch: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Weighted sum of the chosen experts' outputs, and of `base` where it is given.

        Args:
            x: `[T, hidden]` in the compute dtype.
            topk_ids: `[T, k]` int32; experts outside the slice, and -1, contribute nothing.
            topk_weights: `[T, k]` float32.
            base: `[T, hidden]`, float32 or the compute dtype, added before the one rounding.
            out_dtype: default the dtype of `x`; float32 to add the parts of other slices.
            dispatch: the sorted slots of `topk_ids`, where they are known.

        Returns:
            `[T, hidden]` in `out_dtype`.
        """
        gate_up, down = self.packed_gate_up, self.packed_down
        if gate_up is not None and down is not None and not self._records(x, topk_weights, base):
            return quant_moe(
                x, gate_up.parts, down.parts, self.inner, topk_ids, topk_weights, base=base,
                mode=self.activation, first_expert=self.first, dispatch=dispatch,
                out_dtype=out_dtype,
            )  # fmt: skip
        assert self.gate_up_proj is not None and self.down_proj is not None, "a loader sets them"
        return moe(
            x, local(self.gate_up_proj), local(self.down_proj), topk_ids, topk_weights, base=base,
            first_expert=self.first, dispatch=dispatch, out_dtype=out_dtype,
        )  # fmt: skip

    def _records(self, *inputs: Tensor | None) -> bool:
        """Whether autograd records the products, which it does in the plain form."""
        tensors = (*inputs, self.gate_up_proj, self.down_proj)
        return (
            self.gate_up_proj is not None
            and torch.is_grad_enabled()
            and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        )

    def extra_repr(self) -> str:
        return f"{self.count}, hidden={self.hidden}, inner={self.inner}"


class MoE(nn.Module):
    """Router, experts and, where `shared_inner` is not 0, an MLP for all tokens.

    `balance`: set by whoever trains the model and wants to see or steer the load of the experts;
    it is asked where gradients are recorded. `exchange`: set where other processes hold the rest of
    the experts.
    """

    def __init__(
        self, hidden: int, inner: int, experts: int, routing: Routing, *, shared_inner: int = 0,
        bias_correction: bool = False, bias: bool = False, activation: str = "bf16",
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate = Router(
            hidden, experts, routing, bias_correction=bias_correction, activation=activation
        )
        self.experts = Experts(experts, hidden, inner, activation=activation)
        self.shared_experts: MLP | None = None
        if shared_inner:
            self.shared_experts = MLP(hidden, shared_inner, bias=bias, activation=activation)
        self.balance: Balance | None = None
        self.exchange: Exchange | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        base = None if self.shared_experts is None else self.shared_experts(x)
        if self.exchange is None:
            gate, dispatch = self.gate.route(x)
            weights = self._observed(gate)
            return self.experts(x, gate.topk_ids, weights, base, dispatch=dispatch)
        gate = self.gate.choose(x)
        y = self.exchange.combine(self.experts, x, gate.topk_ids, self._observed(gate))
        return (y if base is None else y + base).to(x.dtype)

    def _observed(self, gate: Gate) -> Tensor:
        """The weights of the chosen experts, where a gradient is recorded past `balance`."""
        if self.balance is None or not torch.is_grad_enabled():
            return gate.topk_weights
        return self.balance.record(gate)


def local(weight: Tensor) -> Tensor:
    """What this process holds of a weight: all of it, or its slice of the experts."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor  # 519 modules, 0.4 s, which generation never needs

    return weight.to_local() if isinstance(weight, DTensor) else weight


def pack_parameters(weight: Tensor, cache: PackedExperts | None = None) -> PackedExperts:
    """Pack a [count, out, in] float32 or bfloat16 tensor for its own device.

    cache: an earlier pack, which is written in place and returned if it fits.
    """
    format = "f32" if weight.dtype == torch.float32 else "bf16"
    if cache is not None and (cache.format, cache.experts, cache.n, cache.k, cache.device) == (
        format, *weight.shape, weight.device,
    ):  # fmt: skip
        repack_(cache, weight.detach())
        return cache
    return pack_experts(format, weight.detach(), weight.device)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

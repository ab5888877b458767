"""The loss of causal language models without their logits: `fastllm.ops.linear_cross_entropy`.

In training with labels, the model's forward hands the hidden states and `lm_head.weight` to one op
that never holds `[tokens, vocab]`; the output's `logits` is then None, as with other fused losses.
Everything else runs the class's own forward: evaluation, generation, calls without labels or with
`logits_to_keep`, a loss function of the user's own, a head that is no plain `nn.Linear`.
`model(..., skip_logits=False)` asks for logits in training, `skip_logits=True` for none in
evaluation.

A class is known by what the code of its forward reads, not by its name: a class that scales its
logits, say, reads one name more and is left alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.registry import is_transformed

from .parts import Offer, hooked
from .swap import original, swap

NAME = "loss"
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """A kind of forward: what its code reads, and what of it the loss needs.

    names: attributes and globals. arguments: in their order. output: the class of the result.
    """

    names: frozenset[str]
    arguments: tuple[str, ...]
    output: type
    softcap: bool = False
    routers: bool = False  # the result holds the routers' logits
    balance: bool = False  # and the loss of the routers' balance is added


_ARGUMENTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "use_cache",
)  # fmt: skip
_PLAIN = {
    "model", "last_hidden_state", "lm_head", "loss_function", "config", "vocab_size",
    "past_key_values", "hidden_states", "attentions",
}  # fmt: skip
_BALANCE = {
    "output_router_logits", "load_balancing_loss_func", "num_experts", "num_experts_per_tok",
    "router_aux_loss_coef", "router_logits", "to", "device",
}  # fmt: skip
# How the positions to keep are cut out: nothing else than `logits_to_keep` depends on it.
_SLICING = {"slice_logits_to_keep", "isinstance", "int", "slice"}


def _shape(more: set[str], output: type, *arguments: str, **flags: bool) -> Shape:
    names = frozenset(_PLAIN | more | {output.__name__})
    return Shape(names, (*_ARGUMENTS, *arguments, "logits_to_keep"), output, **flags)


SHAPES = (
    _shape(set(), CausalLMOutputWithPast),  # Llama, Mistral, Qwen2 and 3, Phi-3
    _shape({"final_logit_softcapping", "torch", "tanh"}, CausalLMOutputWithPast, softcap=True),
    _shape({"router_logits"}, MoeCausalLMOutputWithPast, routers=True),  # DeepSeek-V3
    _shape(
        _BALANCE, MoeCausalLMOutputWithPast, "output_router_logits", routers=True, balance=True
    ),  # Mixtral, Qwen3-MoE, OLMoE, GPT-OSS
)


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """The answer of this part (see `parts`): the fused loss for causal models of a known shape."""
    if not isinstance(module, PreTrainedModel) or not hasattr(module, "lm_head"):
        return None
    cls: Any = original(module)
    if shape_of(cls.forward) is None:
        return Offer(reason="its forward does more than body, head and loss, or other things")
    reason = head_refusal(module)
    if reason is None and not _own_loss(module):
        reason = "its loss_function is not transformers' loss of causal models"
    if reason is not None:
        return Offer(reason=reason)
    return Offer(
        replaced=True, install=lambda: swap(module, NAME, fused_forward(type(module).forward))
    )


def shape_of(forward: Callable[..., Any]) -> Shape | None:
    """The shape of a class's forward, or None if it is none of SHAPES."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return None
    names = set(code.co_names) - _SLICING
    numbers = [c for c in code.co_consts if type(c) in (int, float)]
    arguments = code.co_varnames[1 : code.co_argcount]
    for shape in SHAPES:
        if names == shape.names and arguments == shape.arguments and not numbers:
            return shape
    return None


def head_refusal(model: Any) -> str | None:
    """Why the op cannot take the place of `model.lm_head`, or None if it can."""
    head = model.lm_head
    if original(head) is not nn.Linear:
        return f"its lm_head is a {type(head).__module__}.{type(head).__name__}, no plain Linear"
    if "forward" in head.__dict__ or hooked(head):
        return "its lm_head has hooks or a forward of its own"
    weight = head.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"lm_head.weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in _DTYPES:
        return f"lm_head.weight is {weight.dtype}: the op takes float32 and bfloat16"
    vocab = getattr(model, "vocab_size", model.config.vocab_size)
    if not weight.shape[0] == vocab == model.config.vocab_size:
        return f"lm_head has {weight.shape[0]} outputs, the config a vocabulary of {vocab}"
    return None


def _own_loss(model: Any) -> bool:
    return model.loss_function is ForCausalLMLoss


@functools.cache
def fused_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a known shape, with the fused loss where a call allows it.

    The result has the signature of `forward`, by which trainers choose what to hand over.
    """
    shape = shape_of(forward)
    assert shape is not None, "offer has found it"

    @functools.wraps(forward)
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip = kwargs.pop("skip_logits", None)
        given = dict(zip(shape.arguments, args, strict=False))
        clear = len(args) <= len(shape.arguments) and not given.keys() & kwargs.keys()
        given.update(kwargs)
        wanted = self.training if skip is None else skip
        if wanted and clear and _allows(self, given):
            return _run(shape, forward, self, given)
        return forward(self, *args, **kwargs)

    return fused


def _allows(model: Any, given: dict[str, Any]) -> bool:
    """Whether a call wants a loss and nothing else that needs logits."""
    keep = given.get("logits_to_keep", 0)
    return (
        given.get("labels") is not None
        and isinstance(keep, int)
        and keep == 0
        and given.get("return_dict") in (None, True)
        and model.config.return_dict
        and not given.get("label_smoothing")
        and _own_loss(model)
        and not is_transformed()
        and head_refusal(model) is None
        and _autocast_dtype(model.lm_head.weight) in _DTYPES
    )


def _autocast_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the head's product would run."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _run(shape: Shape, forward: Callable[..., Any], model: Any, given: dict[str, Any]) -> Any:
    """A forward of `shape` with the loss in one op; `given`: the call's arguments by name."""
    passed = {k: v for k, v in given.items() if k not in _NOT_FOR_THE_BODY}
    if shape.balance and passed.get("output_router_logits") is None:
        passed["output_router_logits"] = model.config.output_router_logits
    outputs = model.model(**passed)
    softcap = model.config.final_logit_softcapping if shape.softcap else None
    loss = causal_loss(outputs.last_hidden_state, model.lm_head, softcap=softcap or 0.0, **given)
    more: dict[str, Any] = {"router_logits": outputs.router_logits} if shape.routers else {}
    if shape.balance and passed["output_router_logits"]:
        balance = inspect.unwrap(forward).__globals__["load_balancing_loss_func"]
        more["aux_loss"] = balance(
            outputs.router_logits,
            model.num_experts,
            model.num_experts_per_tok,
            given.get("attention_mask"),
        )
        loss = loss + model.router_aux_loss_coef * more["aux_loss"].to(loss.device)
    return shape.output(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        **more,
    )


_NOT_FOR_THE_BODY = ("labels", "logits_to_keep", "return_dict")


def causal_loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    softcap: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' loss of causal models, of hidden states instead of logits.

    Args:
        hidden: `[B, T, H]`, float32 or bfloat16.
        head: from hidden states to logits.
        labels: `[B, T]`, the ids of `hidden`'s own positions; each predicts the next one.
        softcap: of the logits; 0: none.
        num_items_in_batch: what the sum is divided by; None: how many labels count.
        ignore_index: the label of positions that do not count.
        shift_labels: `[B, T]`, the ids that the positions predict, in place of `labels`.

    Returns:
        float32 scalar.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    dtype = _autocast_dtype(head.weight)
    x, weight = hidden, head.weight
    if torch.is_autocast_enabled(weight.device.type):
        x, weight = x.to(dtype), weight.to(dtype)
    loss = linear_cross_entropy(
        x,
        weight,
        shift_labels.reshape(hidden.shape[:-1]).to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=softcap,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch

"""TRL's fused LM head on our op.

TRL's trainers give the model a forward that scores labels without whole logits, `fused_lm_head`. On
a GPU it is a Triton kernel; on a CPU plain PyTorch over every position. `fuse_head` leaves that
forward as it is and lets it call `linear_logprob` instead, for the labelled positions alone.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.integrations.live_model import base_model
from fastllm.integrations.transformers.swap import with_globals
from fastllm.nn.quantized_values import QuantizedValues
from fastllm.ops.linear import linear
from fastllm.ops.linear_logprob import linear_logprob

_SCORES = "_ChunkedLogProbFunction"  # the globals of TRL's forward that are replaced in its copy
_COMPACT = "_use_triton"
_MADE = ("log_probs", "entropy", "mean_logits", "is_top1")  # of TRL's outputs, what we compute
_ROWS_AT_ONCE = 256  # whose logits are in memory together, where the most probable token is asked


def fuse_head(trainer: Any) -> int:
    """Let a TRL trainer score its models' LM heads by our op.

    For SFT, DPO, KTO, GRPO and RLOO trainers of TRL 1.16, called once after the trainer is made.
    Losses and metrics stay the same. Nothing of TRL's modules changes: each model's forward is a
    copy of TRL's with two other functions. Idempotent; `unfuse_head` takes it back.

    Returns:
        how many models (the policy and a reference) have our head now.

    Raises:
        ValueError: if no model of the trainer has TRL's fused head.
    """
    models = [base for base in _models(trainer) if _fused(base) is not None]
    if not models:
        raise ValueError(
            f"{type(trainer).__name__} has no model with TRL's fused head: call fuse_head on an "
            "SFT, DPO, KTO, GRPO or RLOO trainer of TRL 1.16, before training"
        )
    for base in models:
        method = _fused(base)
        assert method is not None, "chosen for it"
        if not hasattr(method, "fastllm_original"):
            base.forward = types.MethodType(_copy(method), base)  # type: ignore[method-assign]
    return len(models)


def unfuse_head(trainer: Any) -> None:
    """Give a trainer's models TRL's own head again."""
    for base in _models(trainer):
        original = getattr(_fused(base), "fastllm_original", None)
        if original is not None:
            base.forward = types.MethodType(original, base)  # type: ignore[method-assign]


def _models(trainer: Any) -> list[nn.Module]:
    found = (getattr(trainer, name, None) for name in ("model", "ref_model"))
    return [base_model(model) for model in found if isinstance(model, nn.Module)]


def _fused(base: nn.Module) -> types.FunctionType | None:
    """TRL's forward of a model, ours included; None: the model has its class's own."""
    method = vars(base).get("forward")
    function = getattr(method, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return None
    there = _SCORES in function.__globals__ and _SCORES in function.__code__.co_names
    return function if there else None


def _copy(original: types.FunctionType) -> types.FunctionType:
    """TRL's forward, which finds our functions under the names of two of its own."""
    theirs = original.__globals__[_SCORES]
    scores = type("Scores", (), {"apply": staticmethod(_scores_or(theirs.apply))})
    made = with_globals(original, {_SCORES: scores, _COMPACT: lambda device: True})
    made.__dict__["fastllm_original"] = original
    return made


def _scores_or(theirs: Any) -> Any:
    """What TRL calls with labelled rows; other dtypes and outputs than ours go to `theirs`."""

    def apply(
        x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float,
        chunk: int, softcap: float | None, scale: float, outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        cap = softcap or 0.0
        if (
            x.dtype not in (torch.float32, torch.bfloat16)
            or weight.dtype != x.dtype
            or any(name not in _MADE for name in outputs)
            or (cap and (scale != 1.0 or "mean_logits" in outputs))
        ):
            return theirs(x, weight, bias, labels, temperature, chunk, softcap, scale, outputs)
        temperature = temperature / scale
        head = weight.packed() if isinstance(weight, QuantizedValues) else weight
        log_probs, entropy = linear_logprob(
            x, head, labels, bias, temperature=temperature,
            softcap=cap, activation="fp32" if x.dtype == torch.float32 else "bf16",
        )  # fmt: skip
        if head is not weight and not {"mean_logits", "is_top1"}.isdisjoint(outputs):
            weight = weight.dequantize()
        mean = top = None
        with torch.no_grad():
            if "mean_logits" in outputs:
                mean = _mean_logits(x, weight, bias) / temperature
            if "is_top1" in outputs:
                top = _are_likeliest(x, weight, bias, labels)
        return log_probs, entropy if "entropy" in outputs else None, None, mean, top

    return apply


def _mean_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over the vocabulary of x W^T + b, float32 [T]: the product with the mean row."""
    mean = x.float() @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.float().mean()


def _are_likeliest(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Whether labels are the first of the largest logits, bool [T]; a softcap keeps their order."""
    found = [
        linear(rows, weight, bias, torch.float32).argmax(-1) for rows in x.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(found) == labels if found else labels.bool()

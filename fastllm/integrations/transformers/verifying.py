"""`verify`: is a patched model still the same model, and how much faster is it?

Both sides run in place, on the same weights.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import model_outputs
from .comparing import Pair, dtype_of, output_checks, token_checks
from .patching import OPS
from .sides import Sides, heads_training, undisturbed
from .verification import Speed, Verification

_ROUNDS = 5


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    ops: Sequence[str] = OPS,
    gradients: bool = True,
    tokens: int = 32,
    speed: bool = True,
    shape: tuple[int, int] = (2, 128),
    measure_own: bool | None = None,
) -> Verification:
    """Run `model` unpatched and patched side by side; the model is left exactly as it came.

    Compared are logits, loss, the gradient of every trainable parameter, and greedy tokens, on
    random ids with padding and on real inputs. Dropout is off.

    Args:
        model: a causal language model of transformers, or one wrapped by PEFT. If it is patched,
            it is compared as it is patched.
        inputs: a real batch: `input_ids` `[rows, length]`, and what else the model takes.
        texts: real inputs as texts, in place of `inputs`; needs `tokenizer`.
        tokenizer: a transformers tokenizer; alone it reads a few lines of prose and code.
        ops: what to replace, as in `patch`; of no account for a model that came patched.
        gradients: compare and time the backward too.
        tokens: how many to generate for each row; 0: none.
        speed: measure forward, forward and backward, and decode on both sides.
        shape: rows and length of the random batch, which is also what is timed.
        measure_own: make a float32 copy of a bfloat16 or float16 model to measure the unpatched
            model's own rounding error, and bound by it. None: if it fits into free memory. Without
            it the bound is 5% of the largest value (float16: 1%).

    Returns:
        a `Verification`: print it, ask `.ok`, or exit with `.exit_code`.

    Raises:
        ValueError: `texts` without `tokenizer`, texts and inputs together, an unknown op, a model
            patched in part or on the meta device, a shape below (1, 4).
        TypeError: `model` is no transformers model, and holds none.
    """
    batches = _batches(model, inputs, texts, tokenizer, shape)
    sides = Sides(model, ops)
    try:
        with undisturbed(model):
            sides.original()
            exact, notes = _float32_copy(model, measure_own)
            pair = Pair(model, exact, sides, gradients, shape)
            checks = output_checks(pair, batches)
            if tokens and model_outputs.generates(model):
                checks += token_checks(pair, batches, tokens, checks)
            speeds = _speeds(model, sides, shape, gradients, tokens) if speed else []
    finally:
        sides.close()
    return Verification(
        model=type(model).__name__,
        dtype=_name(dtype_of(model)),
        reference="its float32 copy" if exact is not None else "the unpatched model",
        report=sides.report,
        checks=tuple(checks),
        speeds=tuple(speeds),
        notes=tuple(notes),
    )


def _batches(
    model: Any, inputs: Mapping[str, Any] | None, texts: Sequence[str] | None, tokenizer: Any,
    shape: tuple[int, int],
) -> dict[str, model_outputs.Batch]:  # fmt: skip
    inside = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(module, PreTrainedModel) for module in inside):
        raise TypeError(f"model: a transformers model is needed, not {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: it is on the meta device; load its weights first")
    if shape[0] < 1 or shape[1] < 4:
        raise ValueError(f"shape: at least 1 row of 4 tokens is needed, not {shape}")
    if texts is not None and tokenizer is None:
        raise ValueError("texts: they need a tokenizer (tokenizer=AutoTokenizer...)")
    if inputs is not None and texts is not None:
        raise ValueError("texts: give either texts or inputs")
    batches: dict[str, model_outputs.Batch] = {
        "random": model_outputs.random_batch(model, *shape, padded=True)
    }
    if inputs is not None:
        if "input_ids" not in inputs:
            raise ValueError("inputs: input_ids are needed, as the model's forward takes them")
        batches["real"] = inputs
    elif tokenizer is not None:
        batches["real"] = model_outputs.text_batch(model, tokenizer, texts or model_outputs.TEXTS)
    return batches


def _float32_copy(model: Any, wanted: bool | None) -> tuple[Any, list[str]]:
    """A float32 copy of an unpatched model in fewer bits, and what there is to say about it."""
    if dtype_of(model) == torch.float32:
        return None, []
    if getattr(model, "is_quantized", False):
        return None, ["quantized weights have no float32 copy: the bound is a fixed share"]
    if wanted is False or (wanted is None and not _fits(model)):
        return None, ["no float32 copy was made: the bound is a fixed share"]
    return copy.deepcopy(model).float(), []


def _fits(model: nn.Module) -> bool:
    """Whether float32 weights and gradients take less than half of the free memory."""
    parameters = list(model.parameters())
    needed = 4 * sum(p.numel() * (2 if p.requires_grad else 1) for p in parameters)
    if parameters and parameters[0].is_cuda:
        return 2 * needed < torch.cuda.mem_get_info(parameters[0].device)[0]
    return 2 * needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _speeds(
    model: Any, sides: Sides, shape: tuple[int, int], gradients: bool, tokens: int
) -> list[Speed]:
    batch = model_outputs.random_batch(model, *shape, padded=False)
    prompt = model_outputs.random_batch(model, 1, 8, padded=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = f"{shape[0]} x {shape[1]}"

    @torch.no_grad()
    def forward() -> None:
        model(**batch)

    def step() -> None:
        with heads_training(model):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        torch.autograd.grad(loss, trained, allow_unused=True)

    calls: dict[str, Callable[[], object]] = {f"forward, {size}": forward}
    if gradients and trained and model_outputs.takes_labels(model):
        calls[f"forward+backward, {size}"] = step
    if tokens and model_outputs.generates(model):
        calls[f"{tokens} tokens, 1 row"] = lambda: model_outputs.greedy(model, prompt, tokens)
    return [_alternate(sides, what, call, batch["input_ids"]) for what, call in calls.items()]


def _alternate(sides: Sides, what: str, call: Callable[[], object], on: Tensor) -> Speed:
    """Medians of `_ROUNDS` calls on each side in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {"original": [], "patched": []}
    for index in range(_ROUNDS + 1):
        for name, switch in (("original", sides.original), ("patched", sides.patched)):
            switch()
            start = time.perf_counter()
            call()
            if on.is_cuda:
                torch.cuda.synchronize(on.device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Speed(what=what, **medians)

"""What a causal language model is asked so that two of its versions can be compared."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sides import heads_training

Batch = Mapping[str, Any]
IGNORED = -100  # a label without a loss

# Ordinary text for models that come with a tokenizer and users who give none: prose, numbers, code.
TEXTS = (
    "The river had risen in the night. By morning the lower road was gone, and the three men who "
    "had meant to cross it stood under the trees and counted what they had left to eat.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one side gives for one batch.

    logits: `[valid tokens, vocabulary]` float32. loss: None where the model has none. gradients: by
    name of the parameter, those that are None left out.
    """

    logits: Tensor
    loss: float | None
    gradients: dict[str, Tensor]


def random_batch(
    model: Any, rows: int, length: int, padded: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Random ids `[rows, length]`; `padded`: every second row is a quarter shorter, on the left."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1::2, : length // 4] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def text_batch(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """`texts` as ids, padded on the left; at most 512 tokens each."""
    if not texts or isinstance(texts, str):
        raise ValueError("texts: a list of at least one text is needed")
    rows = [tokenizer(text)["input_ids"][:512] for text in texts]
    width = max(map(len, rows))
    if not all(rows):
        raise ValueError("texts: one of them has no token")
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}


def takes_labels(model: Any) -> bool:
    """Whether the model, or the one that PEFT wrapped, computes a loss."""
    inside = getattr(model, "get_base_model", None)
    forward = model.forward if inside is None else inside().forward
    return "labels" in inspect.signature(forward).parameters


def generates(model: Any) -> bool:
    """Whether the model, or the one that it wraps, writes text."""
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can())


def labels_of(batch: Batch) -> Tensor:
    """The batch's labels, or its ids; padding is ignored, and so is a token that follows it.

    What a padded place predicts depends on how a row of attention without any key is defined, and
    implementations of attention in transformers differ in that.
    """
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != labels.shape:
        return labels
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
    return labels.masked_fill((mask == 0) | (before == 0), IGNORED)


def outputs(model: Any, batch: Batch, *, gradients: bool) -> Outputs:
    """Run a batch: logits without, loss and its gradients with a graph.

    The loss is that of training, which a patched head computes in its own way. Gradients are taken
    by `autograd.grad`: `.grad` of the parameters and hooks on it are not touched.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = _valid(_main(model(**inputs)), batch).float()
    if not takes_labels(model):
        return Outputs(logits, None, {})
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} if gradients else {}
    with torch.set_grad_enabled(bool(named)):
        with heads_training(model):
            loss = model(**inputs, labels=labels_of(batch), use_cache=False).loss
    found: Sequence[Tensor | None] = ()
    if named:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return Outputs(logits, float(loss.detach()), {n: g for n, g in pairs if g is not None})


def _main(out: Any) -> Tensor:
    """Logits, or what a model without a head gives first."""
    logits = getattr(out, "logits", None)
    found: Tensor = out[0] if logits is None else logits
    return found


def _valid(logits: Tensor, batch: Batch) -> Tensor:
    """Rows of tokens that are no padding: what a padded place gives is nobody's business."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:2]:
        return logits.flatten(0, -2)
    return logits[mask.bool()]


def greedy(model: Any, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """`count` greedy tokens after each row.

    Returns:
        ids `[rows, count]` and the scores they were chosen by, `[rows, count, vocabulary]` float32.
    """
    config = model.config.get_text_config()
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    prompt = _left_padded(batch)
    out = model.generate(
        **prompt,
        do_sample=False,
        num_beams=1,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=pad,
        output_scores=True,
        return_dict_in_generate=True,
    )
    start = prompt["input_ids"].shape[1]
    return out.sequences[:, start:], torch.stack(out.scores, dim=1).float()


def _left_padded(batch: Batch) -> dict[str, Tensor]:
    """Ids and mask, padding of the right side moved to the left, where `generate` wants it."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shifts = mask.flip(1).argmax(1).tolist()  # zeros behind the last valid token
    rows = [
        (row.roll(shift), one.roll(shift))
        for row, one, shift in zip(ids, mask, shifts, strict=True)
    ]
    return {
        "input_ids": torch.stack([row for row, _ in rows]),
        "attention_mask": torch.stack([one for _, one in rows]),
    }

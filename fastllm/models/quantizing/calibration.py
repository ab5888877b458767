"""Rows of token ids from calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastllm.models.tokenizer import Tokenizer


def calibration_rows(
    texts: Iterable[str], tokenizer: Tokenizer, samples: int, length: int
) -> Tensor:
    """Rows of `length` tokens, spread evenly over the text.

    Documents follow each other, each with the special tokens that the model wants around a text.
    Text that has fewer tokens gives fewer rows, and one short row if it does not fill any.

    Args:
        texts: documents.
        tokenizer: the model's.
        samples: rows, at most.
        length: tokens of each.

    Returns:
        int64 `[rows, length]`.

    Raises:
        ValueError: if the text is empty, or samples or length make no sense.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"samples must be positive and length at least 2, got {samples}, {length}")
    ids: list[int] = []
    for text in texts:
        if text.strip():
            ids += tokenizer.encode(text, parse_special=False)
        if len(ids) > 64 * samples * length:  # spread over that much, and read no more
            break
    if len(ids) < 2:
        raise ValueError("the calibration text is empty: give a file with text like the model's")
    if len(ids) < length:
        return torch.tensor(ids).view(1, -1)
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(rows) <= samples:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, samples).round().long()]

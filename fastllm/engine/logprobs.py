"""Log-probabilities as vLLM reports them: the chosen token and the k most probable ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.engine.request import Logprob
from fastllm.models.tokenizer import Tokenizer
from fastllm.ops.log_probs import log_probs, top_log_probs


def logprob_rows(
    logits: Tensor, tokens: list[int], count: int, tokenizer: Tokenizer | None
) -> list[dict[int, Logprob]]:
    """One dict per row of logits [rows, vocab]: the token of that row first, then the `count` most
    probable ones. rank 1 is the most probable; ties rank by id."""
    ids = torch.tensor(tokens, dtype=torch.int32, device=logits.device).unsqueeze(1)
    chosen = log_probs(logits, ids)[:, 0].tolist()
    value = logits.gather(1, ids.long())
    columns = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > value) | ((logits == value) & (columns < ids))
    ranks = (before.sum(1) + 1).tolist()
    top_values, top_ids = (t.tolist() for t in top_log_probs(logits, min(count, logits.shape[1])))
    rows = []
    for row, token in enumerate(tokens):
        entries = {token: Logprob(chosen[row], ranks[row], _text(tokenizer, token))}
        for rank, (other, logprob) in enumerate(zip(top_ids[row], top_values[row], strict=True)):
            if other not in (token, -1):  # -1: the row has NaN
                entries[other] = Logprob(logprob, rank + 1, _text(tokenizer, other))
        rows.append(entries)
    return rows


def _text(tokenizer: Tokenizer | None, token: int) -> str | None:
    return None if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)

"""How well a model predicts text: log-probabilities of every token, and what is made of them.

Logits of a whole text are never in memory: the LM-head ops give each token's log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm.errors import NumericalError
from fastllm.models.decoder import Decoder
from fastllm.models.tokenizer import Tokenizer
from fastllm.nn.batch import Documents

TOKENS_AT_ONCE = 2048  # of all windows of a forward pass
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Score:
    """What a model makes of a text.

    nll: float32 `[tokens]`, nats: minus the log-probability of each predicted token, in order.
    nbytes: of the text that these tokens spell, in UTF-8.
    """

    nll: Tensor
    nbytes: int

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return self.nll.numel()

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nll.double().mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that overflows."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """All bits by all bytes, which models with other tokenizers share."""
        return float(self.nll.double().sum()) / math.log(2) / max(self.nbytes, 1)

    def excess(self, other: Score) -> tuple[float, float]:
        """Mean nats a token more than `other` for the same tokens, and its standard error."""
        if self.tokens != other.tokens:
            raise ValueError(f"scores of {self.tokens} and {other.tokens} tokens are not paired")
        difference = self.nll.double() - other.nll.double()
        error = float(difference.std()) / math.sqrt(self.tokens) if self.tokens > 1 else math.inf
        return float(difference.mean()), error


def text_ids(
    texts: Iterable[str], tokenizer: Tokenizer, limit: int | None = None
) -> tuple[list[list[int]], int]:
    """Token ids of documents, and the bytes of the tokens behind each one's first.

    A document begins with the special tokens that the model wants there; text that looks like a
    special token is text.

    Args:
        texts: documents; those of space alone are passed over.
        tokenizer: the model's.
        limit: stop after so many predicted tokens.

    Raises:
        ValueError: if there is nothing to predict, or limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    documents: list[list[int]] = []
    nbytes, left = 0, limit
    for text in texts:
        if not text.strip():
            continue
        ids = tokenizer.encode(text, parse_special=False)
        if left is not None:
            ids = ids[: left + 1]
        if len(ids) < 2:
            continue
        documents.append(ids)
        nbytes += len(tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
        if left is not None:
            left -= len(ids) - 1
            if left <= 0:
                break
    if not documents:
        raise ValueError("the text is empty or a single token: there is nothing to predict")
    return documents, nbytes


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, scored) of the inputs of each forward pass over `count` predicted tokens.

    Inputs are `first` to `end`; the last `scored` of them predict tokens that no window before
    did. Each but the first window's predictions see at least `length - stride` tokens.
    """
    done = 0
    while done < count:
        end = length if done == 0 else done + stride
        end = min(end, count)
        yield max(0, end - length), end, end - done
        done = end


def score(
    model: Decoder,
    documents: Sequence[Sequence[int]],
    nbytes: int,
    *,
    length: int = 512,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Predict every token of documents but their first ones.

    Args:
        model: loaded or live.
        documents: token ids, from `text_ids`.
        nbytes: of the text.
        length: tokens that a forward pass sees of a document.
        stride: how far a window is moved; less than `length` gives every prediction more context
            and takes longer. Default: `length`, so that windows do not overlap.
        progress: is told how many tokens have been predicted so far.

    Raises:
        ValueError: if length or stride do not fit the model or each other.
        NumericalError: if the model gives NaN.
    """
    stride = length if stride is None else stride
    if not 1 <= length <= model.max_positions:
        raise ValueError(f"length must be from 1 to {model.max_positions}, got {length}")
    if not 1 <= stride <= length:
        raise ValueError(f"stride must be from 1 to the length {length}, got {stride}")
    found: list[Tensor] = []
    done, batch = 0, []
    parts = [(ids, window) for ids in documents for window in windows(len(ids) - 1, length, stride)]
    for number, (ids, (first, end, scored)) in enumerate(parts, start=1):
        targets = [IGNORED] * (end - first - scored) + list(ids[end - scored + 1 : end + 1])
        batch.append((ids[first:end], targets))
        if number == len(parts) or (len(batch) + 1) * length > TOKENS_AT_ONCE:
            found.append(_nll(model, batch))
            done += found[-1].numel()
            batch = []
            if progress is not None:
                progress(done)
    nll = torch.cat(found)
    if bool(nll.isnan().any()):
        raise NumericalError(f"{int(nll.isnan().sum())} of {nll.numel()} log-probabilities are NaN")
    return Score(nll, nbytes)


@torch.no_grad()
def _nll(model: Decoder, batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    documents = Documents.pack([ids for ids, _ in batch], model.device)
    targets = torch.tensor([t for _, row in batch for t in row], device=model.device)
    log_probs, _ = model.log_probs(documents, targets)
    return -log_probs[targets != IGNORED].cpu()

"""Log-probabilities of several continuations of one context: what multiple choice is scored by.

A context's full pages are computed once and read by all its continuations. Those that differ in
their last token alone (the letters A to D) are one sequence with several targets. The LM head sees
the places that predict a continuation and no other; logits of a text are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from fastllm.engine.cache import PagedCache, pages_for
from fastllm.errors import NumericalError
from fastllm.models.decoder import Decoder
from fastllm.nn.batch import Batch
from fastllm.ops.linear_logprob import linear_logprob
from fastllm.ops.paged_cache import PAGE_SIZE

TOKENS_AT_ONCE = 2048  # of a forward pass, unless one context's continuations are longer
ROWS_AT_ONCE = 64  # whose logits are in memory together, where a most probable token is asked for


@dataclass(frozen=True, slots=True)
class Continued:
    """A context and what may follow it, as token ids; none of them empty."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]

    @property
    def shared(self) -> int:
        """Tokens of the context that are computed once: its full pages before the last token."""
        return (len(self.context) - 1) // PAGE_SIZE * PAGE_SIZE

    def tails(self) -> list[tuple[int, ...]]:
        """What each ending's sequence holds behind the shared tokens; its last token is only
        predicted."""
        rest = tuple(self.context[self.shared :])
        return [rest + tuple(ending[:-1]) for ending in self.endings]

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.shared + sum(map(len, set(self.tails())))

    @property
    def pages(self) -> int:
        """Pages that they fill."""
        return self.shared // PAGE_SIZE + sum(pages_for(len(tail)) for tail in set(self.tails()))


def continuation_log_probs(
    model: Decoder, groups: Sequence[Continued], progress: Callable[[int], None] | None = None
) -> list[list[Tensor]]:
    """Log-probabilities of every token of every ending, given the context and the tokens before it.

    They are those of `Decoder.log_probs` for the same tokens, bit for bit (latent attention
    excepted, which reads its cache in another form), whatever else is scored beside them.

    Args:
        model: loaded or live.
        groups: contexts with their endings.
        progress: is told how many groups have been scored so far.

    Returns:
        For each group and ending, float32 `[tokens of the ending]` on the CPU.

    Raises:
        ValueError: if a context or ending is empty or they do not fit the model's context; it
            names the group by its number.
        NumericalError: if the model gives NaN.
    """
    return [[log_probs for log_probs, _ in scores] for scores in _scored(model, groups, progress)]


def continuation_scores(
    model: Decoder, groups: Sequence[Continued], progress: Callable[[int], None] | None = None
) -> list[list[tuple[Tensor, bool]]]:
    """`continuation_log_probs`, each with whether it is what greedy decoding would give.

    Equal logits go to the lower id. The LM head runs twice for that; arguments and errors are the
    same.
    """
    return _scored(model, groups, progress, greedy=True)


def _scored(
    model: Decoder, groups: Sequence[Continued], progress: Callable[[int], None] | None,
    greedy: bool = False,
) -> list[list[tuple[Tensor, bool]]]:  # fmt: skip
    for number, group in enumerate(groups):
        _check(group, number, model.max_positions)
    model.refresh_caches()
    packs = list(_packs(groups))
    pages = max((sum(group.pages for group in pack) for pack in packs), default=0)
    cache = PagedCache(model.config, pages, model.dtype, model.device) if packs else None
    found: list[list[tuple[Tensor, bool]]] = []
    for pack in packs:
        assert cache is not None, "there is a pack"
        found += _score(model, cache, pack, greedy)
        if progress is not None:
            progress(len(found))
    return found


def _check(group: Continued, number: int, positions: int) -> None:
    if not group.context or not group.endings or not all(group.endings):
        raise ValueError(f"group {number}: a context and endings of one token or more are needed")
    longest = len(group.context) + max(map(len, group.endings)) - 1
    if longest > positions:
        raise ValueError(
            f"group {number}: context and ending have {longest} tokens, and the model has "
            f"positions for {positions}: shorten them"
        )


def _packs(groups: Sequence[Continued]) -> Iterator[list[Continued]]:
    """Neighbours that fit into a forward pass."""
    pack: list[Continued] = []
    tokens = 0
    for group in groups:
        if pack and tokens + group.tokens > TOKENS_AT_ONCE:
            yield pack
            pack, tokens = [], 0
        pack.append(group)
        tokens += group.tokens
    if pack:
        yield pack


@dataclass(slots=True)
class _Rows:
    """Sequences of a forward pass: new tokens, where they begin, and pages from position 0 on."""

    ids: list[Sequence[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    tokens: int = 0

    def add(self, ids: Sequence[int], start: int, pages: list[int]) -> int:
        """The place of the sequence's first token among all."""
        self.ids.append(ids)
        self.starts.append(start)
        self.pages.append(pages)
        self.tokens += len(ids)
        return self.tokens - len(ids)

    def batch(self, device: torch.device) -> Batch:
        """As the decoder takes it."""
        lengths = [len(ids) for ids in self.ids]
        ends = [start + count for start, count in zip(self.starts, lengths, strict=True)]
        width = max(map(len, self.pages))
        table = [pages + [0] * (width - len(pages)) for pages in self.pages]
        positions = [
            place for start, end in zip(self.starts, ends, strict=True)
            for place in range(start, end)
        ]  # fmt: skip

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return Batch(
            ids=tensor([token for ids in self.ids for token in ids]),
            positions=tensor(positions),
            cu_seqlens_q=tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
            cache_seqlens=tensor(ends),
            block_table=tensor(table),
            fresh=not any(self.starts),
        )


@torch.no_grad()
def _score(
    model: Decoder, cache: PagedCache, pack: Sequence[Continued], greedy: bool
) -> list[list[tuple[Tensor, bool]]]:
    prefixes, tails = _Rows(), _Rows()
    fresh = iter(range(cache.num_pages))  # nothing of an earlier pack is read again
    rows: list[int] = []
    targets: list[int] = []
    for group in pack:
        shared = list(islice(fresh, group.shared // PAGE_SIZE))
        if shared:
            prefixes.add(group.context[: group.shared], 0, shared)
        places: dict[tuple[int, ...], int] = {}
        for tail, ending in zip(group.tails(), group.endings, strict=True):
            if tail not in places:
                own = list(islice(fresh, pages_for(len(tail))))
                places[tail] = tails.add(tail, group.shared, shared + own)
            first = places[tail] + len(group.context) - group.shared - 1
            rows += range(first, first + len(ending))
            targets += ending
    if prefixes.ids:
        model.hidden(prefixes.batch(model.device), cache.layers)
    x = model.hidden(tails.batch(model.device), cache.layers)
    log_probs = _predicted(model, x, rows, targets)
    likeliest = _are_likeliest(model, x, rows, targets) if greedy else torch.zeros(len(rows))
    lengths = [len(ending) for group in pack for ending in group.endings]
    parts = zip(log_probs.split(lengths), likeliest.split(lengths), strict=True)
    scores = ((part, bool(chosen.all())) for part, chosen in parts)
    return [[next(scores) for _ in group.endings] for group in pack]


def _are_likeliest(model: Decoder, x: Tensor, rows: list[int], targets: list[int]) -> Tensor:
    """Whether the most probable token at each row is the target, bool on the CPU."""
    parts = []
    for at in range(0, len(rows), ROWS_AT_ONCE):
        picked = x[torch.tensor(rows[at : at + ROWS_AT_ONCE], device=x.device)]
        parts.append(model.logits(picked).argmax(-1).cpu())
    return torch.cat(parts) == torch.tensor(targets)


def _predicted(model: Decoder, x: Tensor, rows: list[int], targets: list[int]) -> Tensor:
    """Log-probabilities of targets at rows of the final norm's output, on the CPU."""
    picked = x[torch.tensor(rows, device=x.device)]
    log_probs, _ = linear_logprob(
        picked,
        model._head(),
        torch.tensor(targets, device=x.device),
        activation=model.activation,
    )
    log_probs = log_probs.cpu()
    if bool(log_probs.isnan().any()):
        count = int(log_probs.isnan().sum())
        raise NumericalError(f"{count} of {log_probs.numel()} log-probabilities are NaN")
    return log_probs

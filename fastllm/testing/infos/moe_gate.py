"""Cases of moe_gate: routings of the families, sizes, ties, experts that are barred, bad rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo

Options = tuple[str, int, int, str, bool, float]


@dataclass(frozen=True)
class Routing:
    """A way to route: the options of the op after k, and whether there is a bias."""

    name: str
    scoring: str = "softmax"
    biased: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"
    renormalize: bool = False
    scale: float = 1.0

    @property
    def options(self) -> Options:
        groups = self.groups, self.kept_groups, self.group_score
        return (self.scoring, *groups, self.renormalize, self.scale)

    def holds(self, n_experts: int, k: int) -> bool:
        """Whether so many experts can be routed so."""
        size = n_experts // self.groups
        fits = n_experts % self.groups == 0 and k <= self.kept_groups * size
        return fits and (self.groups == 1 or self.group_score == "max" or size >= 2)


ROUTINGS = (
    Routing("softmax"),
    Routing("mixtral", renormalize=True),
    Routing("deepseek_v2", groups=4, kept_groups=2, scale=16.0),
    Routing("deepseek_v3", "sigmoid", True, 4, 2, "top2", True, 2.5),
    Routing("sigmoid", "sigmoid"),
    Routing("softmax_bias", biased=True, renormalize=True),
    Routing("groups_of_scores", groups=8, kept_groups=3, group_score="top2"),
)
# tokens, experts, k
SHAPES = (
    (33, 64, 8),
    (1, 256, 8),
    (0, 16, 2),
    (5, 8, 2),
    (1, 1, 1),
    (70, 160, 6),
    (9, 7, 3),
    (3, 512, 16),
    (2, 20, 5),
)
FULL_SHAPES = (
    (4096, 64, 8),
    (1000, 384, 8),
    (513, 128, 1),
    (257, 512, 10),
    (64, 24, 6),
    (65, 40, 4),
    (32, 2, 1),
    (31, 16, 4),
    (130, 32, 16),
    (1, 512, 1),
    (17, 72, 9),
    (300, 48, 12),
)
BENCH_SHAPES = ((1, 128, 8), (64, 128, 8), (2048, 64, 8), (2048, 256, 8))


def draw_logits(g: torch.Generator, routing: Routing, tokens: int, experts: int) -> Args:
    """Logits and bias, with choices so far apart that their rounding does not order them."""
    if not routing.biased:
        return torch.randn(tokens, experts, generator=g) * 2, None
    bias = torch.randn(experts, generator=g) * 0.05
    if routing.scoring == "softmax":
        return torch.randn(tokens, experts, generator=g) * 2, bias / experts
    order = torch.rand(tokens, experts, generator=g).argsort(1)
    # At uneven distances: the sum of a group's two best is not another's by chance.
    choice = 0.3 + 0.4 * ((order + 0.5) / experts) ** 1.3
    return torch.logit((choice - bias.clamp(-0.2, 0.2)).double()).float(), bias.clamp(-0.2, 0.2)


def _case(shape: tuple[int, int, int], routing: Routing, full: bool = False) -> Case:
    tokens, experts, k = shape

    def make(g: torch.Generator) -> Args:
        return *draw_logits(g, routing, tokens, experts), k, *routing.options

    return Case(label=f"{routing.name}-{tokens}x{experts}-k{k}", make=make, full=full)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, (tokens, experts, k) in enumerate(SHAPES):
        fitting = [r for r in ROUTINGS if r.holds(experts, k)]
        for j, routing in enumerate(fitting):
            common = i == 0 or (i + j) % 3 == 0 or len(fitting) < 3
            yield _case((tokens, experts, k), routing, full=not common)
    for tokens, experts, k in FULL_SHAPES:
        for routing in ROUTINGS:
            if routing.holds(experts, k):
                yield _case((tokens, experts, k), routing, full=True)
    for routing in ROUTINGS:
        yield from _hard_cases(routing)


def _hard_cases(routing: Routing) -> Iterator[Case]:
    def ties(g: torch.Generator) -> Args:
        logits = (torch.randn(40, 64, generator=g) * 2).round() / 2
        bias = torch.zeros(64) if routing.biased else None
        return logits, bias, 8, *routing.options

    def barred(g: torch.Generator) -> Args:
        logits, bias = draw_logits(g, routing, 20, 32)
        gone = torch.rand(20, 32, generator=g) < 0.2
        return logits.masked_fill(gone, -math.inf), bias, 2, *routing.options

    def bad_rows(g: torch.Generator) -> Args:
        logits, bias = draw_logits(g, routing, 37, 24)
        logits[0, 3] = logits[36, 23] = math.nan
        logits[7, 0] = math.inf
        logits[33] = -math.inf
        return logits, bias, 3, *routing.options

    def strided(g: torch.Generator) -> Args:
        logits, bias = draw_logits(g, routing, 6, 48)
        wide = torch.zeros(6, 50)
        wide[:, 1:49] = logits
        return wide[:, 1:49], bias, 4, *routing.options

    for make in (ties, barred, bad_rows, strided):
        label = f"{routing.name}-{make.__name__}"
        yield Case(label=label, make=make, full=routing.name in ("sigmoid", "softmax_bias"))
    if not routing.biased:
        peaked = _scaled(routing)
        yield Case(label=f"{routing.name}-peaked", make=peaked)


def _scaled(routing: Routing) -> Callable[[torch.Generator], Args]:
    def make(g: torch.Generator) -> Args:
        return torch.randn(11, 64, generator=g) * 20, None, 6, *routing.options

    return make


def exact_scores(x: Tensor, scoring: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, scores that add up to 1, log-sum-exp) of float64 logits."""
    lse = torch.logsumexp(x, 1)
    if scoring == "softmax":
        scores = (x - lse[:, None]).exp()
        return scores, scores, lse
    scores = torch.sigmoid(x)
    return scores, scores / scores.sum(1, keepdim=True), lse


def exact_weights(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
    """The weights of the slots; 0 where the id is -1."""
    picked = scores.gather(1, ids.long().clamp(min=0)) * (ids >= 0)
    if renormalize:
        picked = picked / (picked.sum(1, keepdim=True) + 1e-20)
    return picked * scale


def _exact_ids(
    choice: np.ndarray,
    order: np.ndarray,
    k: int,
    groups: int,
    kept_groups: int,
    group_score: str,
) -> np.ndarray:
    """Chosen by `order`, which rises with `choice`, among the groups of the best choices."""
    tokens, experts = choice.shape
    out = np.zeros((tokens, experts), dtype=bool)
    if groups > 1:
        falling = -np.sort(-choice.reshape(tokens, groups, experts // groups), axis=2)
        best = falling[:, :, : 1 if group_score == "max" else 2].sum(2)
        ranks = np.argsort(np.argsort(-best, axis=1, kind="stable"), axis=1, kind="stable")
        out = np.repeat(ranks >= kept_groups, experts // groups, axis=1)
    ids = np.broadcast_to(np.arange(experts), choice.shape)
    return np.lexsort((ids, -order, out), axis=-1)[:, :k]


def _exact(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> Args:
    experts = logits.shape[1]
    valid = logits.amax(1).isfinite()
    x = torch.where(valid[:, None], logits, 0.0).double()
    scores, p, lse = exact_scores(x, scoring)
    choice = scores.detach() if bias is None else scores.detach() + bias.double()
    order = choice if bias is not None else x.detach()  # of which no two round to one score
    found = _exact_ids(choice.numpy(), order.numpy(), k, groups, kept_groups, group_score)
    ids = torch.from_numpy(found).masked_fill(~valid[:, None], -1)
    counts = torch.bincount(ids[valid].flatten(), minlength=experts)
    weights = exact_weights(scores, ids, renormalize, scale)
    return weights, ids, counts, (p * valid[:, None]).sum(0), (lse.square() * valid).sum()


def bench_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Qwen3-MoE's and DeepSeek-V3's routing, one token to 2,048."""
    for shape in BENCH_SHAPES:
        for routing in (ROUTINGS[1], ROUTINGS[3]):
            yield _case(shape, routing)


def _torch_router(logits: Tensor, bias: Tensor | None, k: int, scoring: str, *rest: object) -> Args:
    weights, ids = torch.softmax(logits, 1).topk(k, 1)
    counts = torch.bincount(ids.flatten(), minlength=logits.shape[1])
    return ids, weights / weights.sum(1, keepdim=True), counts


INFOS = [
    OpInfo(
        name="moe_gate",
        cases=_cases,
        exact=_exact,
        dtypes=(torch.float32,),
        grad_args=(0,),
        bench_cases=bench_cases,
        bench_peer=(lambda *args: args, _torch_router),
        bytes_moved=lambda logits, bias, k, *_: logits.nbytes + 8 * k * logits.shape[0],
    ),
]

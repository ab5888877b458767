"""Cases of moe_dispatch: few and many slots, slices of experts, empty experts, none at all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.moe_dispatch import moe_dispatch_ref
from ..moe_problem import draw_ids
from ..opinfo import Args, Case, OpInfo

# tokens, experts, k, load, (first, count) of the slice or None
CASES: tuple[tuple[int, int, int, str, tuple[int, int] | None], ...] = (
    (0, 4, 2, "uniform", None),
    (1, 1, 1, "uniform", None),
    (7, 64, 8, "holes", None),
    (33, 512, 16, "zipf", (500, 12)),
    (100, 5, 3, "one", (3, 1)),
    (3, 4, 0, "uniform", None),
    (700, 16, 8, "zipf", None),
    (3001, 33, 7, "holes", (5, 20)),
    (5000, 8, 2, "half", None),
    (8, 6, 2, "uniform", (6, 0)),
)
BENCH_CASES = ((8, 64, 8), (2048, 64, 8), (32768, 128, 8))


def _case(
    tokens: int, experts: int, k: int, load: str, held: tuple[int, int] | None = None
) -> Case:
    def make(g: torch.Generator) -> Args:
        first, count = held or (0, experts)
        return draw_ids(g, tokens, experts, k, load), count, first

    label = f"T{tokens}-E{experts}-k{k}-{load}" + (f"-{held[0]}+{held[1]}" if held else "")
    return Case(label=label, make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for case in CASES:
        yield _case(*case)


def _exact(topk_ids: Tensor, n_experts: int, first_expert: int) -> tuple[Tensor, Tensor]:
    """A list for each expert."""
    runs: list[list[int]] = [[] for _ in range(n_experts)]
    for slot, expert in enumerate(topk_ids.flatten().tolist()):
        if 0 <= expert - first_expert < n_experts:
            runs[expert - first_expert].append(slot)
    slots = [slot for run in runs for slot in run]
    ends = torch.tensor([0, *(len(run) for run in runs)]).cumsum(0)
    slots += [-1] * (topk_ids.numel() - len(slots))
    return ends.int(), torch.tensor(slots, dtype=torch.int32)


INFOS = [
    OpInfo(
        name="moe_dispatch",
        cases=_cases,
        exact=_exact,
        dtypes=(torch.int32,),
        peer=moe_dispatch_ref,
        bench_cases=lambda dtype: (_case(*shape, "uniform") for shape in BENCH_CASES),
        bytes_moved=lambda ids, n, first: 2 * ids.nbytes + 4 * n,
    ),
]

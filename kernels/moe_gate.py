"""The router: scores of a row of logits, the k experts of largest choice, weights, statistics.

Choices are compared as integers: the float's bits made to order like it, above the expert's id
turned around, so that one maximum finds the largest choice and, among equals, the lower id. A
program takes a fixed number of rows, a few at a time, and writes its own sums of scores, counts and
squared log-sum-exps; a second kernel adds those in order: no atomics, no host sync.

Memory: a row of 256 logits is 1 KB read and 8 k bytes written, 32,768 rows 36 MB or 11 us at
3.3 TB/s; k maxima over 16 values a thread and 5 shuffles of 8 bytes each take longer than that from
k = 4 on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import divide

REMOVED = tl.constexpr(-(2**63))  # below every key: no expert, or one of a group that is left out
CHOSEN = tl.constexpr(-(2**63) + 1)
SUM_EPS = tl.constexpr(1e-20)


@triton.jit
def order_of(x):
    """int32 that orders like the float x; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def of_order(order):
    """The float of an order_of."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x, ids):
    """int64 that orders by x, then by lower id: its low 31 bits are the id's, turned around."""
    return (order_of(x).to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def id_of(key):
    """The expert (int32) of a key."""
    return ((key & 0x7FFFFFFF) ^ 0x7FFFFFFF).to(tl.int32)


@triton.jit
def row_statistics(x):
    """(maximum, sum of exp(x - maximum), whether they make a distribution) of each row of x."""
    top = tl.max(x, axis=1)
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    total = tl.sum(tl.exp(x - shift[:, None]), axis=1)
    # NaN compares false; +inf leaves an infinite sum, a row of -inf 0.
    return shift, total, (total > 0.0) & (total < float("inf"))


@triton.jit
def scores_of(x, shift, total, SIGMOID: tl.constexpr):
    """The scores of logits x[rows, any], by their rows' statistics."""
    if SIGMOID:
        return divide(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))
    else:
        return divide(tl.exp(x - shift[:, None]), tl.broadcast_to(total[:, None], x.shape))


@triton.jit
def without_weak_groups(
    keys,
    kept_groups,
    TOP2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """keys[ROWS, BLOCK_G * BLOCK_S] with REMOVED in all but the best kept_groups groups."""
    grouped = tl.reshape(keys, (ROWS, BLOCK_G, BLOCK_S))
    first = tl.max(grouped, axis=2)
    best = of_order((first >> 32).to(tl.int32))
    if TOP2:
        rest = tl.where(grouped == first[:, :, None], REMOVED, grouped)
        best += of_order((tl.max(rest, axis=2) >> 32).to(tl.int32))
    groups = tl.arange(0, BLOCK_G)[None, :]
    ranks = tl.where(first == REMOVED, REMOVED, key_of(best, groups))
    for _ in range(kept_groups):
        top = tl.max(ranks, axis=1)
        ranks = tl.where(ranks == top[:, None], CHOSEN, ranks)
    kept = tl.broadcast_to((ranks == CHOSEN)[:, :, None], (ROWS, BLOCK_G, BLOCK_S))
    return tl.reshape(tl.where(kept, grouped, REMOVED), (ROWS, BLOCK_G * BLOCK_S))


@triton.jit
def moe_gate_kernel(
    ids_ptr,
    weights_ptr,
    counts_ptr,
    scores_ptr,
    z_ptr,
    logits_ptr,
    bias_ptr,
    stride_l,
    T,
    E,
    K,
    group_size,
    kept_groups,
    scale,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # Each group starts at a power of two: column c is expert c % BLOCK_S of group c // BLOCK_S.
    column = tl.arange(0, BLOCK_G * BLOCK_S)
    experts = column // BLOCK_S * group_size + column % BLOCK_S
    real = (column % BLOCK_S < group_size) & (experts < E)
    slot = tl.arange(0, BLOCK_K)[None, :]
    score_sums = tl.zeros((ROWS, BLOCK_G * BLOCK_S), dtype=tl.float32)
    counts = tl.zeros((ROWS, BLOCK_G * BLOCK_S), dtype=tl.int32)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(TILES):
        rows = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)
        row_ptr = logits_ptr + (rows * stride_l)[:, None]
        mask = (rows < T)[:, None] & real[None, :]
        x = tl.load(row_ptr + experts[None, :], mask=mask, other=float("-inf"))
        shift, total, valid = row_statistics(x)
        scores = scores_of(x, shift, total, SIGMOID)
        if BY_LOGITS:
            choice = x
        else:
            choice = scores
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + experts, mask=real, other=0.0)[None, :]
            bad = (choice >= float("inf")) | (choice != choice)
            valid &= tl.max((bad & mask).to(tl.int32), axis=1) == 0
        keys = tl.where(real[None, :], key_of(choice, experts[None, :]), REMOVED)
        if GROUPED:
            keys = without_weak_groups(keys, kept_groups, TOP2, ROWS, BLOCK_G, BLOCK_S)
        ids = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for j in range(K):
            best = tl.max(keys, axis=1)
            keys = tl.where(keys == best[:, None], CHOSEN, keys)
            ids = tl.where(slot == j, id_of(best)[:, None], ids)
        # Scores of the chosen from their logits again: the same bits, out of L1.
        live = valid[:, None] & (slot < K)
        picked = tl.load(row_ptr + ids, mask=live, other=float("-inf"))
        weights = tl.where(live, scores_of(picked, shift, total, SIGMOID), 0.0)
        if RENORMALIZE:
            sums = tl.sum(weights, axis=1)[:, None] + SUM_EPS
            weights = divide(weights, tl.broadcast_to(sums, weights.shape))
        out = rows[:, None] * K + slot
        stored = (rows < T)[:, None] & (slot < K)
        tl.store(ids_ptr + out, tl.where(valid[:, None], ids, -1), mask=stored)
        tl.store(weights_ptr + out, weights * scale, mask=stored)
        counted = valid[:, None]
        counts += ((keys == CHOSEN) & counted).to(tl.int32)
        if SIGMOID:
            norm = tl.sum(tl.where(real[None, :], scores, 0.0), axis=1)[:, None] + SUM_EPS
            scores = divide(scores, tl.broadcast_to(norm, scores.shape))
        score_sums += tl.where(counted & real[None, :], scores, 0.0)
        lse = shift + tl.log(total)
        squares += tl.where(valid, lse * lse, 0.0)
    tl.store(scores_ptr + program * E + experts, tl.sum(score_sums, axis=0), mask=real)
    tl.store(counts_ptr + program * E + experts, tl.sum(counts, axis=0), mask=real)
    tl.store(z_ptr + program, tl.sum(squares, axis=0))


@triton.jit
def moe_gate_sums_kernel(
    counts_ptr,
    scores_ptr,
    z_ptr,
    counts_in_ptr,
    scores_in_ptr,
    z_in_ptr,
    n_chunks,
    E,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The chunks' sums, added in order; the last program adds z instead of experts."""
    block = tl.program_id(0)
    experts = block * BLOCK_E + tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    scores = tl.zeros((BLOCK_E,), dtype=tl.float32)
    squares = tl.zeros((), dtype=tl.float32)
    for first in range(0, n_chunks, BLOCK_ROWS):
        chunks = first + tl.arange(0, BLOCK_ROWS)
        mask = (chunks < n_chunks)[:, None] & (experts < E)[None, :]
        at = chunks.to(tl.int64)[:, None] * E + experts[None, :]
        counts += tl.sum(tl.load(counts_in_ptr + at, mask=mask, other=0), axis=0)
        scores += tl.sum(tl.load(scores_in_ptr + at, mask=mask, other=0.0), axis=0)
        last = (block == tl.num_programs(0) - 1) & (chunks < n_chunks)
        squares += tl.sum(tl.load(z_in_ptr + chunks, mask=last, other=0.0), axis=0)
    tl.store(counts_ptr + experts, counts, mask=experts < E)
    tl.store(scores_ptr + experts, scores, mask=experts < E)
    if block == tl.num_programs(0) - 1:
        tl.store(z_ptr, squares)


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights f32[T, k], ids i32[T, k], counts i32[E], score_sum f32[E], z_sum f32[]).

    logits: f32[T, E], last dim contiguous; bias: f32[E] or None; options as in
    `fastllm.ops.moe_gate`. A row without a distribution gives ids -1 and weights 0.
    """
    n_tokens, n_experts = logits.shape
    f32, i32 = {"dtype": torch.float32}, {"dtype": torch.int32}
    ids = logits.new_empty((n_tokens, k), **i32)
    weights = logits.new_empty((n_tokens, k), **f32)
    counts, scores = logits.new_empty(n_experts, **i32), logits.new_empty(n_experts, **f32)
    z = logits.new_empty((), **f32)
    n_chunks = triton.cdiv(n_tokens, tuning.GATE_CHUNK)
    if n_chunks == 0:
        return weights, ids, counts.zero_(), scores.zero_(), z.zero_()
    sums = counts, scores, z
    if n_chunks > 1:
        shape = n_chunks, n_experts
        sums = counts.new_empty(shape), scores.new_empty(shape), z.new_empty(n_chunks)
    grouped = kept_groups < groups
    group_size = n_experts // groups if grouped else n_experts
    block_g = triton.next_power_of_2(groups) if grouped else 1
    block_s = triton.next_power_of_2(group_size)
    rows = tuning.gate_rows(block_g * block_s)
    moe_gate_kernel[(n_chunks,)](
        ids,
        weights,
        *sums,
        logits,
        bias,
        logits.stride(0),
        n_tokens,
        n_experts,
        k,
        group_size,
        kept_groups,
        scale,
        SIGMOID=scoring == "sigmoid",
        BY_LOGITS=bias is None and (groups == 1 or group_score == "max"),
        GROUPED=grouped,
        TOP2=group_score == "top2",
        RENORMALIZE=renormalize,
        TILES=tuning.GATE_CHUNK // rows,
        ROWS=rows,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=4,
    )
    if n_chunks > 1:
        moe_gate_sums_kernel[(triton.cdiv(n_experts, tuning.COLUMN_SUMS_BLOCK),)](
            counts,
            scores,
            z,
            *sums,
            n_chunks,
            n_experts,
            BLOCK_ROWS=tuning.COLUMN_SUMS_ROWS,
            BLOCK_E=tuning.COLUMN_SUMS_BLOCK,
            num_warps=4,
        )
    return weights, ids, counts, scores, z

"""Log-softmax of rows of logits: at chosen ids, and its k largest entries.

Log-sum-exp runs over fixed 512-column tiles in an order that V alone decides: `log_probs`,
`top_log_probs` and `sampling` share it. No [S, V] result is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

VOCAB_TILE = 512


@triton.jit
def tile_statistics(x):
    """(max, sum of exp(x - max)) of one tile; (-inf, 0) when nothing is finite, NaN sum for NaN."""
    m = tl.max(x, axis=0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    return m, tl.sum(tl.exp(x - shift), axis=0)


@triton.jit
def merge_statistics(max_ptr, sum_ptr, n_tiles, BLOCK_TILES: tl.constexpr):
    """(log-sum-exp, max) of a row from its tiles' statistics, in an order fixed by n_tiles."""
    i = tl.arange(0, BLOCK_TILES)
    m = tl.load(max_ptr + i, mask=i < n_tiles, other=float("-inf"))
    s = tl.load(sum_ptr + i, mask=i < n_tiles, other=0.0)
    top = tl.max(m, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.where(s == 0.0, 0.0, s * tl.exp(m - shift)), axis=0)
    return shift + tl.log(total), top


@triton.jit
def log_probs_tile_kernel(stats_ptr, logits_ptr, stride_l, V, n_tiles, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * stride_l + ids, mask=ids < V, other=float("-inf"))
    top, total = tile_statistics(x)
    tl.store(stats_ptr + row * 2 * n_tiles + tile, top)
    tl.store(stats_ptr + row * 2 * n_tiles + n_tiles + tile, total)


@triton.jit
def log_probs_kernel(
    logprob_ptr,
    stats_ptr,
    logits_ptr,
    ids_ptr,
    stride_l,
    V,
    J,
    n_tiles,
    BLOCK_J: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row * 2 * n_tiles
    lse, _ = merge_statistics(stats, stats + n_tiles, n_tiles, BLOCK_TILES)
    j = tl.arange(0, BLOCK_J)
    ids = tl.load(ids_ptr + row * J + j, mask=j < J, other=-1).to(tl.int64)
    inside = (ids >= 0) & (ids < V)
    x = tl.load(logits_ptr + row * stride_l + ids, mask=inside, other=float("nan"))
    tl.store(logprob_ptr + row * J + j, x - lse, mask=j < J)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """f32[S, J]: log-softmax of logits[S, V] (f32, last dim contiguous) at ids[S, J] (i32, i64).

    An id outside the vocabulary gives NaN.
    """
    n_rows, vocab = logits.shape
    n_ids = ids.shape[1]
    logprob = torch.empty((n_rows, n_ids), dtype=torch.float32, device=logits.device)
    if logprob.numel() == 0:
        return logprob
    n_tiles = triton.cdiv(vocab, VOCAB_TILE)
    stats = torch.empty((n_rows, 2, n_tiles), dtype=torch.float32, device=logits.device)
    stride_l = logits.stride(0)
    log_probs_tile_kernel[(n_rows, n_tiles)](
        stats, logits, stride_l, vocab, n_tiles, TILE=VOCAB_TILE, num_warps=4
    )
    log_probs_kernel[(n_rows,)](
        logprob,
        stats,
        logits,
        ids.contiguous(),
        stride_l,
        vocab,
        n_ids,
        n_tiles,
        BLOCK_J=triton.next_power_of_2(n_ids),
        BLOCK_TILES=triton.next_power_of_2(n_tiles),
        num_warps=4,
    )
    return logprob


@triton.jit
def top_log_probs_kernel(
    values_ptr,
    ids_ptr,
    stats_ptr,
    logits_ptr,
    stride_l,
    V,
    K,
    n_tiles,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row * 2 * n_tiles
    lse, _ = merge_statistics(stats, stats + n_tiles, n_tiles, BLOCK_TILES)
    valid = tl.abs(lse) < float("inf")  # False for NaN, +inf and a row of -inf
    last = tl.zeros_like(lse) + float("inf")
    last_id = tl.zeros((), tl.int32) - 1
    for j in range(K):  # the highest (score, lowest id) after the one found before
        best = tl.zeros_like(lse) + float("-inf")
        best_id = tl.zeros((), tl.int32) + V
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * stride_l + ids, mask=ids < V, other=float("-inf"))
            later = (x < last) | ((x == last) & (ids > last_id))
            x = tl.where(later, x, float("-inf"))
            top = tl.max(x, axis=0)
            top_id = tl.min(tl.where(later & (x == top) & (ids < V), ids, V), axis=0)
            best_id = tl.where((top > best) | ((top == best) & (best_id == V)), top_id, best_id)
            best = tl.maximum(best, top)
        tl.store(values_ptr + row * K + j, tl.where(valid, best - lse, float("nan")))
        tl.store(ids_ptr + row * K + j, tl.where(valid, tl.minimum(best_id, V - 1), -1))
        last, last_id = best, best_id


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values f32[S, k], ids i32[S, k]): the k largest of log-softmax(logits[S, V]), descending.

    logits: f32, last dim contiguous; ties go to the lower id. Reads a row k times: meant for the
    few alternatives a request reports. A row with NaN, +inf or no finite logit gives NaN and -1.
    """
    n_rows, vocab = logits.shape
    values = torch.empty((n_rows, k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((n_rows, k), dtype=torch.int32, device=logits.device)
    if values.numel() == 0:
        return values, ids
    n_tiles = triton.cdiv(vocab, VOCAB_TILE)
    stats = torch.empty((n_rows, 2, n_tiles), dtype=torch.float32, device=logits.device)
    stride_l = logits.stride(0)
    log_probs_tile_kernel[(n_rows, n_tiles)](
        stats, logits, stride_l, vocab, n_tiles, TILE=VOCAB_TILE, num_warps=4
    )
    top_log_probs_kernel[(n_rows,)](
        values,
        ids,
        stats,
        logits,
        stride_l,
        vocab,
        k,
        n_tiles,
        BLOCK=tuning.CUTOFF_BLOCK,
        BLOCK_TILES=triton.next_power_of_2(n_tiles),
        num_warps=tuning.CUTOFF_WARPS,
    )
    return values, ids

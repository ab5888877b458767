"""One token per row of logits: penalties, temperature, min-p, top-k, top-p, Gumbel-max draw.

Four launches, all reading their parameters from device memory: scores (penalties and temperature,
with the statistics of every 512-column tile), cutoff (log-sum-exp, and the lowest score that
min-p, top-k and top-p keep), draw (best score plus noise in every tile), select (best tile).
The cutoff is found without sorting: scores are ordered like integer keys, and a bisection over
keys counts (top-k) or weighs (top-p) what lies above; a row that truncates nothing skips it.

The noise of (seed, position, token) is one Philox4x32-10 word (Salmon et al., SC 2011), so a draw
depends on nothing else. Log-sum-exp is that of log_probs.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .log_probs import VOCAB_TILE, merge_statistics, tile_statistics
from .triton_compat import divide

GREEDY_BELOW = tl.constexpr(1e-5)  # dividing by a lower temperature could overflow fp32
LOWEST_KEY = tl.constexpr(-2139095040)  # key of the lowest finite float


@triton.jit
def ordered_key(x):
    """int32 that orders like the float x (-0.0 just below 0.0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The float of an ordered key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def gumbel_noise(seed, position, ids):
    """-log(-log(u)), u = (word + 0.5) / 2^32, of Philox key = seed, counter = (id, position, 0, 0).

    Near u = 1 the noise is largest and fp32 would round u to 1: there -log(u) comes from
    v = 1 - u, which is small and exact enough, by log1p(-v) = log(1 - v) * v / (1 - (1 - v)).
    """
    zero = tl.zeros_like(ids)
    word, _, _, _ = tl.philox(seed, ids, zero + position, zero, zero)
    upper = word >= 0x80000000
    small = tl.where(upper, 0xFFFFFFFF - word, word).to(tl.float32)
    v = (small + 0.5) * 2.3283064365386963e-10  # 2^-32
    rest = 1.0 - v
    lost = 1.0 - rest  # the part of v that 1 - v has kept
    log1p = tl.where(lost == 0.0, -v, tl.log(rest) * v / tl.where(lost == 0.0, 1.0, lost))
    return -tl.log(-tl.where(upper, log1p, tl.log(v)))


@triton.jit
def sampling_scores_kernel(
    scores_ptr,
    stats_ptr,
    logits_ptr,
    temperature_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    penalized_ptr,
    counts_ptr,
    in_prompt_ptr,
    banned_ptr,
    stride_l,
    V,
    n_tiles,
    n_banned,
    HAS_COUNTS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < V
    x = tl.load(logits_ptr + row * stride_l + ids, mask=inside, other=float("-inf"))
    stats = stats_ptr + row * 4 * n_tiles + tile
    top, total = tile_statistics(x)
    tl.store(stats, top)
    tl.store(stats + n_tiles, total)

    for i in range(n_banned):
        x = tl.where(ids == tl.load(banned_ptr + row * n_banned + i), float("-inf"), x)
    if HAS_COUNTS:
        if tl.load(penalized_ptr + row) != 0:
            count = tl.load(counts_ptr + row * V + ids, mask=inside, other=0)
            in_prompt = tl.load(in_prompt_ptr + row * V + ids, mask=inside, other=0)
            repetition = tl.load(repetition_ptr + row)
            repeated = tl.where(x > 0, divide(x, tl.zeros_like(x) + repetition), x * repetition)
            x = tl.where((count > 0) | (in_prompt != 0), repeated, x)
            x -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
            x -= count.to(tl.float32) * tl.load(frequency_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    one = tl.zeros_like(temperature) + 1.0
    x *= divide(one, tl.where(temperature < GREEDY_BELOW, one, temperature))
    tl.store(scores_ptr + row * V + ids, x, mask=inside)
    top, total = tile_statistics(x)
    tl.store(stats + 2 * n_tiles, top)
    tl.store(stats + 3 * n_tiles, total)


@triton.jit
def mass_from_key(scores_ptr, key, top, V, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Number, or sum of exp(score - top), of the scores whose key is at least `key`."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(scores_ptr + ids, mask=ids < V, other=float("-inf"))
        if COUNT:
            weight = tl.full((BLOCK,), 1.0, tl.float32)
        else:
            weight = tl.exp(x - top)
        total += tl.where(ordered_key(x) >= key, weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def highest_key(scores_ptr, low, high, top, target, V, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key in [low, high] from which scores reach `target`; `low` if none does."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        mass = mass_from_key(scores_ptr, middle.to(tl.int32), top, V, COUNT, BLOCK)
        low = tl.where(mass >= target, middle, low)
        high = tl.where(mass >= target, high, middle - 1)
        if COUNT:  # exactly k scores: any key between the k-th and the next says the same
            high = tl.where(mass == target, middle, high)
    return low.to(tl.int32)


@triton.jit
def sampling_cutoff_kernel(
    lse_ptr,
    cutoff_ptr,
    scores_ptr,
    stats_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    V,
    n_tiles,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row * 4 * n_tiles
    lse, _ = merge_statistics(stats, stats + n_tiles, n_tiles, BLOCK_TILES)
    lse_t, top = merge_statistics(stats + 2 * n_tiles, stats + 3 * n_tiles, n_tiles, BLOCK_TILES)
    # NaN and +inf make a log-sum-exp NaN; a row without a finite score joins them.
    usable = (lse == lse) & (lse_t == lse_t) & (top > float("-inf"))
    tl.store(lse_ptr + row * 2, tl.where(usable, lse, float("nan")))
    tl.store(lse_ptr + row * 2 + 1, tl.where(usable, lse_t, float("nan")))

    scores = scores_ptr + row * V
    cutoff = tl.zeros_like(top) + float("-inf")
    if usable & (tl.load(temperature_ptr + row) >= GREEDY_BELOW):
        min_p = tl.load(min_p_ptr + row)
        if min_p > 0:
            cutoff = top + tl.log(min_p)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < V):
            low = tl.zeros_like(top_k) + LOWEST_KEY
            key = highest_key(
                scores, low, ordered_key(top), top, top_k.to(tl.float32), V, True, BLOCK
            )
            cutoff = tl.maximum(cutoff, key_value(key))
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1:
            low = tl.maximum(ordered_key(cutoff), LOWEST_KEY)
            target = top_p * mass_from_key(scores, low, top, V, False, BLOCK)
            key = highest_key(scores, low, ordered_key(top), top, target, V, False, BLOCK)
            cutoff = tl.maximum(cutoff, key_value(key))
    tl.store(cutoff_ptr + row, tl.minimum(cutoff, top))


@triton.jit
def sampling_draw_kernel(
    best_ptr,
    best_id_ptr,
    scores_ptr,
    cutoff_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    V,
    n_tiles,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(scores_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    if tl.load(temperature_ptr + row) >= GREEDY_BELOW:
        kept = x >= tl.load(cutoff_ptr + row)
        noise = gumbel_noise(tl.load(seed_ptr + row), tl.load(position_ptr + row), ids)
        x = tl.where(kept, x + noise, float("-inf"))
    best, index = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + row * n_tiles + tile, best)
    tl.store(best_id_ptr + row * n_tiles + tile, tile * TILE + index)


@triton.jit
def sampling_select_kernel(
    ids_ptr,
    logprob_ptr,
    logprob_t_ptr,
    counts_ptr,
    best_ptr,
    best_id_ptr,
    logits_ptr,
    scores_ptr,
    lse_ptr,
    penalized_ptr,
    stride_l,
    V,
    n_tiles,
    HAS_COUNTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_TILES)
    best = tl.load(best_ptr + row * n_tiles + i, mask=i < n_tiles, other=float("-inf"))
    _, tile = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    chosen = tl.load(best_id_ptr + row * n_tiles + tile)
    lse = tl.load(lse_ptr + row * 2)
    logprob = tl.load(logits_ptr + row * stride_l + chosen) - lse
    logprob_t = tl.load(scores_ptr + row * V + chosen) - tl.load(lse_ptr + row * 2 + 1)
    valid = lse == lse
    tl.store(ids_ptr + row, tl.where(valid, chosen, -1))
    tl.store(logprob_ptr + row, logprob)
    tl.store(logprob_t_ptr + row, logprob_t)
    if HAS_COUNTS:
        if valid & (tl.load(penalized_ptr + row) != 0):
            count = counts_ptr + row * V + chosen
            tl.store(count, tl.load(count) + 1)


def sampling(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    seed: Tensor,
    position: Tensor,
    penalized: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    banned: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids i32[S], logprob f32[S], logprob_t f32[S]) of logits[S, V] f32 (last dim contiguous).

    Per row: temperature f32 (below 1e-5 is greedy), top_k i32 (<= 0 or >= V is off), top_p f32
    (1 is off), min_p f32 (0 is off), repetition f32 (1 is off), presence f32, frequency f32, seed
    i64, position i32, penalized u8; counts[S, V] i32, in_prompt[S, V] u8, banned[S, B] i32
    (padded with -1), contiguous; counts and in_prompt may be [0, V]: no penalties. Where
    `penalized`, counts[s, id] grows by one; elsewhere counts and in_prompt are not read.

    top-k keeps every score equal to the k-th largest; top-p the smallest set of highest scores
    whose share of what min-p and top-k kept reaches top_p, with the ties of its last; equal draws
    go to the lower id. logprob is of the raw logits; logprob_t of the penalized ones at the
    temperature (at 1 when greedy) before truncation. A row with NaN, +inf or no finite score
    gives id -1 and NaN.
    """
    n_rows, vocab = logits.shape
    f32 = {"dtype": torch.float32, "device": logits.device}
    i32 = {"dtype": torch.int32, "device": logits.device}
    ids = torch.empty(n_rows, **i32)
    logprob, logprob_t = torch.empty(n_rows, **f32), torch.empty(n_rows, **f32)
    if n_rows == 0:
        return ids, logprob, logprob_t
    n_tiles = triton.cdiv(vocab, VOCAB_TILE)
    block_tiles = triton.next_power_of_2(n_tiles)
    scores = torch.empty((n_rows, vocab), **f32)
    stats = torch.empty((n_rows, 4, n_tiles), **f32)
    lse, cutoff = torch.empty((n_rows, 2), **f32), torch.empty(n_rows, **f32)
    best = torch.empty((n_rows, n_tiles), **f32)
    best_id = torch.empty((n_rows, n_tiles), **i32)
    stride_l = logits.stride(0)
    sampling_scores_kernel[(n_rows, n_tiles)](
        scores, stats, logits, temperature, repetition, presence, frequency, penalized, counts,
        in_prompt, banned, stride_l, vocab, n_tiles, banned.shape[1],
        HAS_COUNTS=counts.shape[0] > 0, TILE=VOCAB_TILE, num_warps=4,
    )  # fmt: skip
    sampling_cutoff_kernel[(n_rows,)](
        lse, cutoff, scores, stats, temperature, top_k, top_p, min_p, vocab, n_tiles,
        BLOCK=tuning.CUTOFF_BLOCK, BLOCK_TILES=block_tiles, num_warps=tuning.CUTOFF_WARPS,
    )  # fmt: skip
    sampling_draw_kernel[(n_rows, n_tiles)](
        best, best_id, scores, cutoff, temperature, seed, position, vocab, n_tiles,
        TILE=VOCAB_TILE, num_warps=4,
    )  # fmt: skip
    sampling_select_kernel[(n_rows,)](
        ids, logprob, logprob_t, counts, best, best_id, logits, scores, lse, penalized, stride_l,
        vocab, n_tiles, HAS_COUNTS=counts.shape[0] > 0, BLOCK_TILES=block_tiles, num_warps=4,
    )  # fmt: skip
    return ids, logprob, logprob_t

"""Tile sizes of the Triton kernels and the arithmetic behind them. Not yet run on a GPU.

Limits used: shared memory a program may have, 163 KB (sm_80) and 227 KB (sm_90); 255 registers a
thread; 64 KB of registers an SM; an fp32 accumulator of N x M costs N * M / (32 * warps)
registers a thread. Every choice compiles for both architectures without a spill.

Only shapes choose a tile. In batch-invariant mode the number of rows chooses only sizes that do
not change a row's arithmetic: the long side of a product's tile stays a multiple of 64 (one wgmma
warp group each 4 warps), K is walked in the instruction's own steps, and attention has one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Tile of weight[n, k] @ x[m, k].T: n weight rows, m tokens, k columns a step."""

    n: int
    m: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class RowTile:
    """Tile of a row-wise reduction: whole rows of `columns`, a power of two."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Query rows a program takes (the key tile is the page), and how its splits are merged.

    merge: "kernel" (each split has its own program, a second kernel merges), "registers" (one
    program runs all splits and keeps the merged ones beside the current), or "none" (no splits).
    """

    m: int
    num_warps: int
    num_stages: int
    merge: str


# 1,024 elements over 4 warps are 8 a thread: one 16-byte access of bf16, two of fp32.
ELEMENTWISE_BLOCK = 1024

# Weight tiles that share their token tiles through L2: 8 x 128 rows x K of 4,096 in bf16 are 8 MB
# of 40 to 50 MB.
TILE_GROUP = 8

# One program walks a row of logits (L2 after the scores kernel): 4,096 floats over 16 warps are
# 8 a thread in flight, enough for the 64 bytes a clock of one SM.
CUTOFF_BLOCK = 4096
CUTOFF_WARPS = 16

# Programs that fill the GPU once; the fast mode splits K until there are about so many.
PROGRAMS_WANTED = 264  # 2 on each of the H100's 132 SMs
MAX_SPLITS = 16


def row_tile(n: int) -> RowTile:
    """At least 1,024 elements a program (a 64-wide head norm takes 16 rows), 16 a thread.

    Raises ValueError above 65,536 columns: 32 warps would hold more than 64 values a thread.
    """
    columns = triton.next_power_of_2(n)
    if columns > 65536:
        raise ValueError(f"rms_norm takes rows of at most 65536 values, not {n}")
    return RowTile(
        rows=max(1, 1024 // columns), columns=columns, num_warps=min(32, max(4, columns // 512))
    )


# bf16: step of 64 columns = 128 bytes a row, one full swizzled line. Large: 128 x 128 x 2 bytes
# x 64 x 4 stages = 128 KB, accumulator 64 registers a thread at 8 warps. Few tokens: the weight is
# read once, 64 rows x 128 columns x 4 stages = 64 KB in flight a program.
# fp32 runs on FMA units (64 a clock an SM sub-partition group): small tiles, K of 16.
_LINEAR_BF16 = {
    16: ProductTile(64, 16, 128, 4, 4),
    32: ProductTile(64, 32, 128, 4, 4),
    64: ProductTile(128, 64, 64, 8, 4),
    128: ProductTile(128, 128, 64, 8, 4),
}
_LINEAR_FP32 = {
    16: ProductTile(64, 16, 32, 4, 3),
    64: ProductTile(64, 64, 16, 4, 3),
}
# Quantized: a step of k columns is k / 32 unrolled block products, each with its scales; codes
# become operands in registers (the weights are wgmma's register operand). Large: product and sum
# of 256 x 64 take 128 registers a thread at 8 warps, and a token's scales, which every row of the
# tile needs, only 64 / 4; a 128 x 128 tile needs 128 / 4 twice and spills up to 2,316 bytes.
_QUANT = {
    16: ProductTile(64, 16, 128, 4, 3),
    32: ProductTile(64, 32, 64, 4, 3),
    64: ProductTile(64, 64, 32, 4, 3),
    128: ProductTile(256, 64, 32, 8, 3),
}
_QUANT_FP32 = {
    16: ProductTile(64, 16, 32, 4, 2),
    64: ProductTile(64, 64, 32, 8, 2),
}


def linear_tile(m: int, dtype: torch.dtype) -> ProductTile:
    """Tile of a dense product of m tokens."""
    return _for_tokens(_LINEAR_FP32 if dtype == torch.float32 else _LINEAR_BF16, m)


def quant_tile(m: int, activation: str) -> ProductTile:
    """Tile of a packed product of m tokens in an activation mode."""
    return _for_tokens(_QUANT_FP32 if activation == "fp32" else _QUANT, m)


def _for_tokens(table: dict[int, ProductTile], m: int) -> ProductTile:
    return next((tile for size, tile in table.items() if m <= size), table[max(table)])


def k_splits(n_programs: int, m: int, k: int, step: int) -> int:
    """How many programs share one output tile's K in the fast mode: 1 above 64 tokens.

    Each split keeps at least 4 steps, so that its pipeline fills.
    """
    if m > 64:
        return 1
    return max(1, min(PROGRAMS_WANTED // n_programs, MAX_SPLITS, k // (4 * step)))


def attention_tile(
    n_tokens: int,
    n_seqs: int,
    n_splits: int,
    dtype: torch.dtype,
    dim: int,
    batch_invariant: bool = True,
) -> AttentionTile:
    """Tile of the attention kernel, and where the splits of the cache meet.

    The tile depends on head dim and dtype alone, so prompts and single tokens share it. 64 rows
    are one wgmma. A token of 4 grouped heads then wastes 60 of 64 rows, yet 64 rows x 4 FLOP for
    each 4 bytes of K and V are 64 FLOP a byte, below the H100's 180 and A100's 156: decoding
    stays bandwidth-bound. Two outputs of 64 x 128 (this split's and the merged one) take 128
    registers a thread at 4 warps and spill 108 (sm_90) to 244 bytes (sm_80); 8 warps take 202 and
    236 without. Keeping the merged one in memory instead costs the pipelining of K and V.

    The fast mode does not restart prompts at splits: 4 warps then hold 64 x 128 (240 and 255
    registers). 128 rows over 8 warps would suit sm_90 better (185), but spill 144 bytes on sm_80.
    Few query rows, as in decoding, give every split its own program; prompts cannot, for that
    keeps n_splits x n_tokens rows of fp32. For decoding, ptxas reports wgmma waits ("serialized")
    at any number of stages above 1: the next tile's loads are worth more. fp32 runs on FMA units:
    few rows.
    """
    few = n_tokens <= max(n_seqs, 16)
    if n_splits == 1:
        merge = "none"
    elif few:
        merge = "kernel"
    else:
        merge = "registers" if batch_invariant else "none"
    if dtype == torch.float32:
        if dim <= 64:
            return AttentionTile(16, 4, 2, merge)
        return AttentionTile(16 if dim <= 128 else 4, 8, 3, merge)
    if dim > 128:
        return AttentionTile(16, 8, 2, merge)
    if few and not batch_invariant:
        return AttentionTile(16, 4, 3, merge)
    warps = 8 if dim > 64 and batch_invariant else 4
    return AttentionTile(64, warps, 2, merge)

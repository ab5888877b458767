"""Tiles of attention (dense, packed, paged, compressed), and the arithmetic behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """m query rows by n keys of a step, and how the splits of the keys are merged.

    merge: "kernel" (each split has its own program, a second kernel merges), "registers" (one
    program runs all splits and keeps the merged ones beside the current), or "none" (no splits).
    """

    m: int
    n: int
    num_warps: int
    num_stages: int
    merge: str


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What chooses an attention tile: tokens of all sequences, splits of the longest possible."""

    n_tokens: int
    n_seqs: int
    n_splits: int
    n_heads: int
    group: int  # heads of q to one of k
    dim: int
    value_dim: int
    dtype: torch.dtype
    paged: bool
    plain: bool  # no key mask, no softcap, no int8 codes
    codes: bool  # int8


# Tiles of attention: columns of q.k or of o -> m query rows, n keys a step, warps, stages. Best is
# m = 16 times the warps: a warp then owns whole rows, and P stays in its registers between the
# products; elsewhere warps share rows and exchange P through shared memory.
#
# The arithmetic, D = 128 in bf16 on an H100 (990 TFLOP/s of wgmma, 4,096 FLOP a clock an SM; 16
# exp2 and 128 fp32 operations a clock an SM): a score costs 4 * 128 FLOP = 0.125 clocks of tensor
# cores, one exp2 = 0.063, and scale, maximum, sum and rounding, about 5 operations = 0.04. The
# warp groups of a program overlap the one with the other, so the roof is the tensor cores' (D = 64:
# 0.063 against 0.063 + 0.04, the exponentials'). A tile of 128 x 128 holds 64 + 64 registers of o
# and scores and 32 of P; measured by ptxas 242. Keys and values cross L2 once for each 128 rows:
# 4 * 128 * 128 FLOP for 512 bytes are 128 FLOP a byte, 3.1 TB/s at 400 TFLOP/s of 5.5. Shared
# memory: q 32 KB, and 64 KB a stage.
# A mask, a softcap or int8 codes take registers: those steps have half the keys.
_ATTENTION = {
    90: {
        64: (128, 128, 8, 3),
        128: (128, 128, 8, 3),
        192: (128, 128, 8, 2),
        256: (128, 64, 8, 2),
        512: (32, 32, 8, 2),
    },
    80: {
        64: (128, 64, 8, 3),
        128: (128, 64, 8, 3),
        192: (128, 32, 8, 2),
        256: (64, 64, 8, 2),
        512: (32, 32, 8, 2),
    },
}
# 89: those of 80, but where they do not fit in 99 KB.
_ATTENTION[89] = _ATTENTION[80] | {256: (64, 32, 8, 2)}
# Two outputs: this split's and the merged one. 128 rows by 8 warps and 64 by 4 are the same rows a
# warp, of the same instructions: prompts take the first, single tokens the second.
_ATTENTION_INVARIANT = {
    90: {
        64: (128, 64, 8, 3),
        128: (128, 64, 8, 3),
        192: (128, 64, 8, 3),
        256: (64, 32, 8, 2),
        512: (16, 32, 8, 3),
    },
    80: {
        64: (128, 64, 8, 2),
        128: (64, 64, 8, 2),
        192: (64, 64, 8, 2),
        256: (32, 64, 8, 2),
        512: (16, 32, 8, 3),
    },
}
_ATTENTION_INVARIANT[89] = _ATTENTION_INVARIANT[80] | {512: (16, 32, 8, 2)}
# Few query rows: bandwidth. 64 keys of 128 + 128 columns are 32 KB a step; 4 programs an SM keep
# twice the 25 KB in flight that 3.35 TB/s over 132 SMs and 1 us of latency ask for. A token of 4
# heads fills 4 rows of 16, 16 FLOP for each 2 bytes: far below the 295 FLOP a byte of the roof.
_ATTENTION_FEW = {
    128: (16, 64, 4, 4),
    192: (16, 64, 4, 3),
    256: (16, 64, 4, 2),
    512: (16, 32, 8, 2),
}
# fp32 runs on FMA units, whose operands pass through registers: 128 FLOP a clock an SM at best.
_ATTENTION_FP32 = {
    64: (32, 32, 4, 2),
    256: (32, 32, 8, 2),
    512: (16, 16, 8, 2),
}
_ATTENTION_FP32_89 = _ATTENTION_FP32 | {256: (16, 32, 8, 2)}
MAX_PARTIAL_BYTES = 1 << 28  # of the fp32 outputs of parallel splits


def attention_tile(shape: AttentionShape, arch: int, batch_invariant: bool) -> AttentionTile:
    """Tile of the attention kernel, and where the splits of the keys meet.

    Batch-invariant, it depends on the GPU, the head dims, the dtype and the variant alone, up to
    how rows are dealt to programs. Few query rows, as in decoding, give every split its own
    program; prompts cannot, for that keeps n_splits x n_tokens rows of fp32.
    """
    columns = max(sum(column_blocks(shape.dim)), triton.next_power_of_2(shape.value_dim))
    partial = 4 * shape.n_splits * shape.n_tokens * shape.n_heads * shape.value_dim
    few = shape.n_tokens <= max(shape.n_seqs, 16) and partial <= MAX_PARTIAL_BYTES
    if shape.n_splits == 1:
        merge = "none"
    elif few:
        merge = "kernel"
    else:
        merge = "registers" if batch_invariant else "none"
    if shape.dtype == torch.float32:
        m, n, warps, stages = for_columns(
            _ATTENTION_FP32_89 if arch == 89 else _ATTENTION_FP32, columns
        )
        return AttentionTile(m, n if shape.plain else max(16, n // 2), warps, stages, merge)
    if batch_invariant:
        m, n, warps, stages = for_columns(_ATTENTION_INVARIANT[arch], columns)
        if few and m == 128:
            m, warps = 64, 4
    elif few:
        m, n, warps, stages = for_columns(_ATTENTION_FEW, columns)
        rows = triton.cdiv(shape.n_tokens, shape.n_seqs) * shape.group
        m = max(m, min(triton.next_power_of_2(rows), 64 if columns <= 128 else 16))
    else:
        m, n, warps, stages = for_columns(_ATTENTION[arch], columns)
    if shape.paged:
        n = min(n, 64)  # a page
    if not shape.plain:
        n = max(32, n // 2)
        if columns > 192 and (batch_invariant or shape.codes):
            m = min(m, 32)
        elif columns == 192 and shape.codes and arch != 90:
            m, stages = min(m, 64), 3  # with 128 rows or 2 stages Triton 3.6 spills 8 to 16 bytes
    return AttentionTile(m, n, warps, stages, merge)


def for_columns(table: dict[int, tuple[int, ...]], columns: int) -> tuple[int, ...]:
    """The row of the smallest width that holds the columns; the last for more."""
    return next((tile for size, tile in table.items() if columns <= size), table[max(table)])


def column_blocks(dim: int) -> tuple[int, int]:
    """A head's columns as one or two blocks, powers of two: 128 is (128, 0), 192 (128, 64).

    The second block is left out where one larger block is no wider (120), and up to 64 columns,
    where fewer and larger instructions weigh more.
    """
    whole = max(16, triton.next_power_of_2(dim))
    if dim <= 64 or dim == whole:
        return whole, 0
    rest = max(16, triton.next_power_of_2(dim - whole // 2))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


def mla_tile(
    n_tokens: int,
    n_heads: int,
    n_seqs: int,
    n_splits: int,
    dtype: torch.dtype,
    arch: int,
    batch_invariant: bool = True,
) -> AttentionTile:
    """Tile of the MLA kernel: rows of 512 + 64 columns, all heads of a token are query rows.

    A cached position is 1,152 bytes of bf16 and costs H rows 2 x (576 + 512) FLOP each: 30 FLOP a
    byte with 16 heads, far below the 156 (A100) and 295 (H100) where memory stops being the bound,
    242 with 128 heads, which the tensor cores bound: on an H100 too, where mma.sync has about 60%
    of wgmma's rate.

    An output of 16 x 512 takes 32 registers a thread at 8 warps, as much again where the merged
    splits stay beside it: 177 in all. 32 positions are 36 KB a step, so that two steps in flight
    and q take 91 KB: one program an SM on sm_80, two on sm_90. 64 positions would take 164 KB, 1 KB
    more than sm_80 has. 5 stages are two steps, because the page table is read first. The rows of
    128 heads are 8 such tiles, which read a page 7 times from L2: the fast mode takes 32 rows (217
    registers). 64 rows, one wgmma, spill 128 to 304 bytes at 8 warps, and more at 16, whose
    threads have 128 registers. fp32 runs on FMA units: 16 positions.
    """
    few = n_tokens <= max(n_seqs, 16)
    if n_splits == 1:
        merge = "none"
    elif few:
        merge = "kernel"
    else:
        merge = "registers" if batch_invariant else "none"
    if dtype == torch.float32:
        return AttentionTile(16, 16, 8, 3, merge)
    wide = not batch_invariant and arch != 89 and n_tokens * n_heads >= 32 * n_seqs
    return AttentionTile(32 if wide else 16, 32, 8, 5, merge)

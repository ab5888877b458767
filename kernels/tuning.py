"""Tile sizes of the Triton kernels and the arithmetic behind them. Not yet run on a GPU.

Limits used: shared memory a program may have, 163 KB (sm_80) and 227 KB (sm_90); 255 registers a
thread; 64 KB of registers an SM; an fp32 accumulator of N x M costs N * M / (32 * warps)
registers a thread. Every choice compiles for both architectures without a spill.

Only shapes choose a tile. In batch-invariant mode the number of rows chooses only sizes that do
not change a row's arithmetic: the long side of a product's tile stays a multiple of 64 (one wgmma
warp group each 4 warps), K is walked in the instruction's own steps, and attention has one tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


# 1,024 elements over 4 warps are 8 a thread: one 16-byte access of bf16, two of fp32.
ELEMENTWISE_BLOCK = 1024

# Gradients of weights and of tables, in a fixed order. A program's sum of dweight costs 8 bytes a
# column, written and read: over 16 rows of bf16 (6 bytes an element) 8%, and 2,048 rows of 4,096
# are still 128 programs for 132 SMs. Sums of columns and of ids load some rows at once.
NORM_GRADIENT_TILES = 16
NORM_GRADIENT_COLUMNS = 8192  # 16 values a thread of 16 warps; rows above are read twice
COLUMN_SUMS_ROWS = 32
COLUMN_SUMS_BLOCK = 64
EMBEDDING_TOKENS = 4
SQUARES_TILES = 16  # 16 x 1,024 elements a program

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


# Input gradient of a packed weight: n columns of dx, m rows, k rows of W a step. Codes and scales
# become an operand through registers, so the step is short; one tile for any number of tokens.
INPUT_GRAD_BF16 = ProductTile(128, 128, 32, 8, 3)
INPUT_GRAD_FP32 = ProductTile(64, 64, 16, 4, 2)

# The last product of an adapter: few columns, so bytes of base and y count; 64 x 64 fp32 sums and
# as many values of base take 64 registers a thread at 4 warps. One tile for any number of tokens.
LORA_TILE = ProductTile(64, 64, 32, 4, 2)


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
        m, n, warps, stages = _for_columns(_ATTENTION_FP32, columns)
        return AttentionTile(m, n if shape.plain else max(16, n // 2), warps, stages, merge)
    if batch_invariant:
        m, n, warps, stages = _for_columns(_ATTENTION_INVARIANT[arch], columns)
        if few and m == 128:
            m, warps = 64, 4
    elif few:
        m, n, warps, stages = _for_columns(_ATTENTION_FEW, columns)
        rows = triton.cdiv(shape.n_tokens, shape.n_seqs) * shape.group
        m = max(m, min(triton.next_power_of_2(rows), 64 if columns <= 128 else 16))
    else:
        m, n, warps, stages = _for_columns(_ATTENTION[arch], columns)
    if shape.paged:
        n = min(n, 64)  # a page
    if not shape.plain:
        n = max(32, n // 2)
        if columns > 192 and (batch_invariant or shape.codes):
            m = min(m, 32)
    return AttentionTile(m, n, warps, stages, merge)


def _for_columns(table: dict[int, tuple[int, ...]], columns: int) -> tuple[int, ...]:
    return next((tile for size, tile in table.items() if columns <= size), table[max(table)])


# --- the backward of attention ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionBackwardTile:
    """Keys and query rows of one step of a pass; its programs own one side, and walk the other.

    edge: the walked side's rows in a step that needs masks, a divisor of a whole step's.
    """

    keys: int
    queries: int
    edge: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionBackwardTiles:
    """by_keys: the pass of dK and dV, whose programs own keys; by_queries: the pass of dQ.

    apart: dK and dV have a launch each, for 8 products of which fewer accumulators live at once.
    """

    by_keys: AttentionBackwardTile
    by_queries: AttentionBackwardTile
    apart: bool = False


assumed_architecture = 90  # of tensors on no GPU, as when kernels are compiled ahead of time


def architecture(device: torch.device) -> int:
    """80 or 90: whose tiles a device takes. sm_12x has shared memory for the smaller ones."""
    if device.type != "cuda":
        return assumed_architecture
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if 9 <= major < 12 else 80


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


def row_statistics_tile(dim: int) -> RowTile:
    """Two tensors of 4,096 elements over 4 warps: 32 a thread each, 64 bytes in flight of bf16."""
    columns = max(16, triton.next_power_of_2(dim))
    return RowTile(rows=max(1, 4096 // columns), columns=columns, num_warps=4)


# Keys, queries, edge, warps, stages, by the columns of K and V together.
#
# The pass of dK and dV has N x (D + Dv) fp32 accumulators. 128 keys over 8 warps are two wgmma of
# 64 rows, and at D = 128 those take 128 of a thread's 255 registers; S, dP and P of 128 x 64 take
# 80 more, and there is room for one row address of each operand. The step is 4 products of
# 128 x 64 x 128: 2,048 clocks of an SM's tensor cores (4,096 FLOP a clock), against 1,180 issue
# slots of each scheduler and 224 KB of shared memory traffic, 1,792 clocks (S and dP read both
# operands there, dK and dV one); with 32 queries the last would be 1.1 times the first. L2 gives
# 32 KB a step, 256 FLOP a byte. The edge steps hold masks as well and take 16 queries (32 spill 16
# bytes with Triton 3.6); softcap keeps a derivative too and takes 32 queries in whole steps. The
# pass of dQ has half the accumulators: 128 queries x 64 keys take 200 registers, 1,536 clocks of
# products and as many of shared memory.
# 7 products where 5 are counted: 230 TFLOP/s of an H100 are 322 of its 989 (33%).
#
# Above 320 columns the accumulators alone would fill the registers (256 x 128 x 4 bytes twice), so
# dK and dV go apart: 8 products. At D = 512, 128 keys of one take them all: 32 keys by mma.sync.
# sm_80's mma.sync reads its operands through registers: half the keys of a step, or queries.
_BACKWARD_BY_KEYS = {
    90: {
        128: (128, 64, 32, 8, 3),
        256: (128, 64, 16, 8, 2),
        320: (128, 32, 16, 8, 2),
        512: (128, 32, 16, 8, 2),
        1024: (32, 32, 16, 8, 1),
    },
    80: {
        128: (128, 64, 32, 8, 2),
        192: (64, 16, 16, 4, 2),
        256: (64, 32, 16, 4, 2),
        512: (64, 16, 16, 8, 2),
        1024: (32, 32, 16, 8, 1),
    },
}
_BACKWARD_APART = 320  # columns above which dK and dV are apart
# The same by the columns of the wider of K and V.
_BACKWARD_BY_QUERIES = {
    90: {
        64: (128, 128, 64, 8, 2),
        192: (64, 128, 32, 8, 2),
        256: (32, 128, 32, 8, 2),
        512: (16, 32, 16, 8, 1),
    },
    80: {
        64: (64, 128, 32, 8, 2),
        96: (32, 128, 16, 8, 2),
        128: (64, 128, 32, 8, 2),
        256: (32, 64, 16, 8, 2),
        512: (16, 32, 16, 8, 1),
    },
}
# fp32 runs on FMA units: 128 FLOP a clock an SM, whatever the tile; its operands are registers.
_BACKWARD_FP32_BY_KEYS = {
    128: (32, 32, 16, 8, 1),
    256: (16, 32, 16, 8, 1),
    1024: (16, 16, 16, 8, 1),
}
_BACKWARD_FP32_BY_QUERIES = {
    90: {64: (32, 16, 16, 8, 1), 512: (16, 16, 16, 8, 1)},
    80: {64: (32, 32, 16, 8, 1), 128: (16, 16, 16, 4, 1), 512: (16, 16, 16, 8, 1)},
}


def backward_column_blocks(
    dtype: torch.dtype, dim: int, value_dim: int, arch: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """`column_blocks` of K and V where a second block's operands and addresses find registers.

    They do not on FMA units, nor on sm_80 beside 128 columns (192 spill 60 bytes): one block then.
    But FMA units keep all columns of an operand in registers: of 512 they spill 332 bytes on sm_90,
    with K in two blocks none, with V too 16 (and with K in two blocks 8 on sm_80).
    """

    def blocks(columns: int) -> tuple[int, int]:
        if dtype == torch.float32 or (arch == 80 and columns > 128):
            return max(16, triton.next_power_of_2(columns)), 0
        return column_blocks(columns)

    of_keys = blocks(dim)
    if dtype == torch.float32 and of_keys == (512, 0) and arch == 90:
        of_keys = (256, 256)
    return of_keys, blocks(value_dim)


def attention_backward_tiles(
    dtype: torch.dtype, dim: int, value_dim: int, softcap: bool, masked: bool, arch: int
) -> AttentionBackwardTiles:
    """Tiles of both passes, by head dims and variant: no row's order of sums depends on lengths."""
    columns = [sum(blocks) for blocks in backward_column_blocks(dtype, dim, value_dim, arch)]
    by_keys, by_queries = _BACKWARD_BY_KEYS[arch], _BACKWARD_BY_QUERIES[arch]
    if dtype == torch.float32:
        by_keys, by_queries = _BACKWARD_FP32_BY_KEYS, _BACKWARD_FP32_BY_QUERIES[arch]
    keys = AttentionBackwardTile(*_for_columns(by_keys, sum(columns)))
    if softcap and sum(columns) > 128:
        most = 16 if 256 < sum(columns) <= _BACKWARD_APART else 32
        keys = replace(keys, queries=min(keys.queries, most), edge=16)
    queries = AttentionBackwardTile(*_for_columns(by_queries, max(columns)))
    if masked and max(columns) > 256:  # a key mask beside 32 queries of 512 spills 40 bytes
        queries = replace(queries, queries=16)
    return AttentionBackwardTiles(
        keys,
        queries,
        apart=dtype != torch.float32 and sum(columns) > _BACKWARD_APART,
    )


# --- attention over compressed pages ------------------------------------------------------------


def mla_tile(
    n_tokens: int,
    n_heads: int,
    n_seqs: int,
    n_splits: int,
    dtype: torch.dtype,
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
    wide = not batch_invariant and n_tokens * n_heads >= 32 * n_seqs
    return AttentionTile(32 if wide else 16, 32, 8, 5, merge)

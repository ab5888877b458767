"""Tile sizes of the Triton kernels and the arithmetic behind them. Not yet run on a GPU.

Limits used: shared memory a program may have, 163 KB (sm_80), 227 KB (sm_90) and 99 KB (sm_86,
sm_89, sm_12x); 255 registers a thread; 64 KB of registers an SM; an fp32 accumulator of N x M costs
N * M / (32 * warps) registers a thread. Every choice compiles for sm_80 and sm_90 without a spill.

Only shapes choose a tile. In batch-invariant mode the number of rows chooses only sizes that do
not change a row's arithmetic: the long side of a product's tile stays a multiple of 64 (one wgmma
warp group each 4 warps), K is walked in the instruction's own steps, and attention has one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .quant_format import FORMATS, has_minimum, unit_columns
from .triton_compat import INTERPRET


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

# Tokens whose statistics a program of the router adds up: their sums are 8 bytes an expert against
# 64 of logits, and 2,048 tokens are still 128 programs.
GATE_CHUNK = 16

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

assumed_architecture = 90  # of tensors on no GPU, as when kernels are compiled ahead of time


def architecture(device: torch.device) -> int:
    """Whose tiles a device takes: 90, 80, or 89, those of 80 within 99 KB of shared memory.

    sm_86, sm_89 and sm_12x have 99 KB a program, sm_80 and sm_87 163 KB, sm_90 and sm_10x 227 KB.
    """
    if device.type != "cuda":
        return assumed_architecture
    major, minor = torch.cuda.get_device_capability(device)
    if 9 <= major < 12:
        return 90
    return 80 if (major, minor) in ((8, 0), (8, 7)) else 89


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether the device's matrix instructions take e4m3: Hopper's and Blackwell's do."""
    return not INTERPRET and architecture(device) == 90


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


def gate_rows(columns: int) -> int:
    """Rows of logits a step: 16 values a thread of 4 warps, whose keys take 32 registers."""
    return min(GATE_CHUNK, max(1, 2048 // columns))


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
# Packed weights: a step of k columns is that many units (`quant_format.unit_columns`, at least 1),
# each product beside the sums: twice n * m / (32 * warps) registers. Codes become operands in
# registers, n rows of them: 256 x 128 columns of bf16 take 64 a thread at 8 warps, 128 x 128 half.
# Few tokens: bytes of weights. 64 rows x 64 bytes x 4 stages are 16 KB in flight a program, and
# 3.35 TB/s x 0.7 us are 17 KB an SM; m of the instruction is 64, so a program takes no fewer rows.
# Many tokens, registers by ptxas with Triton 3.7 (sm_90, then sm_80):
# - bf16 without minimum, 128 x 128: 172 (q4_0) to 250; a code is decoded once for 128 tokens. mma
#   takes x from registers too: sm_80 spills 2,296 bytes at units of 128 columns; 128 x 64 takes 142
#   to 249, units of 32 columns 256 x 64 (173 to 239). With a minimum each token's sum takes 128 / 4
#   registers more: 256 x 64 on sm_90 where a unit is 32 columns (230 to 254), else 128 x 64; on
#   sm_80 128 x 64 and 128 x 32 (128 x 64 of experts spills 32 bytes). q6_k, with two scales a
#   unit, 128 x 64 (128 x 128 spills 32 bytes with Triton 3.8).
# - int8 has a scale of each token beside each 32 columns, and 4 FMA-unit instructions for 64
#   operations of the product: the epilogue bounds any tile. 128 x 64; at 256 x 64 q6_k and experts
#   spill up to 364 bytes.
# - fp8, 128 x 64: 199; 128 x 128 spills 184 bytes. On sm_80, whose operands are bf16, 128 x 32.
# fp32 runs on FMA units, 32 columns at a time.
_QUANT_FEW = {
    16: ProductTile(64, 16, 128, 4, 4),
    32: ProductTile(64, 32, 64, 4, 3),
    64: ProductTile(64, 64, 32, 4, 3),
}
_QUANT_FP32 = {
    16: ProductTile(64, 16, 32, 8, 2),
    64: ProductTile(64, 32, 32, 8, 2),
}
# Gated: n rows of gate and n of up, sums of both beside a product. 128 x 64 takes up to 202
# registers on sm_90, with minima, q6_k or wide units of bytes 236 and more: 64 x 64. On sm_80
# minima, wide units and int8 take 64 x 32 (162 to 246; 64 x 64 spills up to 452 bytes). Few tokens
# of 5-bit codes, whose fifth bits are words of their own, take 96 to 128 at 32 columns a step; at
# 64, 128 to 182, and q5_0 spills 8 bytes on sm_80. Five programs an SM are 60 KB in flight.
_QUANT_GATED_FEW = {
    16: ProductTile(64, 16, 64, 4, 4),
    32: ProductTile(64, 32, 32, 4, 3),
}
_QUANT_GATED_FEW_5_BITS = _QUANT_GATED_FEW | {16: ProductTile(64, 16, 32, 4, 4)}
# fp32: 32 x 32 takes 90 to 134 registers at 4 warps. Wide units of bytes, gated or not, spill 8
# bytes at 64 x 32 and 12 at 4 warps; q6_k 8 at 32 x 16 on sm_80. Few tokens of int4 units of 128
# columns take 74 to 80 at three stages; at two int4_g128 is held to 64 on sm_80 and spills 16.
_QUANT_GATED_FP32 = {
    16: ProductTile(32, 16, 32, 4, 2),
    64: ProductTile(32, 32, 32, 4, 2),
}
_QUANT_FP32_BYTES = {
    16: ProductTile(32, 16, 32, 8, 2),
    64: ProductTile(32, 32, 32, 8, 2),
}
_QUANT_FP32_WIDE = _QUANT_FP32 | {16: ProductTile(64, 16, 32, 8, 3)}

# Input gradient of a packed weight: n columns of dx, m rows, k rows of W a step. Codes and scales
# become an operand through registers, so the step is short; one tile for any number of tokens.
INPUT_GRAD_BF16 = ProductTile(128, 128, 32, 8, 3)
INPUT_GRAD_FP32 = ProductTile(64, 64, 16, 4, 2)

# The last product of an adapter: few columns, so bytes of base and y count; 64 x 64 fp32 sums and
# as many values of base take 64 registers a thread at 4 warps. One tile for any number of tokens.
LORA_TILE = ProductTile(64, 64, 32, 4, 2)


def linear_tile(m: int, dtype: torch.dtype) -> ProductTile:
    """Tile of a dense product of m tokens."""
    return tile_for(_LINEAR_FP32 if dtype == torch.float32 else _LINEAR_BF16, m)


def quant_tile(m: int, format: str, mode: str, gated: bool, device: torch.device) -> ProductTile:
    """Tile of a packed product of m tokens; of n rows of gate and n of up if gated."""
    bits = FORMATS[format].bits
    if mode == "fp32":
        return _fp32_tile(m, bits, int(unit_columns(format, mode)), gated)
    few = _QUANT_FEW
    if gated:
        few = _QUANT_GATED_FEW_5_BITS if bits == 5 else _QUANT_GATED_FEW
    columns, tokens = (_gated_size if gated else _product_size)(
        format, mode, architecture(device) == 90
    )
    if m <= min(max(few), tokens):
        return tile_for(few, m)
    return ProductTile(columns, tokens, 32, 8, 3)


def _fp32_tile(m: int, bits: int, unit: int, gated: bool) -> ProductTile:
    """Tile of a product of m tokens in mode fp32, `unit` columns of codes of `bits` a unit."""
    if bits == 8 and unit > 32:
        return tile_for(_QUANT_FP32_BYTES, m)
    if gated:
        return _QUANT_GATED_FP32[64] if bits == 6 else tile_for(_QUANT_GATED_FP32, m)
    return tile_for(_QUANT_FP32_WIDE if unit > 64 else _QUANT_FP32, m)


def _product_size(format: str, mode: str, hopper: bool) -> tuple[int, int]:
    """(n, m) of the tile of a product of many tokens."""
    wide, minimum = int(unit_columns(format, mode)) > 32, bool(has_minimum(format))
    if mode == "bf16" and FORMATS[format].bits != 6:
        if hopper and not minimum:
            return 128, 128
        if not wide and (hopper or not minimum):
            return 256, 64
    heavy = not hopper and wide and (minimum or mode == "fp8")
    return 128, (32 if heavy else 64)


def _gated_size(format: str, mode: str, hopper: bool) -> tuple[int, int]:
    """(n, m) of the tile of a gated product of many tokens."""
    wide, minimum = int(unit_columns(format, mode)) > 32, bool(has_minimum(format))
    heavy = minimum or FORMATS[format].bits == 6 or (wide and FORMATS[format].bits == 8)
    if hopper:
        return (128 if mode == "bf16" and not heavy else 64), 64
    return 64, (32 if mode == "int8" or wide or minimum else 64)


def tile_for(table: dict[int, ProductTile], m: int) -> ProductTile:
    """The tile of a table {most rows: tile}, ascending, for m rows; above all of them the last."""
    return next((tile for size, tile in table.items() if m <= size), table[max(table)])


def k_splits(n_programs: int, m: int, k: int, step: int) -> int:
    """How many programs share one output tile's K in the fast mode: 1 above 64 tokens.

    Each split keeps at least 4 steps, so that its pipeline fills.
    """
    if m > 64:
        return 1
    return max(1, min(PROGRAMS_WANTED // n_programs, MAX_SPLITS, k // (4 * step)))

"""Tiles of the backward of attention, and the arithmetic behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from .attention_tuning import column_blocks, for_columns
from .tuning import RowTile


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
_BACKWARD_BY_KEYS[89] = _BACKWARD_BY_KEYS[80] | {1024: (32, 16, 16, 8, 1)}
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
_BACKWARD_BY_QUERIES[89] = _BACKWARD_BY_QUERIES[80] | {
    128: (32, 128, 16, 8, 2),
    256: (32, 64, 16, 8, 1),
}
# fp32 runs on FMA units: 128 FLOP a clock an SM, whatever the tile; its operands are registers.
_BACKWARD_FP32_BY_KEYS = {
    128: (32, 32, 16, 8, 1),
    256: (16, 32, 16, 8, 1),
    1024: (16, 16, 16, 8, 1),
}
_BACKWARD_FP32_BY_KEYS_89 = {
    128: (32, 32, 16, 8, 1),
    256: (16, 32, 16, 8, 1),
    512: (16, 16, 16, 8, 1),
    1024: (8, 16, 16, 16, 1),  # 8 warps spill 8 to 16 bytes
}
_BACKWARD_FP32_BY_QUERIES = {
    90: {64: (32, 16, 16, 8, 1), 512: (16, 16, 16, 8, 1)},
    80: {64: (32, 32, 16, 8, 1), 128: (16, 16, 16, 4, 1), 512: (16, 16, 16, 8, 1)},
    # Four operands of 512 columns take 32 KB each with 16 rows: 96 KB with 8 of the owner's.
    89: {
        64: (32, 32, 16, 8, 1),
        128: (16, 16, 16, 4, 1),
        256: (16, 16, 16, 8, 1),
        512: (16, 8, 16, 8, 1),
    },
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
        if dtype == torch.float32 or (arch < 90 and columns > 128):
            return max(16, triton.next_power_of_2(columns)), 0
        return column_blocks(columns)

    of_keys = blocks(dim)
    if dtype == torch.float32 and of_keys == (512, 0) and arch != 80:
        of_keys = (256, 256)
    return of_keys, blocks(value_dim)


def attention_backward_tiles(
    dtype: torch.dtype, dim: int, value_dim: int, softcap: bool, masked: bool, arch: int
) -> AttentionBackwardTiles:
    """Tiles of both passes, by head dims and variant: no row's order of sums depends on lengths."""
    columns = [sum(blocks) for blocks in backward_column_blocks(dtype, dim, value_dim, arch)]
    by_keys, by_queries = _BACKWARD_BY_KEYS[arch], _BACKWARD_BY_QUERIES[arch]
    if dtype == torch.float32:
        by_keys = _BACKWARD_FP32_BY_KEYS_89 if arch == 89 else _BACKWARD_FP32_BY_KEYS
        by_queries = _BACKWARD_FP32_BY_QUERIES[arch]
    keys = AttentionBackwardTile(*for_columns(by_keys, sum(columns)))
    if softcap and sum(columns) > 128:
        most = 16 if arch == 89 or 256 < sum(columns) <= _BACKWARD_APART else 32
        keys = replace(keys, queries=min(keys.queries, most), edge=16)
    queries = AttentionBackwardTile(*for_columns(by_queries, max(columns)))
    if masked and max(columns) > 256:  # a key mask beside 32 queries of 512 spills 40 bytes
        queries = replace(queries, queries=16)
    return AttentionBackwardTiles(
        keys,
        queries,
        apart=dtype != torch.float32 and sum(columns) > _BACKWARD_APART,
    )

"""Which rows each program of a grouped product takes, decided on the device.

The host knows only how many rows there are, not how many each expert has, and never asks: a launch
has as many programs as any split of the rows could need, reads its tile from a list that one small
kernel wrote, and returns where the list has ended. So nothing synchronizes and a graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAN_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiles of at most `block_m` rows, none of two experts.

    tiles: int32 [3, n_tiles]: expert (-1: no tile), first row, end of the expert's rows. The rows
    after the last expert's are those of expert E, where asked for.
    row_of_slot: int32 [n_rows]: where a slot's row is. Written only for slots that have a row: what
    is read there counts only if slots[row] is that slot (so nothing needs to be filled first).
    """

    tiles: Tensor
    row_of_slot: Tensor
    slots: Tensor
    block_m: int

    @property
    def n_tiles(self) -> int:
        return self.tiles.shape[1]


@triton.jit
def plan_kernel(
    tiles_ptr,
    row_of_slot_ptr,
    offsets_ptr,
    slots_ptr,
    n_experts,
    n_rows,
    n_tiles,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    if group <= n_experts:
        e = tl.arange(0, EXPERTS)
        begin = tl.load(offsets_ptr + e, mask=e <= n_experts, other=0)
        end = tl.load(offsets_ptr + e + 1, mask=e < n_experts, other=0)
        end = tl.where(e == n_experts, n_rows if TAIL else 0, end)
        begin = tl.minimum(tl.maximum(begin, 0), n_rows)
        end = tl.maximum(tl.minimum(end, n_rows), begin)
        count = tl.where(e <= n_experts, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
        first = tl.sum(tl.where(e < group, count, 0), axis=0)
        mine = tl.sum(tl.where(e == group, count, 0), axis=0)
        my_begin = tl.sum(tl.where(e == group, begin, 0), axis=0)
        my_end = tl.sum(tl.where(e == group, end, 0), axis=0)
        for i in range(0, mine, BLOCK):
            at = i + tl.arange(0, BLOCK)
            tile = tiles_ptr + first + at
            mask = (at < mine) & (first + at < n_tiles)
            tl.store(tile, tl.full((BLOCK,), 0, tl.int32) + group, mask=mask)
            tl.store(tile + n_tiles, my_begin + at * BLOCK_M, mask=mask)
            tl.store(tile + 2 * n_tiles, tl.full((BLOCK,), 0, tl.int32) + my_end, mask=mask)
        if group == n_experts:
            for i in range(first + mine, n_tiles, BLOCK):
                at = i + tl.arange(0, BLOCK)
                tl.store(tiles_ptr + at, tl.full((BLOCK,), -1, tl.int32), mask=at < n_tiles)
    else:
        row = (group - n_experts - 1) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots_ptr + row, mask=row < n_rows, other=-1)
        tl.store(row_of_slot_ptr + slot, row, mask=(slot >= 0) & (slot < n_rows))


def plan(offsets: Tensor, slots: Tensor | None, n_rows: int, block_m: int, tail: bool) -> Plan:
    """Tiles of rows [offsets[e], offsets[e + 1]) of each expert, cut to [0, n_rows).

    offsets int32 [E + 1]; slots int32 [n_rows] or None. `tail`: also of the rows after offsets[E].
    """
    n_experts = offsets.shape[0] - 1
    groups = min(n_experts + tail, n_rows)  # that can have a row
    n_tiles = (n_rows + (block_m - 1) * groups) // block_m
    tiles = torch.empty((3, n_tiles), dtype=torch.int32, device=offsets.device)
    row_of_slot = offsets.new_empty(0 if slots is None else n_rows)
    if n_tiles > 0:
        n_inverse = 0 if slots is None else triton.cdiv(n_rows, PLAN_BLOCK)
        plan_kernel[(n_experts + 1 + n_inverse,)](
            tiles,
            row_of_slot,
            offsets,
            offsets if slots is None else slots,
            n_experts,
            n_rows,
            n_tiles,
            TAIL=tail,
            BLOCK_M=block_m,
            EXPERTS=triton.next_power_of_2(n_experts + 1),
            BLOCK=PLAN_BLOCK,
            num_warps=4,
        )
    return Plan(tiles, row_of_slot, offsets if slots is None else slots, block_m)


def replanned(rows: Plan, offsets: Tensor, block_m: int) -> Plan:
    """The plan for tiles of another number of rows: itself where it has them already."""
    if rows.block_m == block_m:
        return rows
    other = plan(offsets, None, rows.slots.shape[0], block_m, tail=False)
    return replace(other, row_of_slot=rows.row_of_slot, slots=rows.slots)


@triton.jit
def tile_of_plan(tiles_ptr, n_tiles, tile):
    """(expert, first row, end of the expert's rows); the expert is -1 where the list has ended."""
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + n_tiles + tile)
    end = tl.load(tiles_ptr + 2 * n_tiles + tile)
    return expert, first, end


@triton.jit
def token_of_row(slots_ptr, rows, mask, n_slots, per_token):
    """(token of each sorted row, whether it has one); int64, 0 where it has none."""
    slot = tl.load(slots_ptr + rows, mask=mask, other=-1)
    live = (slot >= 0) & (slot < n_slots)
    return tl.where(live, slot // per_token, 0).to(tl.int64), live


@triton.jit
def row_of_slot(row_of_slot_ptr, slots_ptr, slot, n_rows):
    """(row of a slot, whether it has one)."""
    row = tl.load(row_of_slot_ptr + slot)
    row = tl.minimum(tl.maximum(row, 0), n_rows - 1)
    return row.to(tl.int64), tl.load(slots_ptr + row) == slot

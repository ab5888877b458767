"""Stable counting sort of slots by expert, on the device, without a host sync.

Few slots (decoding): one launch; a slot's place is the number of slots that come before it, counted
by comparing it with all. Many: counts of each expert in each block of slots, one exclusive scan,
and a stable scatter. No atomics: every count and place is written by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_tuning


@triton.jit
def keys_of_slots(ids_ptr, slots, n_slots, first_expert, n_experts):
    """Expert of the slice [0, n), n where the slot has none here, n + 1 past the last slot."""
    key = tl.load(ids_ptr + slots, mask=slots < n_slots, other=-1).to(tl.int32)
    key = tl.where(key < 0, n_experts, key - first_expert)
    key = tl.where((key < 0) | (key > n_experts), n_experts, key)
    return tl.where(slots < n_slots, key, n_experts + 1)


@triton.jit
def dispatch_few_kernel(
    offsets_ptr,
    sorted_ptr,
    ids_ptr,
    n_slots,
    first_expert,
    n_experts,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Programs 0.. place BLOCK slots each; the following ones give BLOCK offsets each."""
    n_placing = tl.cdiv(n_slots, BLOCK)
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    if block < n_placing:
        slots = block * BLOCK + lanes
        keys = keys_of_slots(ids_ptr, slots, n_slots, first_expert, n_experts)
        for first in range(0, n_slots, OTHERS):
            others = first + tl.arange(0, OTHERS)
            other = keys_of_slots(ids_ptr, others, n_slots, first_expert, n_experts)
            equal = (other[None, :] == keys[:, None]) & (others[None, :] < slots[:, None])
            before += tl.sum(((other[None, :] < keys[:, None]) | equal).to(tl.int32), axis=1)
        value = tl.where(keys < n_experts, slots, -1)
        tl.store(sorted_ptr + before, value, mask=slots < n_slots)
    else:
        experts = (block - n_placing) * BLOCK + lanes
        for first in range(0, n_slots, OTHERS):
            others = first + tl.arange(0, OTHERS)
            other = keys_of_slots(ids_ptr, others, n_slots, first_expert, n_experts)
            before += tl.sum((other[None, :] < experts[:, None]).to(tl.int32), axis=1)
        tl.store(offsets_ptr + experts, before, mask=experts <= n_experts)


@triton.jit
def count_slots_kernel(
    below_ptr,
    ids_ptr,
    n_slots,
    first_expert,
    n_experts,
    n_blocks,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """below[key, block]: slots of the block whose key is less; keys up to n_experts + 1."""
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    keys = keys_of_slots(ids_ptr, slots, n_slots, first_expert, n_experts)
    counts = tl.histogram(keys, KEYS)
    key = tl.arange(0, KEYS)
    below = tl.cumsum(counts, axis=0) - counts
    tl.store(below_ptr + key * n_blocks + block, below, mask=key <= n_experts + 1)


@triton.jit
def scan_counts_kernel(places_ptr, offsets_ptr, below_ptr, n_blocks, BLOCK: tl.constexpr):
    """places[key, block]: the sorted place of the block's first slot of that key; offsets."""
    key = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row = below_ptr + key * n_blocks
    sums = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, n_blocks, BLOCK):
        block = first + lanes
        sums += tl.load(row + block, mask=block < n_blocks, other=0)
    place = tl.sum(sums, axis=0)
    tl.store(offsets_ptr + key, place)
    for first in range(0, n_blocks, BLOCK):
        block = first + lanes
        mask = block < n_blocks
        count = tl.load(row + n_blocks + block, mask=mask, other=0)
        count -= tl.load(row + block, mask=mask, other=0)
        until = tl.cumsum(count, axis=0)
        tl.store(places_ptr + key * n_blocks + block, place + until - count, mask=mask)
        place += tl.sum(count, axis=0)


@triton.jit
def scatter_slots_kernel(
    sorted_ptr,
    places_ptr,
    ids_ptr,
    n_slots,
    first_expert,
    n_experts,
    n_blocks,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    live = slots < n_slots
    keys = keys_of_slots(ids_ptr, slots, n_slots, first_expert, n_experts)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(block * BLOCK, (block + 1) * BLOCK, OTHERS):
        others = first + tl.arange(0, OTHERS)
        other = keys_of_slots(ids_ptr, others, n_slots, first_expert, n_experts)
        earlier = (other[None, :] == keys[:, None]) & (others[None, :] < slots[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    place = tl.load(places_ptr + keys * n_blocks + block, mask=live, other=0) + rank
    tl.store(sorted_ptr + place, tl.where(keys < n_experts, slots, -1), mask=live)


def moe_dispatch(topk_ids: Tensor, n_experts: int, first_expert: int = 0) -> tuple[Tensor, Tensor]:
    """(offsets int32 [n_experts + 1], slots int32 [T * k]) of topk_ids [T, k] int32.

    slots: those of the experts [first_expert, first_expert + n_experts), by expert and then
    ascending; then -1. offsets: where each expert's begin; the last is their number.
    """
    ids = topk_ids.reshape(-1)
    n_slots = ids.shape[0]
    slots = torch.empty(n_slots, dtype=torch.int32, device=ids.device)
    if n_slots == 0:
        return slots.new_zeros(n_experts + 1), slots
    offsets = torch.empty(n_experts + 1, dtype=torch.int32, device=ids.device)
    if n_slots <= moe_tuning.FEW_SLOTS:
        block = moe_tuning.FEW_SLOTS_BLOCK
        dispatch_few_kernel[(triton.cdiv(n_slots, block) + triton.cdiv(n_experts + 1, block),)](
            offsets,
            slots,
            ids,
            n_slots,
            first_expert,
            n_experts,
            BLOCK=block,
            OTHERS=moe_tuning.FEW_SLOTS_OTHERS,
            num_warps=4,
        )
        return offsets, slots
    _sort_many(offsets, slots, ids, n_experts, first_expert)
    return offsets, slots


def _sort_many(
    offsets: Tensor, slots: Tensor, ids: Tensor, n_experts: int, first_expert: int
) -> None:
    n_slots, block = ids.shape[0], moe_tuning.SLOTS_BLOCK
    n_blocks = triton.cdiv(n_slots, block)
    below = slots.new_empty((n_experts + 2, n_blocks))
    places = slots.new_empty((n_experts + 1, n_blocks))
    sizes = (n_slots, first_expert, n_experts, n_blocks)
    keys = triton.next_power_of_2(n_experts + 2)
    count_slots_kernel[(n_blocks,)](below, ids, *sizes, BLOCK=block, KEYS=keys, num_warps=4)
    scan = min(triton.next_power_of_2(n_blocks), 1024)
    scan_counts_kernel[(n_experts + 1,)](places, offsets, below, n_blocks, BLOCK=scan, num_warps=4)
    others = moe_tuning.SLOTS_OTHERS
    scatter_slots_kernel[(n_blocks,)](
        slots, places, ids, *sizes, BLOCK=block, OTHERS=others, num_warps=moe_tuning.SLOTS_WARPS
    )

"""Lazily mapped memory: zeros, small pages where it begins, huge pages where it is long."""

from __future__ import annotations

import mmap
import os
import re

import pytest
import torch
from torch import Tensor

from fastllm.ops import pages
from fastllm.ops.pages import Arena, _Recent, large_empty, lazy_zeros

MB = 1 << 20


def advised(address: int) -> bool:
    """Whether the mapping that holds an address has been advised to use huge pages."""
    holds, found = False, None
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                holds = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif holds and line.startswith("VmFlags:"):
                found = " hg" in line
    assert found is not None, "no mapping holds the address"
    return found


def at(tensor: Tensor, offset: int) -> bool:
    return advised(tensor.data_ptr() + offset)


linux = pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage") or not hasattr(mmap, "MADV_HUGEPAGE"),
    reason="needs Linux with transparent huge pages",
)


@linux
def test_each_part_begins_with_small_pages_and_goes_on_with_huge_ones() -> None:
    parts = lazy_zeros((3, 8, MB), torch.uint8, parts=3)
    for part in range(3):
        assert not at(parts[part], 4096)
        assert not at(parts[part], 2 * MB - 4096)
        assert at(parts[part], 2 * MB + 4096)
        assert at(parts[part], 8 * MB - 4096)
    whole = lazy_zeros((24 * MB,), torch.uint8)
    assert not at(whole, MB) and at(whole, 9 * MB)


@linux
def test_short_parts_stay_on_small_pages() -> None:
    short = lazy_zeros((8, 3, MB), torch.uint8, parts=8)
    assert not any(at(short, offset * MB) for offset in range(24))


def test_it_is_zero_and_of_the_shape_asked_for() -> None:
    for shape, parts in (((4, 3, 5), 4), ((0, 7), 1), ((1, 3 * MB), 1), ((7, MB + 1), 7)):
        x = lazy_zeros(shape, torch.float32, parts=parts)
        assert x.shape == shape and x.dtype == torch.float32 and x.is_contiguous()
        assert not x.any()
        x.fill_(3)
        assert (x == 3).all()


def test_an_arena_gives_aligned_memory_that_nobody_shares() -> None:
    arena = Arena(chunk_bytes=4096)
    tensors = [arena.empty((n,), torch.float32) for n in (1, 100, 3000, 17)]
    for i, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0 and not tensor.any()
        tensor.fill_(i + 1)
    assert all((tensor == i + 1).all() for i, tensor in enumerate(tensors))


def test_large_memory_is_used_again_once_no_tensor_lies_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "_recent", _Recent(64 << 20))
    first = large_empty((10 << 20,), torch.uint8, "cpu")
    place = first.data_ptr()
    part = first[5:]
    del first
    assert large_empty((10 << 20,), torch.uint8, "cpu").data_ptr() != place, "a view is in it"
    del part
    again = large_empty((3, 3 << 18), torch.float32, "cpu")
    assert again.data_ptr() == place and again.shape == (3, 3 << 18)
    other = large_empty((10 << 20,), torch.uint8, "cpu")
    assert other.data_ptr() != place


def test_no_more_than_a_bounded_amount_of_memory_is_remembered() -> None:
    recent = _Recent(16 << 20)
    blocks = [recent.take(6 << 20) for _ in range(4)]
    assert [len(block) for block in recent._blocks] == [6 << 20] * 2
    assert recent._blocks[-1] is blocks[-1]


def test_the_storage_of_large_memory_is_what_was_asked_for() -> None:
    assert large_empty((5 << 20,), torch.uint8, "cpu").untyped_storage().nbytes() == 5 << 20

"""Memory straight from the system: zeros that take no room until they are touched, and huge pages.

torch.zeros writes all it allocates, and torch.empty's 4 KB pages cost a product that streams its
weights about 9% (decode of a 98 MB model: 3.01 against 2.75 ms a token, Zen 5, 2 threads).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 32 << 20  # bytes mapped at once; what is not used of the last one is never touched
_ALIGN = 64
_HUGE = 2 << 20  # bytes of a huge page


def map_zeros(nbytes: int, *, huge: bool = False) -> Tensor:
    """uint8 `[nbytes]` of zeros on the CPU, mapped when touched, by 2 MB at a time if `huge`."""
    memory = _map_huge(nbytes) if huge else _map(nbytes)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def large_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.empty; on the CPU from 4 to 192 MB in huge pages, which are used again.

    For workspaces that live as long as a call, and gradients that live as long as a step: the
    first touch of each page is a fault and zeros that nobody reads. Of more at once the kernel may
    have to move others' pages first: 720 MB took 1.3 s of system time, not 0.4. The process keeps
    up to 384 MB of such memory.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not 2 * _HUGE <= nbytes <= 96 * _HUGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.frombuffer(_recent.take(nbytes), dtype=torch.uint8, count=nbytes)
    return memory.view(dtype).view(*shape)


class _Recent:
    """Blocks that were asked for of late, `most` bytes of them: who asks again gets one in which no
    tensor lies any more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks: list[mmap.mmap] = []  # the latest last
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> mmap.mmap:
        """A block of at least nbytes, with any contents."""
        size = -(-nbytes // _HUGE) * _HUGE
        with self._lock:
            place = self._unused(size)
            block = _map_huge(size) if place is None else self._blocks.pop(place)
            self._blocks.append(block)
            while sum(map(len, self._blocks)) > self._most:
                del self._blocks[0]  # unmapped as soon as no tensor lies in it
            return block

    def _unused(self, size: int) -> int | None:
        sizes = [len(block) for block in self._blocks]
        # 2: the list's reference and getrefcount's own; a tensor has one more
        fits = [
            (sizes[i], i)
            for i in range(len(sizes))
            if size <= sizes[i] <= size + size // 4 and sys.getrefcount(self._blocks[i]) == 2
        ]
        return min(fits)[1] if fits else None


_recent = _Recent(384 << 20)


def release_rows(rows: Tensor) -> None:
    """Give the pages that lie wholly within rows `[R, C]` back to the system; values are lost.

    Of a CPU tensor with contiguous rows, on Linux; elsewhere nothing happens.
    """
    if rows.device.type != "cpu" or sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for row in rows:
        begin = -(-row.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (row.data_ptr() + row.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            address, size = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
            madvise(address, size, mmap.MADV_DONTNEED)


def _map(nbytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # the default, shared memory, has no huge pages
    return mmap.mmap(-1, max(nbytes, 1), flags=flags)


def _map_huge(nbytes: int) -> mmap.mmap:
    memory = _map(nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def lazy_zeros(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    parts: int = 1,
) -> Tensor:
    """torch.zeros, but on the CPU mapped when touched.

    The memory is `parts` equal parts that fill up side by side, each from its beginning. The first
    2 MB of a part are mapped 4 KB at a time, since by huge pages the first token of a sequence
    would take 2 MB in every layer, for K and for V (120 MB for 30 layers). What follows comes in
    huge pages: a long context is read 6% to 20% faster from them (Zen 5, one thread: 16,384
    positions of 8 heads of 128 in 2.9 ms, not 3.2; reading alone, in the same order, in 1.9, not
    2.4).
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = _map(nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        for part in range(parts):
            begin = -(-(nbytes * part // parts + _HUGE) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = nbytes * (part + 1) // parts // mmap.PAGESIZE * mmap.PAGESIZE
            if end - begin >= _HUGE:
                memory.madvise(mmap.MADV_HUGEPAGE, begin, end - begin)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes].view(dtype).view(shape)


class Arena:
    """CPU memory for tensors that stay, one after another in huge pages.

    A chunk is released when the last tensor in it is.
    """

    def __init__(self, chunk_bytes: int = _CHUNK) -> None:
        self._chunk_bytes = chunk_bytes
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on a 64-byte boundary; nobody else has its memory, which is zero."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // _ALIGN) * _ALIGN
        if size > self._free.numel():
            self._free = map_zeros(max(size, self._chunk_bytes), huge=True)
        place, self._free = self._free[:nbytes], self._free[size:]
        return place.view(dtype).view(*shape)

"""Small arrays at fixed addresses that captured graphs read: written with numpy, seen as tensors.

On the CPU both are the same memory, so that feeding a decode step costs no torch call. On a GPU the
host's copy is one pinned block, and `upload` brings all of it over in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line, so that no field straddles one that another field starts in
_TORCH = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.float32): torch.float32,
}


class StaticArrays:
    """`arrays[name]` is the numpy view, `tensors[name]` the tensor of the same field."""

    def __init__(
        self, fields: Mapping[str, tuple[tuple[int, ...], type]], device: torch.device
    ) -> None:
        offsets, total = {}, 0
        for name, (shape, kind) in fields.items():
            offsets[name] = total
            total += -(-int(np.prod(shape)) * np.dtype(kind).itemsize // _ALIGN) * _ALIGN
        on_host = device.type == "cpu"
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=not on_host)
        self._device = self._host if on_host else self._host.to(device)
        self.arrays: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Tensor] = {}
        raw = self._host.numpy()
        for name, (shape, kind) in fields.items():
            dtype = np.dtype(kind)
            at = slice(offsets[name], offsets[name] + int(np.prod(shape)) * dtype.itemsize)
            self.arrays[name] = raw[at].view(dtype).reshape(shape)
            self.tensors[name] = self._device[at].view(_TORCH[dtype]).view(shape)

    def upload(self) -> None:
        """Make the tensors equal to the arrays; nothing to do on the CPU."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)

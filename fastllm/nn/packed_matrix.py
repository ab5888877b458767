"""`PackedMatrix`: a module of PyTorch that holds a packed weight as two parameters of bytes.

It holds one form of the weight, the layout of its device: casts leave it alone, moves between
devices rearrange it and keep what modules share, FSDP2 divides it among processes as it is, and
`state_dict` has the rows one after another, whatever the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastllm.nn.quantized_values import REMEDY, QuantizedValues
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import format_of
from fastllm.quantize.fastllm_files import PARTS
from fastllm.quantize.packed import PackedWeight, canonical, from_canonical

_INTERLEAVED = {1, *layout.ROWS_PER_GROUP.values()}  # rows that layouts put side by side
_Shape = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]


class PackedMatrix(nn.Module):
    """A frozen `[n, k]` weight in a packed format.

    `weight_codes` and `weight_scales` are its bytes, a row for each group of rows that its device
    interleaves. `state_dict` holds them under the same names with one row for each row of the
    weight, whatever the device, and `weight_format`, the name of the format in ASCII. `weight`
    shows the dequantized values in `dtype`, read only.
    """

    weight_codes: nn.Parameter
    weight_scales: nn.Parameter
    weight_format: Tensor

    def _hold(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        """Take over the memory of a packed weight; constructors call it once."""
        if packed.format in layout.DENSE:
            raise ValueError(f"format {packed.format!r} is not quantized: keep the plain module")
        if not packed.n or not packed.k:
            raise ValueError(f"a weight of {packed.n} x {packed.k} is empty: keep the plain module")
        self._n, self._k = packed.n, packed.k
        self.format, self.dtype = packed.format, dtype
        self._shapes = _shapes(packed.format, packed.n, packed.k)
        self.weight_codes = frozen(as_bytes(packed.data))
        self.weight_scales = frozen(as_bytes(packed.scales))
        self.name_format()

    def name_format(self) -> None:
        """Write `weight_format` anew: files of a model may lack it."""
        device = self.weight_codes.device
        name = torch.tensor(list(self.format.encode()), dtype=torch.uint8, device=device)
        self.register_buffer("weight_format", name)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values in `dtype`, dequantized when they are read; writing to them raises."""
        device = self.weight_codes.device
        shape = (self._n, self._k)
        return QuantizedValues(self.packed_weight, shape, self.dtype, device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise RuntimeError(REMEDY)
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raises RuntimeError unless `requires_grad` is false: codes are not trained."""
        if requires_grad:
            raise RuntimeError(f"{type(self).__name__} ({self.format}): {REMEDY}")
        return super().requires_grad_(False)

    def packed_weight(self) -> PackedWeight:
        """The weight as kernels read it; it shares this memory.

        Raises RuntimeError if FSDP2 has it sharded now, and under torch.jit.trace.
        """
        if is_sharded(self.weight_codes):
            raise RuntimeError(
                "the codes are sharded among processes: they are whole inside a forward of the "
                "module that fully_shard was called on, or after its unshard()"
            )
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record views of bytes as another dtype, which packed "
                "weights are read through: use torch.export or torch.compile"
            )
        return self._packed(self.weight_codes, self.weight_scales)

    def _packed(self, codes: Tensor, scales: Tensor) -> PackedWeight:
        n, k, format = self._n, self._k, self.format
        data, dtype, records = self._shapes[codes.shape[1]]
        return PackedWeight(codes.view(data), scales.view(dtype).view(records), format, n, k)

    # moves and files

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device))
        self.dtype = probe.dtype
        if is_sharded(self.weight_codes):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        rows = _interleaved(self.format, self._k, self.weight_codes.shape[1])
        wanted = layout.ROWS_PER_GROUP.get(probe.device.type, rows)
        if wanted != rows:
            codes, scales = self._in_layout_of(probe.device, wanted)
            if self.weight_codes.is_meta:
                self.weight_codes, self.weight_scales = frozen(codes), frozen(scales)
            else:  # as torch moves what several modules share: who comes later finds it moved
                self.weight_codes.data, self.weight_scales.data = codes, scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _in_layout_of(self, device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
        """Codes and scales as bytes on `device`, in its layout; of a layer on meta only memory."""
        n, k = self._n, self._k
        if self.weight_codes.is_meta:
            codes, scales = (
                torch.empty(-(-n // rows), width * rows, dtype=torch.uint8, device=device)
                for width in self._row_bytes()
            )
            return codes, scales
        data, scales = canonical(self.packed_weight())
        packed = from_canonical(self.format, data, scales, n, k, device)
        return as_bytes(packed.data), as_bytes(packed.scales)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        codes = self.weight_codes
        if not is_sharded(codes) and not codes.is_meta:  # a part of it stays as it is
            for name, part in zip(PARTS, canonical(self.packed_weight()), strict=True):
                destination[prefix + name] = as_bytes(part)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
        problem = self._problem(given, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        codes, scales = (given.get(prefix + name) for name in PARTS)
        if codes is not None and scales is not None and not is_sharded(codes):
            packed = self._packed(codes.contiguous(), scales.contiguous())
            parts = canonical(packed)
            if not is_sharded(self.weight_codes):
                device = self.weight_codes.device
                device = torch.device("cpu") if device.type == "meta" else device
                packed = from_canonical(self.format, *parts, packed.n, packed.k, device)
                parts = packed.data, packed.scales
            given |= {prefix + n: as_bytes(t) for n, t in zip(PARTS, parts, strict=True)}
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problem(self, given: Mapping[str, Any], prefix: str) -> str | None:
        """What is wrong with entries of a state dict; None: nothing but what torch will name."""
        if f"{prefix}weight" in given:
            return (
                f"{prefix}weight is a plain weight and this layer is {self.format}: load it into "
                "the plain model, then call fastllm.quantize_model"
            )
        name = given.get(f"{prefix}weight_format")
        if name is not None:
            stored = format_in(name)
            if stored != self.format:
                return (
                    f"{prefix}weight_format is {stored!r:.40} and this layer is {self.format!r}: "
                    f"quantize the model to {stored!r:.40} before loading"
                )
        missing = [part for part in PARTS if prefix + part not in given]
        if len(missing) == 1:
            return f"{prefix}{missing[0]} is missing: {' and '.join(PARTS)} belong together"
        n = self._n
        for part, width in zip(PARTS, self._row_bytes(), strict=True):
            t = given.get(prefix + part)
            if t is None or is_sharded(t):
                continue
            # Parts that FSDP2 has put together again still interleave the rows of their device.
            shapes = {(-(-n // rows), rows * width) for rows in _INTERLEAVED}
            if t.dtype != torch.uint8 or tuple(t.shape) not in shapes:
                return (
                    f"{prefix}{part} must be uint8 [{n}, {width}] for a {self.format} weight of "
                    f"{n} x {self._k}, got {t.dtype} {list(t.shape)}"
                )
        return None

    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of a row's codes and scales."""
        k = self._k
        return layout.code_bytes(self.format, k), format_of(self.format).scale_bytes(k)


def is_sharded(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # 519 modules, which generation never needs

    return isinstance(tensor, DTensor)


def frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def format_in(name: Tensor) -> str:
    """The format that a `weight_format` names, whatever a file has there."""
    return bytes(name.flatten().to(torch.uint8).tolist()).decode("ascii", "replace")


def as_bytes(part: Tensor) -> Tensor:
    """uint8 [groups of rows, bytes]."""
    flat = part.contiguous().view(-1).view(torch.uint8)
    return flat.view(part.shape[0], part.nbytes // max(part.shape[0], 1))


def _interleaved(format: str, k: int, width: int) -> int:
    """How many rows of k columns lie in `width` bytes of codes."""
    one = layout.code_bytes(format, k)
    return max(width // max(one, 1), 1)


def _shapes(format: str, n: int, k: int) -> dict[int, _Shape]:
    """By the bytes of codes in a group of rows, for every device: shape of the data, dtype and
    shape of the scales.
    """
    one = layout.code_bytes(format, k)
    dtype = layout.scales_dtype(format)
    return {
        rows * one: (
            layout.data_shape(format, n, k, rows), dtype, layout.scales_shape(format, n, k, rows)
        )
        for rows in _INTERLEAVED
    }  # fmt: skip

"""Products with packed weights in every format, mode, size and option, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.quant_format import QUANT_FORMATS
from .moe_problem import covering
from .opinfo import Args
from .packed_weights import random_packed

MOST_WORK = 1 << 21  # multiplications of a problem: float64 results stay quick


@dataclass(frozen=True, kw_only=True)
class Product:
    """One call of `quant_matmul`.

    rows: the sizes of x before its columns. option: "", "residual", or what `gated` takes.
    x_layout: "plain", "strided" (rows of a wider tensor) or "zeros" (blocks of zeros in x).
    size: of scales, see `packed_weights.SIZES`.
    """

    format: str
    mode: str
    dtype: torch.dtype
    rows: tuple[int, ...]
    n: int
    k: int
    bias: str = ""  # "", "float32" or "bfloat16"
    out_dtype: torch.dtype | None = None
    option: str = ""
    x_layout: str = "plain"
    size: str = "normal"

    @property
    def label(self) -> str:
        """Of a test case."""
        shape = "x".join(map(str, (*self.rows, self.n, self.k)))
        out = str(self.out_dtype).removeprefix("torch.") + "-out" if self.out_dtype else ""
        bias = f"{self.bias}-bias" if self.bias else ""
        own = "" if self.x_layout == "plain" else self.x_layout
        size = "" if self.size == "normal" else f"{self.size}-scales"
        words = [f"{self.format}/{self.mode}", shape, bias, out, self.option, own, size]
        return "-".join(word for word in words if word)

    def make(self, g: torch.Generator, rows_per_group: int = 16) -> Args:
        """Arguments of the op."""
        x = self._x(g)
        data, scales = random_packed(g, self.format, self.n, self.k, rows_per_group, self.size)
        if self.option not in ("", "residual"):  # where the activation is neither flat nor linear
            values = layout.dequantize(data, scales, self.format, self.n, self.k)
            size = values.square().mean().sqrt().item() * self.k**0.5
            x.div_(max(size, 1e-6))
        bias = torch.randn(self.n, generator=g) if self.bias else None
        if bias is not None:
            bias = bias.to(getattr(torch, self.bias))
        residual = None
        if self.option == "residual":
            residual = torch.randn(*self.rows, self.n, generator=g)
        gated = self.option if self.option != "residual" else ""
        return (
            x, data, scales, self.format, self.n, bias, self.mode, self.out_dtype, residual, gated,
        )  # fmt: skip

    def _x(self, g: torch.Generator) -> Tensor:
        wide = 5 if self.x_layout == "strided" else 0
        x = torch.randn(*self.rows, self.k + wide, generator=g)
        count = math.prod(self.rows)
        sizes = 2.0 ** (torch.arange(count) % 5 - 2)  # rows differ, alike in every draw
        x = x * sizes.reshape(*self.rows, 1)
        if self.x_layout == "zeros":
            x[..., : self.k // 2] = 0
        return x.to(self.dtype)[..., wide // 2 : wide // 2 + self.k]


AXES: dict[str, Sequence[Any]] = {
    "rows": (
        (0,), (1,), (1,), (2,), (3,), (4,), (5,), (7,), (8,), (9,), (13,), (16,), (17,), (31,),
        (33,), (64,), (100,), (130,), (257,), (1030,), (4096,), (2, 3), (1, 1, 5), (3, 0),
    ),
    "n": (1, 2, 7, 15, 16, 17, 31, 33, 48, 63, 64, 66, 100, 130, 257),
    "blocks": (1, 2, 3, 4, 5, 7, 9, 13, 18, 40),
    "bias": ("", "", "float32", "bfloat16"),
    "out_dtype": (None, None, torch.float32, torch.bfloat16),
    "option": ("", "", "", "residual", "silu", "gelu_tanh"),
    "x_layout": ("plain", "plain", "strided", "zeros"),
    "size": ("normal", "normal", "normal", "huge", "tiny", "zero"),
    "dtype": (torch.float32, torch.bfloat16),
}  # fmt: skip


def modes(formats: Sequence[str]) -> list[tuple[str, str]]:
    """Every (format, mode) of these formats."""
    return [(format, mode) for format in formats for mode in QUANT_FORMATS[format].modes]


def products(count: int, seed: int, formats: Sequence[str], **axes: Any) -> list[Product]:
    """Problems that cover every format and mode and `AXES`, made possible and kept small."""
    rows = covering(count, seed, **{"pair": modes(formats), **AXES, **axes})
    return [_possible(**row) for row in rows]


def _possible(*, pair: tuple[str, str], blocks: int, dtype: torch.dtype, **rest: Any) -> Product:
    format, mode = pair
    kind = QUANT_FORMATS[format]
    rows, n = rest["rows"], rest["n"]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(mode, dtype)
    if rest["option"] == "residual":
        rest["out_dtype"] = None
    elif rest["option"]:
        rest["out_dtype"], rest["size"] = None, "normal"  # products of two products
        n = max(2, n // 2 * 2)
    # Blocks of 32 where the whole row has one scale or a short last chunk; dense rows are odd.
    step = 3 if kind.dense else kind.multiple
    most = max(1, MOST_WORK // max(1, math.prod(rows) * n))
    while blocks > 1 and step * blocks > most:
        blocks //= 2
    if step * blocks > most:
        n = 2
    rest["size"] = "normal" if kind.dense else rest["size"]
    return Product(format=format, mode=mode, dtype=dtype, k=step * blocks, **{**rest, "n": n})


def gradient_rows(count: int, seed: int, formats: Sequence[str]) -> list[Product]:
    """Problems of `quant_matmul_input_grad`: of quantized formats, without options."""
    quantized = [format for format in formats if format in layout.QUANTIZED]
    plain: dict[str, Any] = {
        "pair": [(format, "") for format in quantized], "option": ("",), "bias": ("",),
        "size": ("normal", "normal", "tiny", "zero"),
    }  # fmt: skip
    return products(count, seed, quantized, **plain)

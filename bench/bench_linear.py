"""Suite `linear`: products of a dense or packed weight beside torch's `linear` (oneDNN on the CPU).

Each weight rotates over at least 128 MB. A packed weight is compared with torch's bfloat16 and
float32 products of the same shape: what somebody without the packed kernel would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.quantize.gguf_blocks import row_bytes
from fastllm.quantize.packed import PackedWeight, pack
from fastllm.testing.opinfo import generator
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case
from fastllm.testing.timing import rotation

SUITE = "linear"
SECONDS = 240
TITLE = "dense and packed products beside torch's linear"

# name -> (N, K): SmolLM2-135M's products with fused QKV and gate-up, its LM head, and a 7B's square
SHAPES = {
    "qkv": (960, 576),
    "o": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
    "4096": (4096, 4096),
}
ROWS = (1, 8, 32, 128, 512, 2048)
HEAD_ROWS = (1, 8)  # a language model's head sees the last row of each sequence
PACKED = ("q4_0", "q4_1", "q8_0")


@dataclass(frozen=True, slots=True)
class Product:
    """x[rows, k] @ W[n, k].T with W in a format, and x as the activation mode wants it."""

    name: str
    rows: int
    n: int
    k: int
    format: str  # "bf16" and "f32" are dense weights in torch's layout
    activation: str

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.format} {self.name} {self.rows}x{self.n}x{self.k}"

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of the result."""
        full = self.format == "f32" or self.activation == "fp32"
        return torch.float32 if full else torch.bfloat16

    @property
    def weight_bytes(self) -> int:
        """Bytes of W as it is stored."""
        if self.format in PACKED:
            return self.n * row_bytes(self.format, self.k)
        return self.n * self.k * self.dtype.itemsize


def products(quick: bool) -> Iterator[Product]:
    """The products of the suite; a quick run takes three shapes, three counts of rows, no q4_0."""
    formats = [("bf16", "bf16"), ("q4_1", "int8"), ("q8_0", "int8")]
    if not quick:
        formats += [("f32", "fp32"), ("q4_0", "int8"), ("q4_1", "bf16")]
    for format, activation in formats:
        for name, (n, k) in SHAPES.items():
            if quick and name in ("o", "qkv", "head"):
                continue
            counts = HEAD_ROWS if name == "head" else (1, 8, 512) if quick else ROWS
            for rows in counts:
                yield Product(name, rows, n, k, format, activation)


def cases(settings: Settings) -> Iterator[BenchCase]:
    """One case per product."""
    for product in products(settings.quick):
        yield BenchCase(
            suite=SUITE,
            label=product.label,
            dtype=product.activation,
            device=settings.device,
            seconds=0.25 if settings.quick else 0.8,
            make=lambda product=product: _work(product, settings.device),  # type: ignore[misc]
        )


def _work(product: Product, device: str) -> Work:
    x = torch.randn(product.rows, product.k, generator=generator()).to(device)
    functions = {OURS: _ours(product, x, device)}
    for name, dtype in (("torch bf16", torch.bfloat16), ("torch f32", torch.float32)):
        if product.format in PACKED or product.dtype == dtype:
            functions[name] = _torch(product, x.to(dtype), device)
    size = product.rows * (product.k + product.n) * product.dtype.itemsize
    kinds = {"int8": "int8", "bf16": "bf16", "fp32": "f32"}
    return Work(
        functions=functions,
        unit="us",
        nbytes=product.weight_bytes + size,
        flops=2.0 * product.rows * product.n * product.k,
        kind=kinds[product.activation],
    )


def _ours(product: Product, x: Tensor, device: str) -> Callable[[], Tensor]:
    x = x.to(product.dtype)
    if product.format not in PACKED:
        dense = rotation(lambda: _dense(product, product.dtype, device), product.weight_bytes)
        return lambda: ops.linear(x, next(dense))
    packed = rotation(lambda: _packed(product, device), product.weight_bytes)

    def run() -> Tensor:
        w = next(packed)
        return ops.quant_matmul(x, w.data, w.scales, w.format, w.n, activation=product.activation)

    return run


def _torch(product: Product, x: Tensor, device: str) -> Callable[[], Tensor]:
    nbytes = product.n * product.k * x.dtype.itemsize
    weights = rotation(lambda: _dense(product, x.dtype, device), nbytes)
    return lambda: F.linear(x, next(weights))


def _dense(product: Product, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full((product.n, product.k), 0.01, dtype=dtype, device=device)


def _packed(product: Product, device: str) -> PackedWeight:
    # Scales of one, arbitrary codes: timing does not depend on the values.
    rows = torch.full((product.n, row_bytes(product.format, product.k)), 60, dtype=torch.uint8)
    return pack(product.format, rows, product.n, product.k, device)


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_linear(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)

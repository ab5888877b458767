"""Suite `attention`: forward, backward and decode beside every attention of torch on the device.

Forward and backward in GFLOP/s of the visible (query, key) pairs, decode in GB/s of the cached keys
and values. Peers get K and V with their heads already repeated, which is faster for them but for
one query: the sum of the group's gradients is then not in their time. A window is a dense boolean
mask for `sdpa`, which has no other form of it, and a block mask for `flex`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastllm import ops
from fastllm.ops.append_kv import append_kv
from fastllm.ops.paged_cache import PAGE_SIZE, new_cache
from fastllm.ops.registry import OPS, Impl
from fastllm.testing.opinfo import generator
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case
from fastllm.testing.timing import rotation

SUITE = "attention"
SECONDS = 900
TITLE = "attention forward, backward and decode beside SDPA and FlexAttention"

HEAD_DIMS = (64, 128, 256)
LENGTHS = (128, 512, 2048)
LONG_LENGTHS = (8192, 16384)
WINDOW = 256
GROUPS = (1, 4)
# Scores of all heads in fp32, which the math backend keeps twice: beyond this it is not run.
_MATH_BYTES = 2 << 30
_BACKENDS = {
    "cpu": {"sdpa": SDPBackend.FLASH_ATTENTION, "sdpa math": SDPBackend.MATH},
    "cuda": {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa math": SDPBackend.MATH,
    },
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One sequence of `length` tokens, causal, whole, or causal with a window of 256 keys."""

    length: int
    dim: int
    heads: int
    group: int
    mask: str
    dtype: torch.dtype

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        n = self.length
        if self.mask == "full":
            return n * n
        seen = n if self.mask == "causal" else min(n, WINDOW + 1)
        return seen * (seen + 1) // 2 + (n - seen) * seen

    @property
    def flops(self) -> float:
        """Of the forward's two products; the backward has five."""
        return 4.0 * self.pairs * self.heads * self.dim

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.mask} T={self.length} D={self.dim} {self.heads}/{self.heads // self.group}"


def shapes(settings: Settings) -> Iterator[Shape]:
    """bfloat16, and causal D = 128 in float32; long ones have few heads; quick runs take four."""
    if settings.quick:
        for length, dim, group in ((512, 64, 1), (2048, 128, 4)):
            for mask in ("causal", "window"):
                yield Shape(length, dim, 8, group, mask, torch.bfloat16)
        return
    for dim in HEAD_DIMS:
        for length in LENGTHS:
            for group in GROUPS:
                for mask in ("causal", "full", "window"):
                    yield Shape(length, dim, 32 if dim == 128 else 16, group, mask, torch.bfloat16)
    for dim in (64, 128):
        for length in LONG_LENGTHS:
            for mask in ("causal", "window"):
                yield Shape(length, dim, 4, 4, mask, torch.bfloat16)
    for length in LENGTHS:
        yield Shape(length, 128, 32, 4, "causal", torch.float32)


@dataclass(frozen=True, slots=True)
class Decode:
    """One token of each of `sequences`, all with `context` cached tokens."""

    context: int
    sequences: int
    heads: int
    kv_heads: int
    dim: int
    cache: torch.dtype

    @property
    def nbytes(self) -> int:
        """Keys, values and scales that a step must read."""
        row = 2 * self.dim * self.cache.itemsize + (8 if self.cache == torch.int8 else 0)
        return self.sequences * self.context * self.kv_heads * row

    @property
    def label(self) -> str:
        """How tables name it."""
        cache = str(self.cache).removeprefix("torch.")
        heads = f"{self.heads}/{self.kv_heads}"
        return f"decode {self.sequences}x{self.context} D={self.dim} {heads} cache {cache}"


def decodes(settings: Settings) -> Iterator[Decode]:
    """Contexts of 256 to 16,384 tokens, alone and eight at once, for two models' heads."""
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128)):
        for context in (2048,) if settings.quick else (256, 2048, 16384):
            for sequences in (1,) if settings.quick else (1, 8):
                for cache in (torch.bfloat16, torch.int8):
                    yield Decode(context, sequences, heads, kv_heads, dim, cache)


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Forward, backward and decode."""
    seconds = 0.3 if settings.quick else 1.0
    for shape in shapes(settings):
        for what, make in (("forward", _forward), ("backward", _backward)):
            yield BenchCase(
                suite=SUITE,
                label=f"{what} {shape.label}",
                dtype=str(shape.dtype).removeprefix("torch."),
                device=settings.device,
                seconds=seconds,
                min_rounds=3,
                make=partial(make, shape, settings),
            )
    for decode in decodes(settings):
        yield BenchCase(
            suite=SUITE,
            label=decode.label,
            dtype="bfloat16",
            device=settings.device,
            seconds=seconds,
            make=partial(_decode, decode, settings),
        )


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=torch.float32).to(device, dtype)


def _inputs(shape: Shape, device: str) -> list[Tensor]:
    """q, k, v as `attention` takes them."""
    kv_heads = shape.heads // shape.group
    lead = (1, shape.length)
    return [
        _random((*lead, heads, shape.dim), shape.dtype, device)
        for heads in (shape.heads, kv_heads, kv_heads)
    ]


def _ours(shape: Shape) -> Callable[..., Any]:
    window = (WINDOW, -1) if shape.mask == "window" else (-1, -1)
    return partial(ops.attention, causal=shape.mask != "full", window_size=window)


def _peers(shape: Shape, settings: Settings, backward: bool) -> dict[str, Callable[..., Any]]:
    """Functions of q, k, v `[1, H, T, D]` with equal heads."""
    device = settings.device
    kwargs: dict[str, Any] = {"is_causal": shape.mask == "causal"}
    if shape.mask == "window":
        at = torch.arange(shape.length, device=device)
        distance = at[:, None] - at
        kwargs = {"attn_mask": (distance >= 0) & (distance <= WINDOW)}
    peers: dict[str, Callable[..., Any]] = {}
    for name, backend in _BACKENDS["cpu" if device == "cpu" else "cuda"].items():
        scores = 4 * shape.heads * shape.length**2
        if backend is SDPBackend.MATH and (settings.quick or scores > _MATH_BYTES):
            continue
        if shape.mask == "window" and backend is SDPBackend.FLASH_ATTENTION and device != "cpu":
            continue  # takes no mask
        peers[name] = partial(_sdpa, backend, kwargs)
    compiled = shape.dim == 128 and shape.group == 1 and shape.length in LENGTHS[1:]
    if not settings.quick and compiled and (device != "cpu" or not backward):
        peers["flex"] = _flex(shape, device)  # compiles for seconds; has no backward on the CPU
    return peers


def _sdpa(backend: SDPBackend, kwargs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, **kwargs)


def _flex(shape: Shape, device: str) -> Callable[..., Any]:
    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - WINDOW)

    blocks = None
    if shape.mask != "full":
        rule = causal if shape.mask == "causal" else window
        blocks = create_block_mask(rule, None, None, shape.length, shape.length, device=device)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)


def _for_peers(shape: Shape, tensors: list[Tensor]) -> list[Tensor]:
    q, *kv = tensors
    repeated = [q, *(x.repeat_interleave(shape.group, 2) for x in kv)]
    return [x.transpose(1, 2).contiguous() for x in repeated]


def _work(shape: Shape, functions: dict[str, Callable[[], Any]], products: float) -> Work:
    flops = shape.flops * products / 2
    return Work(
        functions=functions,
        unit="GFLOP/s",
        amount=flops / 1e9,
        flops=flops,
        kind="f32" if shape.dtype == torch.float32 else "bf16",
    )


def _forward(shape: Shape, settings: Settings) -> Work:
    inputs = _inputs(shape, settings.device)
    theirs = _for_peers(shape, inputs)
    functions: dict[str, Callable[[], Any]] = {OURS: partial(_ours(shape), *inputs)}
    for name, peer in _peers(shape, settings, backward=False).items():
        functions[name] = partial(peer, *theirs)
    return _work(shape, functions, products=2)


def _backward(shape: Shape, settings: Settings) -> Work:
    inputs = _inputs(shape, settings.device)
    theirs = _for_peers(shape, inputs)
    functions = {OURS: _gradient(_ours(shape), inputs)}
    for name, peer in _peers(shape, settings, backward=True).items():
        functions[name] = _gradient(peer, theirs)
    return _work(shape, functions, products=5)


def _gradient(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """The backward alone: the forward has run."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves)
    return partial(torch.autograd.grad, o, leaves, torch.ones_like(o) * 0.5, retain_graph=True)


def _decode(decode: Decode, settings: Settings) -> Work:
    device, n = settings.device, decode.sequences
    q = _random((n, decode.heads, decode.dim), torch.bfloat16, device)
    ours = rotation(lambda: _filled(decode, device), decode.nbytes)
    dense = (n, decode.kv_heads, decode.context, decode.dim)
    theirs = rotation(
        lambda: [torch.ones(dense, dtype=torch.bfloat16, device=device) for _ in range(2)],
        2 * n * decode.kv_heads * decode.context * decode.dim * 2,
    )

    def paged() -> Tensor:
        cache, places = next(ours)
        return ops.paged_attention(
            q, cache.k, cache.v, *places, k_scales=cache.k_scales, v_scales=cache.v_scales
        )

    def opt_in(row: Impl) -> Tensor:
        cache, places = next(ours)
        scales, scale = (cache.k_scales, cache.v_scales), decode.dim**-0.5
        return row.fn(q, cache.k, cache.v, *places, *scales, None, scale, -1, 0.0)

    functions: dict[str, Callable[[], Any]] = {OURS: paged}
    functions["sdpa"] = lambda: F.scaled_dot_product_attention(
        q[:, :, None], *next(theirs), enable_gqa=True
    )
    # Kernels that wait for a result of this device to be chosen.
    for row in OPS["paged_attention"].tables[device]:
        if row.opt_in:
            functions[f"{row.name} row"] = partial(opt_in, row)
    return Work(
        functions=functions,
        unit="GB/s",
        amount=decode.nbytes / 1e9,
        nbytes=decode.nbytes,
        notes=("sdpa reads a contiguous bfloat16 cache; GB/s count the bytes of ours",),
    )


def _filled(decode: Decode, device: str) -> Any:
    """A cache of shuffled pages with every sequence's tokens in it, and where they are."""
    n, width = decode.sequences, -(-decode.context // PAGE_SIZE)
    cache = new_cache(n * width, decode.kv_heads, PAGE_SIZE, decode.dim, decode.cache, device)
    table = torch.randperm(n * width, generator=generator()).view(n, width).int().to(device)
    starts = torch.arange(0, n * decode.context + 1, decode.context, dtype=torch.int32)
    lengths = torch.full((n,), decode.context, dtype=torch.int32, device=device)
    rows = _random((decode.context, decode.kv_heads, decode.dim), torch.bfloat16, device)
    rows = rows.repeat(n, 1, 1)
    append_kv(
        rows, rows, cache.k, cache.v, table, starts.to(device), lengths,
        k_scales=cache.k_scales, v_scales=cache.v_scales,
    )  # fmt: skip
    one_each = torch.arange(n + 1, dtype=torch.int32, device=device)
    return cache, (table, one_each, lengths)


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_attention(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)

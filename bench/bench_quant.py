"""Suite `quant`: products of packed weights in every format and mode, beside torch's.

Weights rotate over at least 128 MB; ours are the calls of one captured graph, so that a row of 1 is
what a decoding step sees. Peers: `F.linear` in bfloat16 (oneDNN on the CPU) for every row, and for
int8 and int4 torch's own products of packed weights, which torchao calls on a CPU. Whole models
beside llama.cpp with the same file are at the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import LLM, graph, ops
from fastllm.bench import peers
from fastllm.bench.bench_decode import TOKENS, decode_params
from fastllm.bench.bench_prefill import random_prompts
from fastllm.ops import packed_layout as layout
from fastllm.ops.pages import Arena
from fastllm.ops.quant_format import QUANT_FORMATS, fit
from fastllm.quantize.packed import PackedWeight, rows_per_group
from fastllm.testing.opinfo import generator
from fastllm.testing.random_model import model_path
from fastllm.testing.suite import OURS, BenchCase, Row, Settings, Work, benchmark_case
from fastllm.testing.timing import ROTATION_BYTES

SUITE = "quant"
SECONDS = 3000
TITLE = "products of packed weights, every format, and whole models beside llama.cpp"

# name -> (N, K): a layer of a model of that size
SHAPES = {
    "8B o": (4096, 4096),
    "1B up": (8192, 2048),
    "135M down": (576, 1536),
}
FORMATS = tuple(f.name for f in QUANT_FORMATS.values() if not f.dense)
# In the sizes after the first: one of each kind of code.
FEW_FORMATS = ("q4_0", "q4_k", "q6_k", "q8_0", "int4_g128", "int8", "nf4", "fp8")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
FEW_ROWS = (1, 8, 512)
MODELS = ("135m-q4_0", "135m-q5_0", "135m-q8_0", "1b-q4_k", "1b-q6_k")
PROMPT = 512


@dataclass(frozen=True, slots=True)
class Product:
    """x[rows, k] @ W[n, k].T with W packed in `format`."""

    shape: str
    rows: int
    n: int
    k: int
    format: str
    mode: str

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.format} {self.shape} {self.rows}x{self.n}x{self.k}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of W as it is stored."""
        return int(self.n * self.k * QUANT_FORMATS[self.format].bits_per_weight(self.k) / 8)


def products(quick: bool) -> Iterator[Product]:
    """Every format in both modes; in quick runs three counts of rows of one shape."""
    for i, (shape, (n, k)) in enumerate(SHAPES.items()):
        if quick and i != 1:
            continue
        for format in FEW_FORMATS if i or quick else FORMATS:
            for activation in ("int8", "bf16"):
                for rows in FEW_ROWS if i or quick else ROWS:
                    yield Product(
                        shape, rows, n, k, fit(format, k), QUANT_FORMATS[format].mode(activation)
                    )


def cases(settings: Settings) -> Iterator[BenchCase]:
    """The products, then whole models in full runs on a CPU."""
    for product in products(settings.quick):
        yield BenchCase(
            suite=SUITE,
            label=product.label,
            dtype=product.mode,
            device=settings.device,
            seconds=0.2 if settings.quick else 0.5,
            make=functools.partial(_work, product, settings.device),
        )
    if settings.quick or settings.device != "cpu":
        return
    for model in MODELS:
        for phase, make in (("decode", _decode), ("prefill", _prefill)):
            yield BenchCase(
                suite=SUITE,
                label=f"{phase} random-{model}",
                dtype="int8",
                seconds=10,
                min_rounds=3,
                make=functools.partial(make, f"random-{model}"),
            )


def _work(product: Product, device: str) -> Work:
    x = torch.randn(product.rows, product.k, generator=generator()).bfloat16().to(device)
    functions = {OURS: _ours(product, x, device), "torch bf16": _torch(product, x, device)}
    if device == "cpu":
        functions |= _torch_packed(product, x)
    kind = {"int8": "int8", "fp8": "bf16", "bf16": "bf16"}[product.mode]
    return Work(
        functions=functions,
        own_clock=True,
        nbytes=product.weight_bytes + 2 * product.rows * (product.k + product.n),
        flops=2.0 * product.rows * product.n * product.k,
        kind=kind,
    )


def _clocked(run: Callable[[], Any], count: int, device: str) -> Callable[[], float]:
    """Seconds of each of `count` products that `run` makes."""

    def seconds() -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    run()
    return seconds


def _copies(nbytes: int) -> int:
    return max(2, -(-ROTATION_BYTES // max(1, nbytes)))


def _ours(product: Product, x: Tensor, device: str) -> Callable[[], float]:
    weights = [_packed(product, device) for _ in range(_copies(product.weight_bytes))]

    def run() -> None:
        for w in weights:
            ops.quant_matmul(x, w.data, w.scales, w.format, w.n, activation=product.mode)

    captured, _ = graph.record(run, device)

    def replay(_: object = run) -> None:  # `run` keeps x and the weights alive, which CUDA does not
        captured.replay()

    return _clocked(replay, len(weights), device)


def _packed(product: Product, device: str) -> PackedWeight:
    # Any codes and scales will do: timing does not depend on the values. 60 is 0x3c: fp16's 1.06.
    # On the CPU they lie in huge pages, as a loaded model's.
    kind, r = QUANT_FORMATS[product.format], rows_per_group(device)
    arena = Arena()

    def filled(shape: Sequence[int], dtype: torch.dtype, value: int) -> Tensor:
        if device == "cpu":
            return arena.empty(shape, dtype).fill_(value)
        return torch.full(tuple(shape), value, dtype=dtype, device=device)

    data_shape = layout.data_shape(product.format, product.n, product.k, r)
    shape = layout.scales_shape(product.format, product.n, product.k, r)
    return PackedWeight(
        filled(data_shape, torch.uint8, 60),
        filled(shape, kind.scale_dtype, 60 if kind.mixed else 1),
        product.format,
        product.n,
        product.k,
    )


def _each(
    function: Callable[[Any], Any], make: Callable[[], Any], nbytes: int, device: str
) -> Callable[[], float]:
    weights = [make() for _ in range(_copies(nbytes))]

    @torch.no_grad()
    def run() -> None:
        for w in weights:
            function(w)

    return _clocked(run, len(weights), device)


def _torch(product: Product, x: Tensor, device: str) -> Callable[[], float]:
    def make() -> Tensor:
        return torch.full((product.n, product.k), 0.01, dtype=torch.bfloat16, device=device)

    return _each(lambda w: F.linear(x, w), make, 2 * product.n * product.k, device)


def _torch_packed(product: Product, x: Tensor) -> dict[str, Callable[[], float]]:
    """torch's products of int8 rows and of int4 groups with zero points, in bfloat16."""
    n, k = product.n, product.k
    if product.format == "int8":
        scales = torch.ones(n, dtype=torch.bfloat16)
        return {
            "torch int8": _each(
                lambda w: torch._weight_int8pack_mm(x, w, scales),
                lambda: torch.full((n, k), 3, dtype=torch.int8),
                n * k,
                "cpu",
            )
        }
    if product.format.startswith("int4"):
        group = QUANT_FORMATS[product.format].group
        zeros = torch.ones(k // group, n, 2, dtype=torch.bfloat16)
        codes = torch.full((n, k), 3, dtype=torch.int32)
        return {
            "torch int4": _each(
                lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group, zeros),
                lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2),
                n * k // 2,
                "cpu",
            )
        }
    return {}


def _decode(model: str) -> Work:
    path = model_path(model)
    llm = LLM(path, max_model_len=1024)
    start = llm.config.bos_token_id or 0
    functions: dict[str, Callable[[], Any]] = {
        OURS: lambda: llm.generate([[start]], decode_params())
    }
    if peers.has_llama_cpp():
        llama = peers.llama_cpp_model(path, torch.get_num_threads())
        functions["llama.cpp"] = peers.llama_cpp_decode(llama, start, TOKENS)
    return Work(functions=functions, unit="tok/s", amount=TOKENS)


def _prefill(model: str) -> Work:
    path = model_path(model)
    llm = LLM(path, max_model_len=1024)
    params, prompts = decode_params(1), random_prompts(llm.config, PROMPT, 0)
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: llm.generate([prompts()], params)}
    if peers.has_llama_cpp():
        llama = peers.llama_cpp_model(path, torch.get_num_threads())
        functions["llama.cpp"] = peers.llama_cpp_prefill(
            llama, random_prompts(llm.config, PROMPT, 1)
        )
    return Work(functions=functions, unit="tok/s", amount=PROMPT)


def summary(rows: Sequence[Row]) -> list[str]:
    """The worst of each bar: bandwidth at 1 row, the ratio at 512 rows, the ratio at any count."""
    found = []
    ours = [row for row in rows if "torch bf16" in row.ratio]
    one = [row for row in ours if " 1x" in row.case and row.percent_of_bound is not None]
    for row in sorted(one, key=lambda row: row.percent_of_bound or 0)[:1]:
        found.append(f"least share of the bound at 1 row: {row.percent_of_bound:.0f}% ({row.case})")
    for mode in sorted({row.dtype for row in ours}):
        for what, text in (("at 512 rows", " 512x"), ("at any count of rows", "")):
            some = [row for row in ours if row.dtype == mode and text in row.case]
            if some:
                worst = min(some, key=lambda row: row.ratio["torch bf16"])
                ratio = worst.ratio["torch bf16"]
                found.append(f"{mode}, {what}: at least {ratio:.2f}x torch bf16 ({worst.case})")
    return found


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_quant(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)

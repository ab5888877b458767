"""What quantize gives beside the bits of its definition: errors, round trips, bad input."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.dequantize import dequantize
from fastllm.ops.quant_format import QUANT_FORMATS, fit
from fastllm.ops.quantize import quantize
from fastllm.quantize.gguf_blocks import dequantize as dequantize_blocks
from fastllm.quantize.packed import gguf_rows, quantize_weight, unpack
from fastllm.testing.infos.quantize import weights
from fastllm.testing.opinfo import generator

FORMATS = layout.QUANTIZED
FLOAT_SCALES = ("int8", "nf4", "nf4_dq", "fp8", "fp8_block")


def normal(n: int = 64, k: int = 1024, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=generator(seed))


def heavy(n: int = 64, k: int = 1024) -> Tensor:
    """Student's t with 4 degrees of freedom: rows with outliers, as trained weights have them."""
    g = generator(1)
    square = sum(torch.randn(n, k, generator=g).square() for _ in range(4))
    return torch.randn(n, k, generator=g) * (4 / square).sqrt()


def importances(k: int = 1024) -> Tensor:
    return torch.randn(k, generator=generator(2)).exp()


def error(w: Tensor, format: str, importance: Tensor | None = None) -> float:
    """The weighted squared error, relative to the weighted sum of squares."""
    values = unpack(quantize_weight(w, format, importance))
    counts = torch.ones(w.shape[1]) if importance is None else importance
    return ((counts * (values - w).square()).sum() / (counts * w.square()).sum()).item()


# --- llama.cpp -----------------------------------------------------------------------------------

GGML_TYPES = {
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
}


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The library of llama-cpp-python with its quantizers."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama-cpp-python is not installed")
    path = Path(spec.submodule_search_locations[0]) / "lib" / "libggml-base.so"
    if not path.exists():
        pytest.skip("llama-cpp-python carries no libggml-base.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *(long,) * 3, pointer]
    return library


def ggml_blocks(library: ctypes.CDLL, w: Tensor, format: str, importance: Tensor | None) -> Tensor:
    rows = torch.empty_like(gguf_rows(quantize_weight(w, format)))
    given = None if importance is None else importance.data_ptr()
    number = GGML_TYPES[format]
    size = library.ggml_quantize_chunk(number, w.data_ptr(), rows.data_ptr(), 0, *w.shape, given)
    assert size == rows.numel()
    return rows


@pytest.mark.parametrize("format", GGML_TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_error_is_at_most_that_of_llama_cpp(
    ggml: ctypes.CDLL, format: str, weighted: bool
) -> None:
    importance = importances() if weighted else None
    counts = importances() if weighted else torch.ones(1024)
    for w in (normal(), heavy()):
        theirs = dequantize_blocks(format, ggml_blocks(ggml, w, format, importance))
        bound = ((counts * (theirs - w).square()).sum() / (counts * w.square()).sum()).item()
        ours = error(w, format, importance)
        searched = weighted or format.endswith("_k")
        assert ours <= (0.98 if searched else 1.0001) * bound, f"{ours / bound:.4f}"


def constant_blocks(value: float) -> Tensor:
    w = 0.02 * normal(8, 512)
    w[:, 32:64], w[:, 300:] = value, 2 * value
    return w


def one_live_column(rest: float) -> Tensor:
    return torch.full((512,), rest).index_fill(0, torch.arange(5, 512, 32), 1.0)


HARD = {
    "ones": (torch.ones(4, 512), None),
    "minus ones": (-torch.ones(4, 512), None),
    "constant blocks": (constant_blocks(0.05), None),
    "negative blocks": (constant_blocks(-0.05), None),
    "offset": (1.0 + 0.01 * normal(8, 512), None),
    "small offset": (1.0 + 0.1 * normal(8, 512), None),
    "negative offset": (-1.0 + 0.01 * normal(8, 512), None),
    "large": (6e4 + normal(8, 512), None),
    "one live column": (normal(8, 512), one_live_column(0.0)),
    "others 1e-8": (normal(8, 512), one_live_column(1e-8)),
    "others 1e-6": (normal(8, 512), one_live_column(1e-6)),
    "others 1e-4": (normal(8, 512), one_live_column(1e-4)),
    "massive": (normal(8, 512), torch.ones(512).index_fill(0, torch.tensor([7]), 1e8)),
    "offset, weighted": (1.0 + 0.01 * normal(8, 512), importances(512)),
}


@pytest.mark.parametrize("format", GGML_TYPES)
@pytest.mark.parametrize("case", HARD)
def test_constants_offsets_and_lone_importances_keep_llama_cpp_s_error(
    ggml: ctypes.CDLL, format: str, case: str
) -> None:
    w, importance = HARD[case]
    counts = torch.ones(512) if importance is None else importance
    theirs = dequantize_blocks(format, ggml_blocks(ggml, w, format, importance))
    bound = ((counts * (theirs - w).square()).sum() / (counts * w.square()).sum()).item()
    # 2e-3 of a value is what fp16 scales of large minimums may cost.
    assert error(w, format, importance) <= 1.001 * bound + 4e-6


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_without_importances_the_bytes_are_those_of_llama_cpp(
    ggml: ctypes.CDLL, format: str
) -> None:
    w = torch.cat([normal(), weights(generator(5), 20, 1024)])
    assert torch.equal(gguf_rows(quantize_weight(w, format)), ggml_blocks(ggml, w, format, None))


# --- what a search gains -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int4_g32", "int4_g64", "int4_g128"])
def test_searched_int4_is_better_than_the_largest_magnitude_over_7_or_8(format: str) -> None:
    w, group = normal(), QUANT_FORMATS[format].group
    x = w.unflatten(1, (-1, group))
    peaks = x.abs().amax(-1, keepdim=True)
    for top in (7.0, 7.5, 8.0):
        d = (peaks / top).half().float()
        plain = ((d * (x / d).round().clamp(-8, 7) - x).square().sum() / w.square().sum()).item()
        assert error(w, format) < 0.9 * plain


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in FLOAT_SCALES])
def test_importances_move_the_error_to_columns_that_count_less(format: str) -> None:
    w, importance = normal(), importances()
    alike = unpack(quantize_weight(w, format))
    plain = (importance * (alike - w).square()).sum() / (importance * w.square()).sum()
    assert error(w, format, importance) < plain.item()


@pytest.mark.parametrize("format", ["q4_k", "q6_k", "int4_g128", "q5_1"])
def test_importances_have_no_scale_and_may_be_of_every_value(format: str) -> None:
    w, importance = normal(20, 512), importances(512)
    once = quantize(w, format, importance)
    for other in (importance * 2.0**70, importance * 2.0**-70, importance.expand(20, 512)):
        for a, b in zip(once, quantize(w, format, other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("format", ["q4_k", "q6_k", "int4_g32", "q5_1"])
def test_groups_without_importance_count_every_column(format: str) -> None:
    w = normal(20, 512)
    none = quantize(w, format, torch.zeros(512))
    for a, b in zip(none, quantize(w, format, torch.ones(512)), strict=True):
        assert torch.equal(a, b)


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["q4_0", "q5_0", "q8_0", "int8", "nf4", "fp8", "fp8_block"])
@pytest.mark.parametrize("make", [normal, heavy])
def test_what_was_quantized_comes_back_byte_for_byte(format: str, make: object) -> None:
    w = make() * 0.05  # type: ignore[operator]
    data, scales = quantize(w, format)
    again = quantize(dequantize(data, scales, format, *w.shape), format)
    assert torch.equal(again[0], data) and torch.equal(again[1], scales)


@pytest.mark.parametrize("format", ["int4_g32", "int4_g64", "int4_g128", "nf4_dq"])
def test_what_was_quantized_comes_back_in_values(format: str) -> None:
    w = normal() * 0.05
    values = unpack(quantize_weight(w, format))
    assert torch.equal(unpack(quantize_weight(values, format)), values)


@pytest.mark.parametrize("format", ["q4_k", "q5_k", "q6_k"])
def test_grids_of_k_quants_come_back_where_sub_blocks_use_their_codes(format: str) -> None:
    """Each holds the first code and one of the last four; a 6-bit scale is 63 (q6_k: 127)."""
    kind, g = QUANT_FORMATS[format], generator(7)
    n, k, top = 24, 1024, (1 << kind.bits) - 1
    codes = torch.randint(0, top + 1, (n, k), generator=g).to(torch.uint8)
    codes[:, :: kind.group] = 0
    codes[:, 1 :: kind.group] = top - torch.randint(0, 4, (n, 1), generator=g).to(torch.uint8)
    shape = (n, k // 256)
    halves = [(0.001 * (1 + torch.rand(*shape, 1, generator=g))).half() for _ in range(2)]
    if format == "q6_k":
        integers = torch.randint(-127, 128, (*shape, 16), generator=g).to(torch.int8)
        integers[..., 3], parts = 127, halves[:1]
    else:
        integers = torch.randint(1, 64, (*shape, 16), generator=g).to(torch.uint8)
        integers[..., 4:6], parts = 63, halves
    data, scales = layout.pack_parts(codes, [*parts, integers], format, 16)
    values = dequantize(data, scales, format, n, k)
    assert torch.equal(unpack(quantize_weight(values, format)), values)


@pytest.mark.parametrize("given", [None, "columns"])
def test_it_compiles_into_one_graph(given: str | None) -> None:
    w = normal(16, 256)
    importance = None if given is None else importances(256)
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    for format in ("q4_0", "q4_k"):
        made = zip(compiled(w, format, importance), quantize(w, format, importance), strict=True)
        assert all(torch.equal(*pair) for pair in made)


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_and_rows_beyond_the_last_are_zero_bytes(format: str) -> None:
    w = normal(19, 512)
    w[3], w[4, 256:] = 0.0, 0.0
    data, scales = quantize(w, format)
    values = dequantize(data, scales, format, 19, 512)
    assert not values[3].any() and not values[4, 256:].any()
    assert not layout.deinterleave(data, 32)[19:].any()
    for part in layout.split_scales(scales, format, 32, 512):
        assert not part[19:].contiguous().flatten().view(torch.uint8).any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [1.0, -3e-3, 2000.0])
def test_a_single_value_survives(format: str, value: float) -> None:
    w = torch.zeros(3, 512)
    w[1, 300] = value
    values = unpack(quantize_weight(w, format))
    assert values[1, 300].item() == pytest.approx(value, rel=2e-2)
    values[1, 300] = 0.0
    # A zero above a minimum is d u + m of rounded d and m.
    minimum = QUANT_FORMATS[format].scales in ("half_min", "super_min") and value < 0
    assert values.abs().max().item() <= (2e-2 * abs(value) if minimum else 0.0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_named(format: str, value: float) -> None:
    w = normal(40, 256)
    w[37, 255] = w[39, 0] = value
    with pytest.raises(ValueError, match="row 37 of w holds NaN or infinity"):
        quantize(w, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_too_large_for_fp16_scales_is_named(format: str) -> None:
    w = normal(40, 256)
    for value in (1e9, 3e38):
        w[35, 3] = value
        if format in FLOAT_SCALES:
            quantize(w, format)
            continue
        with pytest.raises(ValueError, match=f"row 35 of w holds .* fp16 scales of {format}"):
            quantize(w, format)


@pytest.mark.parametrize(
    ("w", "format", "importance", "message"),
    [
        (torch.zeros(2, 32), "q4_z", None, "does not exist"),
        (torch.zeros(2, 32), "bf16", None, "dense"),
        (torch.zeros(2, 128), "q4_k", None, "multiples of 256"),
        (torch.zeros(32), "q4_0", None, "w must be"),
        (torch.zeros(2, 32, dtype=torch.float64), "q4_0", None, "w must be"),
        (torch.zeros(2, 32), "q4_0", torch.ones(31), "importance must be"),
        (torch.zeros(2, 32), "q4_0", torch.ones(32).double(), "importance must be float32"),
        (torch.zeros(2, 32), "q4_0", -torch.ones(32), "not negative"),
        (torch.zeros(2, 32), "q4_0", torch.full((32,), float("nan")), "finite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    w: Tensor, format: str, importance: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(w, format, importance)


def test_dequantize_refuses_other_shapes_and_dtypes() -> None:
    data, scales = quantize(normal(5, 256), "q4_k")
    with pytest.raises(ValueError, match="columns"):
        dequantize(data, scales, "q4_k", 5, 512)
    with pytest.raises(ValueError, match="not a q4_k weight"):
        dequantize(data, scales, "q4_k", 17, 256)
    with pytest.raises(ValueError, match="dtype"):
        dequantize(data, scales, "q4_k", 5, 256, torch.float64)


def test_strides_gradients_and_dtypes_of_weights_do_not_matter() -> None:
    w = normal(20, 512).half()
    want = quantize(w.float(), "q6_k")
    columns = torch.nn.Parameter(w.T.contiguous().T)
    for other in (w, columns, torch.cat([w, w], 1)[:, 512:]):
        for a, b in zip(want, quantize(other, "q6_k"), strict=True):
            assert torch.equal(a, b)


def test_dense_formats_and_aliases_are_packed_too() -> None:
    w = normal(5, 128)
    assert torch.equal(unpack(quantize_weight(w, "bf16")), w.bfloat16().float())
    assert torch.equal(unpack(quantize_weight(w, "f32")), w)
    assert quantize_weight(w, "int4").format == "int4_g128"
    assert quantize_weight(w, fit("q4_k", 128)).format == "q5_0"

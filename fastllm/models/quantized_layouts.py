"""How directories quantized by other libraries hold a matrix: one class for each library's layout.

A layout is made from `quantization_config` of config.json, which it checks, and knows the names of
a matrix's tensors, its shape and format as headers tell them, and how to read it. What it cannot
read is an error that names the key and what is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from torch import Tensor

from fastllm.models.fields import Fields, describe
from fastllm.models.safetensors_files import SafetensorsEntry
from fastllm.models.stored_tensor import StoredTensor
from fastllm.ops.quant_format import BLOCK, format_of
from fastllm.quantize import (
    awq_files,
    bitsandbytes_files,
    compressed_tensors,
    fastllm_files,
    gptq_files,
)
from fastllm.quantize.coded import INT4_GROUPS, CodedWeight

MAX_MODULES = 1 << 20
EXPANDED = "f32"  # what a matrix comes out as whose codes none of our formats can hold
Entries = Mapping[str, SafetensorsEntry]  # the tensors of a matrix by part
Reader = Callable[[str], Tensor]  # the tensor of a part
Described = tuple[tuple[int, int], str]  # shape, format


class Layout(Protocol):
    """How one library holds a matrix."""

    @property
    def name(self) -> str:
        """Of the library's layout."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of a matrix's tensors, after the module's name and a dot."""

    @property
    def keys(self) -> tuple[str, ...]:
        """A module with one of these tensors is quantized."""

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        """((n, k), format) without reading codes. Raises ValueError naming the tensor."""

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        """The matrix. Raises ValueError naming the tensor."""


def layout_of(fields: Fields) -> Layout:
    """The layout that `quantization_config` of a config.json names.

    Raises:
        ModelFileError: on a method, or a variant of one, that is not supported.
    """
    method = fields.string("quant_method", default=None)
    if method is None and (fields.has("load_in_4bit") or fields.has("load_in_8bit")):
        method = "bitsandbytes"  # early versions wrote no method
    if method not in _LAYOUTS:
        raise fields.fail(
            "quant_method",
            f"{describe(method)} is not supported",
            f"Supported: {', '.join(_LAYOUTS)}; or use the unquantized checkpoint or a GGUF file",
        )
    return _LAYOUTS[method](fields)


def _stored(weight: CodedWeight) -> StoredTensor:
    if weight.order is not None:  # no format has columns out of order
        return StoredTensor(EXPANDED, (weight.n, weight.k), weight.values())
    return StoredTensor.of_canonical(weight.format, *weight.canonical(), weight.n, weight.k)


def _out_of_order(name: str, parts: Entries, read: Reader, k: int, groups: int) -> bool:
    """Whether a tensor of this name puts columns into groups out of their order (act-order)."""
    if name not in parts:
        return False
    if parts[name].shape != (k,):
        raise ValueError(f"{name} has shape {list(parts[name].shape)}, {[k]} is expected")
    return gptq_files.column_order(read(name), k // groups) is not None


def _shapes(parts: Entries, *required: str) -> dict[str, tuple[int, ...]]:
    for name in required:
        if name not in parts:
            raise ValueError(f"{name} is missing from the files")
    return {name: entry.shape for name, entry in parts.items()}


def _check_groups(k: int, groups: int, columns: Collection[int]) -> None:
    """Raise ValueError if config.json, which may say nothing, says other groups of rows of k."""
    if columns and not any(groups == (-(-k // c) if c > 0 else 1) for c in columns):
        sizes = " or ".join(str(c) if c > 0 else "whole rows" for c in sorted(columns))
        raise ValueError(
            f"there are scales for {groups} groups in rows of {k} columns; group_size of "
            f"config.json is {sizes}"
        )


def _matrix(parts: Entries) -> tuple[int, int]:
    """The shape of `weight`, codes of a byte each."""
    shape = _shapes(parts, "weight")["weight"]
    if len(shape) != 2:
        raise ValueError(f"weight has shape {list(shape)}, a matrix is expected")
    return shape[0], shape[1]


def _format(bits: int, symmetric: bool, groups: int, k: int) -> str:
    """The format of integers of 4 or 8 bits."""
    if bits == 8:
        return "int8" if groups == 1 else "q8_0"
    group = next((g for g in INT4_GROUPS if (k // groups) % g == 0), INT4_GROUPS[-1])
    return f"int4_g{group}" if symmetric else f"int4_asym_g{group}"


class GptqLayout:
    """AutoGPTQ, GPTQModel: 4 and 8 bits."""

    name = "gptq"
    parts = (*gptq_files.REQUIRED, *gptq_files.OPTIONAL)
    keys = ("qweight",)

    def __init__(self, fields: Fields) -> None:
        bits = fields.integer("bits")
        if bits not in (4, 8):
            raise fields.fail("bits", f"{bits} is not supported", "Supported: 4 and 8")
        key = "checkpoint_format" if fields.has("checkpoint_format") else "format"
        version = fields.string(key, default="gptq")
        if version not in ("gptq", "gptq_v2"):
            raise fields.fail(
                key, f"{describe(version)} is not supported", "Supported: gptq and gptq_v2"
            )
        self._version = 2 if version == "gptq_v2" else 1
        self._symmetric = fields.boolean("sym", default=True)
        self._columns = fields.integer("group_size", default=None)  # -1: a whole row
        if fields.has("dynamic"):  # modules have groups of their own
            self._columns = None

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        shapes = _shapes(parts, *gptq_files.REQUIRED)
        n, k, bits = gptq_files.shape_of(shapes)
        groups = shapes["scales"][0]
        if self._columns is not None:
            _check_groups(k, groups, (self._columns,))
        if _out_of_order("g_idx", parts, read, k, groups):
            return (n, k), EXPANDED
        return (n, k), _format(bits, self._symmetric, groups, k)

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        return _stored(gptq_files.from_files(tensors, version=self._version))


class AwqLayout:
    """AutoAWQ's version "gemm": 4 bits."""

    name = "awq"
    parts = awq_files.REQUIRED
    keys = ("qweight",)

    def __init__(self, fields: Fields) -> None:
        bits = fields.integer("bits", default=fields.integer("w_bit", default=4))
        if bits != 4:
            raise fields.fail("bits", f"{bits} is not supported", "Supported: 4")
        names = ("version", "checkpoint_format", "format")
        key = next((name for name in names if fields.has(name)), "version")
        version = fields.string(key, default="gemm").lower()
        if version != "gemm":
            raise fields.fail(key, f"{describe(version)} is not supported", "Supported: gemm")

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        shapes = _shapes(parts, *awq_files.REQUIRED)
        n, k = awq_files.shape_of(shapes)
        return (n, k), _format(4, False, shapes["scales"][0], k)

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        return _stored(awq_files.from_files(tensors))


class BitsAndBytesLayout:
    """bitsandbytes: NF4 in blocks of 64."""

    name = "bitsandbytes"
    parts = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
        "weight.nested_quant_map", f"weight.{bitsandbytes_files.STATE}",
        f"weight.{bitsandbytes_files.OTHER_STATE}", "SCB", "weight_format",
    )  # fmt: skip
    keys = ("weight.absmax", "SCB")

    def __init__(self, fields: Fields) -> None:
        if fields.boolean("load_in_8bit", default=False):
            raise fields.fail(
                "load_in_8bit",
                "8-bit checkpoints of bitsandbytes are not supported",
                "Supported: load_in_4bit with bnb_4bit_quant_type nf4; `fastllm quantize "
                "--format int8` makes 8-bit models from unquantized ones",
            )
        kind = fields.string("bnb_4bit_quant_type", default="fp4")  # the library's own default
        if kind != "nf4":
            raise fields.fail(
                "bnb_4bit_quant_type", f"{describe(kind)} is not supported", "Supported: nf4"
            )

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        _shapes(parts, "weight", "weight.quant_map", f"weight.{bitsandbytes_files.STATE}")
        state = bitsandbytes_files.read_state(read(f"weight.{bitsandbytes_files.STATE}"))
        return (state["shape"][0], state["shape"][1]), "nf4"

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        plain = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
        return _stored(bitsandbytes_files.from_files(plain))


class CompressedTensorsLayout:
    """compressed-tensors: packed int4 and int8, int8 and fp8 bytes."""

    name = "compressed-tensors"
    parts = ("weight", *compressed_tensors.PARTS)
    keys = ("weight_packed", "weight_scale")

    def __init__(self, fields: Fields) -> None:
        self._check_format(fields, fields.string("format", default="pack-quantized"))
        self._columns: set[int] = set()  # under one scale; 0: whole rows
        groups = fields.section("config_groups") or Fields({}, fields.file)
        for name in groups.values:
            group = groups.section(name)
            if group is not None:
                self._check_group(group)
        sparsity = fields.section("sparsity_config")
        if sparsity is not None and sparsity.string("format", default="dense") != "dense":
            raise sparsity.fail("format", "sparse weights are not supported", "Supported: dense")

    def _check_format(self, fields: Fields, format: str) -> None:
        known = (*compressed_tensors.FORMATS, "mixed-precision", "dense")
        if format not in known:
            raise fields.fail(
                "format", f"{describe(format)} is not supported", f"Supported: {', '.join(known)}"
            )

    def _check_group(self, group: Fields) -> None:
        self._check_format(group, group.string("format", default="dense"))
        weights = group.section("weights")
        if weights is None:
            return
        bits, kind = weights.integer("num_bits", default=8), weights.string("type", default="int")
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise weights.fail(
                "num_bits", f"{bits} of type {describe(kind)} is not supported",
                "Supported: int of 4 and 8 bits, float of 8",
            )  # fmt: skip
        self._columns.add(weights.integer("group_size", default=None) or 0)

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        shapes = _shapes(parts, "weight_scale")
        scales = shapes["weight_scale"]
        groups = scales[1] if len(scales) == 2 else 1
        if "weight_packed" in shapes:
            _shapes(parts, "weight_shape")
            n, k = compressed_tensors.packed_shape({"weight_shape": read("weight_shape")})
            _check_groups(k, groups, self._columns)
            if groups and not k % groups:
                if _out_of_order("weight_g_idx", parts, read, k, groups):
                    return (n, k), EXPANDED
            words = shapes["weight_packed"][-1]
            bits = 4 if words == -(-k * 4 // 32) else 8
            return (n, k), _format(bits, "weight_zero_point" not in shapes, groups, k)
        n, k = _matrix(parts)
        rows = scales in ((n, 1), (1, 1), (n,), (1,), ())
        if parts["weight"].dtype == "I8":
            return (n, k), "int8" if rows else "q8_0"
        return (n, k), "fp8" if rows else "fp8_block"

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        return _stored(compressed_tensors.from_files(tensors))


class Fp8Layout:
    """DeepSeek, Qwen and others: e4m3 with a scale for each block of 128 x 128, or for all."""

    name = "fp8"
    parts = ("weight", "weight_scale_inv", "weight_scale")
    keys = ("weight_scale_inv", "weight_scale")

    def __init__(self, fields: Fields) -> None:
        kind = fields.string("fmt", default="e4m3")
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise fields.fail("fmt", f"{describe(kind)} is not supported", "Supported: e4m3")
        size = fields.sequence("weight_block_size", 2, default=None)
        self._block = None
        if size is not None:
            if len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in size):
                raise fields.fail("weight_block_size", "is not two sizes")
            if size[1] != 128:
                raise fields.fail(
                    "weight_block_size", f"{list(size)} is not supported", "Supported: [128, 128]"
                )
            self._block = size[0], size[1]

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        n, k = _matrix(parts)
        return (n, k), "fp8" if self._block is None else "fp8_block"

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        return _stored(compressed_tensors.from_files(tensors, self._block))


class FastllmLayout:
    """Our own: any format, the bytes of each row."""

    name = "fastllm"
    parts = (*fastllm_files.PARTS, *fastllm_files.OPTIONAL)
    keys = ("weight_codes",)

    def __init__(self, fields: Fields) -> None:
        version = fields.integer("version")
        if version != fastllm_files.VERSION:
            raise fields.fail(
                "version", f"{version} is not supported", f"Supported: {fastllm_files.VERSION}"
            )
        self._formats = fields.section("formats") or Fields({}, fields.file, fields.prefix)
        if len(self._formats.values) > MAX_MODULES:
            raise fields.fail("formats", f"names more than {MAX_MODULES} modules")

    def describe(self, module: str, parts: Entries, read: Reader) -> Described:
        shapes = _shapes(parts, *fastllm_files.PARTS)
        format = format_of(self._formats.string(module)).name
        if len(shapes["weight_codes"]) != 2:
            raise ValueError(f"weight_codes has shape {list(shapes['weight_codes'])}")
        n, width = shapes["weight_codes"]
        return (n, fastllm_files.columns_of(format, width)), format

    def load(self, module: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        format = format_of(self._formats.string(module)).name
        data, scales = fastllm_files.from_files(tensors, format)
        return StoredTensor.of_canonical(format, data, scales, data.shape[0], data.shape[1] * BLOCK)


_LAYOUTS: Mapping[str, Callable[[Fields], Layout]] = {
    layout.name: layout
    for layout in (
        GptqLayout, AwqLayout, BitsAndBytesLayout, CompressedTensorsLayout, Fp8Layout,
        FastllmLayout,
    )
}  # fmt: skip

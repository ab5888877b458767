"""compressed-tensors checkpoints (llm-compressor, vLLM) and block-scaled fp8, from and to codes.

A module holds, for a weight of n rows and k columns, either packed integers

    weight_packed      int32 [n, ceil(k b / 32)]       codes + 2^(b-1), consecutive columns from the
                                                       lowest bits up; b is 4 or 8
    weight_scale       float [n, groups], [n, 1] or [1]
    weight_zero_point  int32 [ceil(n b / 32), groups]  zero points + 2^(b-1), consecutive rows from
                                                       the lowest bits up; asymmetric weights only
    weight_shape       int64 [2]                       n, k
    weight_g_idx       int32 [k]                       the group of each column, if not in order

or bytes

    weight             int8 or float8_e4m3fn [n, k]
    weight_scale       float [n, groups], [n, 1], [1], or [ceil(n/128), ceil(k/128)]
    weight_zero_point  int8 [n, groups]

    value = weight_scale * (code - zero_point)

Models of DeepSeek, Qwen and others with `quant_method: fp8` hold float8_e4m3fn and its scales under
the name `weight_scale_inv`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .coded import CodedWeight, byte_codes, byte_words, fp8, int4, int8, nibble_words, nibbles
from .gptq_files import column_order

PARTS = (
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape",
    "weight_g_idx",
)  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
TILE = 128


def from_files(
    tensors: Mapping[str, Tensor], block: tuple[int, int] | None = None, bits: int | None = None
) -> CodedWeight:
    """The tensors of a module, by the names above, as codes.

    Args:
        block: rows and columns under a scale of fp8, if blocks have them.
        bits: of packed codes; None: 4 or 8, whichever fills the words.

    Raises:
        ValueError: on shapes or dtypes that do not fit, scales that are not finite, or anything
            that our formats do not hold.
    """
    if "weight_packed" in tensors:
        return _from_packed(tensors, bits)
    weight = tensors["weight"]
    name = "weight_scale" if "weight_scale" in tensors else "weight_scale_inv"
    if name not in tensors:
        raise ValueError("weight_scale is missing")
    scales = tensors[name]
    if weight.dtype == torch.int8:
        return _from_bytes(weight, _of_rows(scales, weight.shape[0]), tensors)
    return fp8(weight, scales, _blocks(weight, scales) if block is None else block)


def _blocks(weight: Tensor, scales: Tensor) -> tuple[int, int] | None:
    """Rows and columns under a scale, as the shape of scales tells them; None: whole rows."""
    if weight.dim() != 2 or scales.dim() != 2:
        return None
    n, k = weight.shape
    if tuple(scales.shape) in ((n, 1), (1, 1)):
        return None
    return (1, k // max(scales.shape[1], 1)) if scales.shape[0] == n else (TILE, TILE)


def _from_packed(tensors: Mapping[str, Tensor], bits: int | None) -> CodedWeight:
    words = tensors["weight_packed"]
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(
            f"weight_packed is {words.dtype} {list(words.shape)}; a matrix of int32 is supported"
        )
    n, k = packed_shape(tensors)
    bits = _bits(words.shape[1], k) if bits is None else bits
    if words.shape != (n, -(-k * bits // 32)) or bits not in (4, 8):
        raise ValueError(
            f"weight_packed of shape {list(words.shape)} does not hold {n} x {k} codes of 4 or 8 "
            "bits"
        )
    scales = _of_rows(tensors["weight_scale"], n)
    unpack = nibbles if bits == 4 else byte_codes
    codes = unpack(words)[:, :k]
    zeros = None
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"]
        if packed.dtype != torch.int32 or packed.shape != (-(-n * bits // 32), scales.shape[1]):
            raise ValueError(
                f"weight_zero_point is {packed.dtype} {list(packed.shape)}, int32 "
                f"{[-(-n * bits // 32), scales.shape[1]]} is expected"
            )
        zeros = unpack(packed.t())[:, :n].t().contiguous()
    group = _group(k, scales)
    order = column_order(tensors["weight_g_idx"], group) if "weight_g_idx" in tensors else None
    if order is not None:
        codes = codes[:, order]
    if bits == 4:
        found = int4(codes.contiguous(), scales, zeros, group)
    else:
        signed = codes.short() - (128 if zeros is None else zeros.repeat_interleave(group, 1))
        found = int8(_in_range(signed), scales, group)
    return CodedWeight(found.format, found.codes, found.scales, found.zeros, order)


def _from_bytes(weight: Tensor, scales: Tensor, tensors: Mapping[str, Tensor]) -> CodedWeight:
    group = _group(weight.shape[1], scales)
    if "weight_zero_point" in tensors:
        zeros = tensors["weight_zero_point"]
        zeros = zeros.reshape(-1, 1) if zeros.dim() < 2 else zeros
        if zeros.dtype != torch.int8 or zeros.shape[1] != scales.shape[1]:
            raise ValueError(f"weight_zero_point is {zeros.dtype} {list(zeros.shape)}")
        zeros = zeros.expand(weight.shape[0], -1)
        weight = _in_range(weight.short() - zeros.short().repeat_interleave(group, 1))
    return int8(weight, scales, group)


def packed_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(n, k) as `weight_shape` says. Raises ValueError if it is missing or none."""
    shape = tensors.get("weight_shape")
    if shape is None or shape.is_floating_point() or shape.numel() != 2:
        raise ValueError("weight_shape is missing or is not two integers")
    n, k = shape.flatten().tolist()
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31):
        raise ValueError(f"weight_shape is {[n, k]}")
    return n, k


def _bits(words: int, k: int) -> int:
    for bits in (4, 8):
        if words == -(-k * bits // 32):
            return bits
    raise ValueError(f"rows of {words} words do not hold {k} codes of 4 or 8 bits")


def _of_rows(scales: Tensor, n: int) -> Tensor:
    """[n, groups] of [n, groups], [n], [n, 1], [1] or [1, 1]."""
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    return scales.expand(n, -1).contiguous() if scales.shape[0] == 1 else scales


def _group(k: int, scales: Tensor) -> int:
    groups = scales.shape[1] if scales.dim() == 2 else 0
    if groups < 1 or k % groups:
        raise ValueError(f"weight_scale {list(scales.shape)} does not divide rows of {k} columns")
    return k // groups


def _in_range(values: Tensor) -> Tensor:
    if bool(((values < -128) | (values > 127)).any()):
        raise ValueError(
            "8-bit codes minus their zero points lie outside of -128..127; quantize the model "
            "symmetrically, or here from the unquantized checkpoint"
        )
    return values.to(torch.int8)


def to_files(weight: CodedWeight) -> dict[str, Tensor]:
    """The tensors that hold a weight: the inverse of `from_files`.

    Raises:
        ValueError: for nf4, which has no such form, and for fp8_block scales that differ within
            128 rows.
    """
    n, k = weight.codes.shape
    kind = weight.format
    if kind == "fp8":
        codes = weight.codes.view(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": weight.scales}
    if kind == "fp8_block":
        scales = weight.scales[::TILE].contiguous()
        if not torch.equal(scales.repeat_interleave(TILE, 0)[:n], weight.scales):
            raise ValueError("scales of fp8_block differ within 128 rows")
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    found = {"weight_scale": weight.scales, "weight_shape": torch.tensor([n, k])}
    if kind.startswith("int4"):
        found["weight_packed"] = nibble_words(weight.codes)
    elif kind in ("int8", "q8_0"):
        codes = (weight.codes.short() + 128).to(torch.uint8)
        found["weight_packed"] = byte_words(codes)
    else:
        raise ValueError(f"compressed-tensors does not hold {kind}: it holds int4, int8 and fp8")
    if weight.zeros is not None:
        rows = torch.nn.functional.pad(weight.zeros.t(), (0, -n % 8))
        found["weight_zero_point"] = nibble_words(rows).t().contiguous()
    if weight.order is not None:
        groups = torch.arange(k, dtype=torch.int32) // (k // weight.scales.shape[1])
        codes = torch.empty_like(weight.codes).index_copy_(1, weight.order, weight.codes)
        plain = CodedWeight(kind, codes, weight.scales, weight.zeros)
        found |= to_files(plain)
        found["weight_g_idx"] = torch.empty_like(groups).index_copy_(0, weight.order, groups)
    return found


def config(formats: Mapping[str, str], ignore: Iterable[str] = ()) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        formats: the format of each quantized module, by its full name.
        ignore: names of linear modules that are not quantized.

    Raises:
        ValueError: for a format that compressed-tensors does not hold, or no module at all.
    """
    if not formats:
        raise ValueError("no module is quantized")
    modules: dict[str, list[str]] = {}
    for module, format in formats.items():
        modules.setdefault(format, []).append(module)
    groups = {}
    for number, (format, names) in enumerate(modules.items()):
        targets = ["Linear"] if len(modules) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, **_scheme(format)}
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(format: str) -> dict[str, Any]:
    """What config.json says of the modules of one format."""
    if format.startswith("fp8"):
        block = format == "fp8_block"
        weights = _arguments(8, "float", "block" if block else "channel")
        inputs = _arguments(8, "float", "group" if block else "token") | {"dynamic": True}
        if block:
            weights["block_structure"], inputs["group_size"] = [TILE, TILE], TILE
        return {"weights": weights, "input_activations": inputs, "format": "float-quantized"}
    if format == "int8":
        weights = _arguments(8, "int", "channel")
    elif format == "q8_0":
        weights = _arguments(8, "int", "group") | {"group_size": 32}
    elif format.startswith("int4"):
        weights = _arguments(4, "int", "group") | {
            "group_size": int(format.rpartition("_g")[2]),
            "symmetric": not format.startswith("int4_asym"),
        }
    else:
        raise ValueError(f"compressed-tensors does not hold {format}: it holds int4, int8 and fp8")
    return {"weights": weights, "input_activations": None, "format": "pack-quantized"}


def _arguments(bits: int, type: str, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": type,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
    }

"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them, from and to codes.

A module holds, for a weight of n rows (outputs) and k columns (inputs) of b bits:

    qweight  int32 [k b / 32, n]       codes, consecutive columns from the lowest bits up
    qzeros   int32 [groups, n b / 32]  zero points, consecutive rows from the lowest bits up
    scales   float [groups, n]
    g_idx    int32 [k], optional       the group of each column

    value = scales * (code - zero)

Version 1 of the format ("gptq") stores 1 less than each zero point, version 2 ("gptq_v2") the zero
point itself. Version 1 is undone by one addition to the whole word, as GPTQModel does: what it
borrowed from a neighbour when a zero point was 0 goes back there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .coded import CodedWeight, byte_codes, byte_words, int4, int8, nibble_words, nibbles

REQUIRED = ("qweight", "qzeros", "scales")
OPTIONAL = ("g_idx",)
_ONES = {4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word


def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """(n, k, bits) as the shapes of a module's tensors tell them.

    Raises:
        ValueError: if they contradict one another, or bits are neither 4 nor 8.
    """
    for name in REQUIRED:
        if len(shapes[name]) != 2:
            raise ValueError(f"{name} has shape {list(shapes[name])}, two dimensions are expected")
    words, n = shapes["qweight"]
    groups, zero_words = shapes["qzeros"]
    bits = 32 * zero_words // max(n, 1)
    if bits not in _ONES or bits * n != 32 * zero_words or (32 * words) % bits:
        raise ValueError(
            f"qweight {list(shapes['qweight'])} and qzeros {list(shapes['qzeros'])} are not codes "
            "of 4 or 8 bits, which are supported"
        )
    k = 32 * words // bits
    if shapes["scales"] != (groups, n) or not groups or k % groups:
        raise ValueError(
            f"scales have shape {list(shapes['scales'])}, qzeros {list(shapes['qzeros'])} and "
            f"rows {k} columns: they do not fit"
        )
    if "g_idx" in shapes and shapes["g_idx"] != (k,):
        raise ValueError(f"g_idx has shape {list(shapes['g_idx'])}, {[k]} is expected")
    return n, k, bits


def from_files(tensors: Mapping[str, Tensor], *, version: int = 1) -> CodedWeight:
    """The tensors of a module, by the names above, as codes.

    Groups of columns that are not in order (act-order) come out in order, with `order` set.

    Args:
        version: 1 or 2 of the format, see above.

    Raises:
        ValueError: on shapes that do not fit, groups of unequal size, scales that are not finite,
            or anything that our formats do not hold.
    """
    _, k, bits = shape_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name in ("qweight", "qzeros"):
        if tensors[name].dtype != torch.int32:
            raise ValueError(f"{name} is {tensors[name].dtype}, int32 is supported")
    unpack = nibbles if bits == 4 else byte_codes
    codes = unpack(tensors["qweight"].t())
    stored = tensors["qzeros"]
    zeros = unpack(stored + _ONES[bits] if version == 1 else stored).t().contiguous()
    scales = tensors["scales"].t().contiguous()
    group = k // scales.shape[1]
    order = column_order(tensors["g_idx"], group) if "g_idx" in tensors else None
    if order is not None:
        codes = codes[:, order]
    if bits == 4:
        result = int4(codes, scales, None if bool((zeros == 8).all()) else zeros, group)
    else:
        result = int8(_signed(codes, zeros, group), scales, group)
    return CodedWeight(result.format, result.codes, result.scales, result.zeros, order)


def column_order(g_idx: Tensor, group: int) -> Tensor | None:
    """int64 `[k]`: the columns sorted by their group; None if they are.

    Raises:
        ValueError: unless every group has `group` columns.
    """
    index = g_idx.long()
    k = index.numel()
    expected = torch.arange(k) // group
    if torch.equal(index, expected):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], expected):
        raise ValueError(f"g_idx does not put {group} columns in each of {k // group} groups")
    return order


def _signed(codes: Tensor, zeros: Tensor, group: int) -> Tensor:
    values = codes.short() - zeros.short().repeat_interleave(group, 1)
    if bool(((values < -128) | (values > 127)).any()):
        raise ValueError(
            "8-bit codes with zero points other than 128 lie outside of -128..127; quantize the "
            "model symmetrically (sym=True), or here from the unquantized checkpoint"
        )
    return values.to(torch.int8)


def to_files(weight: CodedWeight, *, version: int = 1) -> dict[str, Tensor]:
    """The inverse of `from_files`, for int4_g*, int4_asym_g*, int8 and q8_0.

    Raises:
        ValueError: for another format, rows or columns that are no multiples of 32, or fp32 scales
            that float16 does not hold.
    """
    n, k = weight.codes.shape
    if n % 32 or k % 32:
        raise ValueError(f"GPTQ files hold multiples of 32 rows and columns, not {n} x {k}")
    if weight.format.startswith("int4"):
        bits, pack, codes = 4, nibble_words, weight.codes
        zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros
    elif weight.format in ("int8", "q8_0"):
        bits, pack, codes = 8, byte_words, (weight.codes.short() + 128).to(torch.uint8)
        zeros = torch.full_like(weight.scales, 128)
    else:
        raise ValueError(f"GPTQ files do not hold {weight.format}: they hold int4 and int8")
    scales = weight.scales.to(torch.float16)
    if not torch.equal(scales.float(), weight.scales.float()):
        raise ValueError(f"scales of {weight.scales.dtype} are not all held by float16")
    groups = torch.arange(k, dtype=torch.int32) // (k // weight.scales.shape[1])
    if weight.order is not None:
        codes = torch.empty_like(codes).index_copy_(1, weight.order, codes)
        groups = torch.empty_like(groups).index_copy_(0, weight.order, groups)
    stored = pack(zeros.to(torch.uint8).t().contiguous())
    return {
        "qweight": pack(codes).t().contiguous(),
        "qzeros": stored - _ONES[bits] if version == 1 else stored,
        "scales": scales.t().contiguous(),
        "g_idx": groups,
    }


def config(
    bits: int, group_size: int, symmetric: bool, *, act_order: bool = False
) -> dict[str, Any]:
    """`quantization_config` of config.json for files of version 1; group_size -1: whole rows."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": "gptq",
    }

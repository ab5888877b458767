"""AWQ checkpoints (AutoAWQ, version "gemm"), from and to codes.

A module holds, for a weight of n rows (outputs) and k columns (inputs) of 4 bits:

    qweight  int32 [k, n / 8]       codes of 8 rows in a word
    qzeros   int32 [groups, n / 8]  zero points, packed alike
    scales   float [groups, n]

The nibbles of a word, from the lowest up, belong to rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight.

    value = scales * (code - zero)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .coded import CodedWeight, int4, nibble_words, nibbles

REQUIRED = ("qweight", "qzeros", "scales")
_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles, from the lowest up
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the rows


def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(n, k) as the shapes of a module's tensors tell them.

    Raises:
        ValueError: if they contradict one another.
    """
    for name in REQUIRED:
        if len(shapes[name]) != 2:
            raise ValueError(f"{name} has shape {list(shapes[name])}, two dimensions are expected")
    k, words = shapes["qweight"]
    groups, n = shapes["scales"]
    if n != 8 * words or shapes["qzeros"] != (groups, words) or not groups or k % groups:
        found = ", ".join(f"{name} {list(shapes[name])}" for name in REQUIRED)
        raise ValueError(f"{found} are no 4-bit weight of version 'gemm'")
    return n, k


def from_files(tensors: Mapping[str, Tensor]) -> CodedWeight:
    """The tensors of a module, by the names above, as codes of format int4_asym_g*.

    Raises:
        ValueError: on shapes that do not fit, scales that are not finite, or groups that our
            formats do not have.
    """
    _, k = shape_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name in ("qweight", "qzeros"):
        if tensors[name].dtype != torch.int32:
            raise ValueError(f"{name} is {tensors[name].dtype}, int32 is supported")
    codes, zeros = (_reordered(nibbles(tensors[n]), _NIBBLES) for n in ("qweight", "qzeros"))
    scales = tensors["scales"].t().contiguous()
    return int4(codes.t().contiguous(), scales, zeros.t().contiguous(), k // scales.shape[1])


def to_files(weight: CodedWeight) -> dict[str, Tensor]:
    """The inverse of `from_files`, for int4_g* and int4_asym_g*.

    Raises:
        ValueError: for another format, or rows that are no multiple of 8.
    """
    if not weight.format.startswith("int4") or weight.order is not None or weight.n % 8:
        raise ValueError(
            f"AWQ files hold int4 in the order of the columns and multiples of 8 rows, not "
            f"{weight.format} of {weight.n} rows"
        )
    zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros
    codes = weight.codes.t().contiguous()
    return {
        "qweight": nibble_words(_reordered(codes, _ROWS)),
        "qzeros": nibble_words(_reordered(zeros.to(torch.uint8).t().contiguous(), _ROWS)),
        "scales": weight.scales.t().contiguous(),
    }


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """The last dimension's eights, each in this order."""
    return codes.unflatten(-1, (-1, 8))[..., list(order)].flatten(-2)


def config(group_size: int, not_converted: tuple[str, ...] = ()) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(not_converted) or None,
    }

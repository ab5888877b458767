"""bitsandbytes NF4 checkpoints, from and to codes.

A module holds, for a weight of n rows and k columns, beside `weight`:

    weight                                uint8 [n k / 2, 1]  two codes a byte, the first one high
    weight.absmax                         float32 [n k / 64]  scales; uint8 if they are quantized
    weight.quant_map                      float32 [16]        the value of each code
    weight.quant_state.bitsandbytes__nf4  uint8               JSON: shape, blocksize, dtype, ...

and, where the scales are quantized too ("double quantization"),

    weight.nested_absmax                  float32 [n k / 64 / 256]
    weight.nested_quant_map               float32 [256]       the value of each scale's code

    scale = nested_quant_map[absmax] * nested_absmax + nested_offset, rounded after each
    value = quant_map[code] * scale

Nested scales are expanded to float32 exactly so, and the codes and scales are kept. Our table of 16
values is theirs rounded to bfloat16 (`fastllm.ops.quant_format`): each is within 2^-9 of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .coded import CodedWeight, check_finite

BLOCK = 64
STATE = "quant_state.bitsandbytes__nf4"
OTHER_STATE = "quant_state.bitsandbytes__fp4"
MAX_STATE_BYTES = 4096
# The NormalFloat-4 values of Dettmers et al., "QLoRA", 2023, as float32
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def read_state(tensor: Tensor) -> dict[str, Any]:
    """The JSON of a `quant_state` tensor, checked.

    Raises:
        ValueError: if it is none, or describes another type, block size or number of dimensions.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > MAX_STATE_BYTES:
        raise ValueError(f"{STATE} is {tensor.dtype} {list(tensor.shape)}, not bytes of JSON")
    try:
        state = json.loads(bytes(tensor.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{STATE} is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is not a JSON object")
    if state.get("quant_type") != "nf4":
        raise ValueError(f"quant_type is {state.get('quant_type')!r:.40}; 'nf4' is supported")
    if state.get("blocksize") != BLOCK:
        raise ValueError(
            f"blocksize is {state.get('blocksize')!r:.40}; {BLOCK} is supported: quantize the "
            "unquantized checkpoint to nf4 here, or with blocks of 64 there"
        )
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(v, int) and 0 < v < 1 << 31 for v in shape)
    ):
        raise ValueError(f"shape is {shape!r:.40}; two sizes are expected")
    if shape[1] % BLOCK:
        raise ValueError(
            f"rows of {shape[1]} columns are not whole blocks of {BLOCK}; dequantize the "
            "checkpoint with bitsandbytes and quantize it here to int4"
        )
    return state


def from_files(tensors: Mapping[str, Tensor]) -> CodedWeight:
    """The tensors of a module as codes of format nf4.

    Args:
        tensors: by the names above without `weight.`; "weight" itself.

    Raises:
        ValueError: on a missing tensor, shapes that do not fit, another table than NormalFloat-4,
            scales that are not finite.
    """
    if OTHER_STATE in tensors:
        raise ValueError("fp4 has no format here; quantize the unquantized checkpoint to nf4")
    state = read_state(_get(tensors, STATE))
    n, k = state["shape"]
    packed = _get(tensors, "weight").reshape(-1).view(torch.uint8)
    if packed.numel() * 2 != n * k:
        raise ValueError(f"weight holds {2 * packed.numel()} codes for a shape of {[n, k]}")
    table = _get(tensors, "quant_map").float().flatten()
    if table.numel() != 16 or not torch.allclose(table, torch.tensor(TABLE), rtol=0, atol=1e-6):
        raise ValueError("quant_map is not the table of NormalFloat-4")
    codes = torch.stack((packed >> 4, packed & 15), 1).reshape(n, k)
    return CodedWeight("nf4", codes, _scales(tensors, state, n * k // BLOCK).view(n, k // BLOCK))


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _scales(tensors: Mapping[str, Tensor], state: dict[str, Any], count: int) -> Tensor:
    scales = _get(tensors, "absmax").flatten()
    if scales.numel() != count:
        raise ValueError(f"absmax holds {scales.numel()} scales for {count} blocks")
    if scales.dtype != torch.uint8:
        check_finite(scales)
        return scales.float()
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(block, int) or block < 1 or not isinstance(offset, int | float):
        raise ValueError(f"nested_blocksize {block!r:.40} or nested_offset {offset!r:.40} is none")
    block = min(block, max(count, 1))  # no larger than it need be: it is a file's number
    outer = _get(tensors, "nested_absmax").float().flatten()
    table = _get(tensors, "nested_quant_map").float().flatten()
    if outer.numel() != -(-count // block) or table.numel() != 256:
        raise ValueError(
            f"nested_absmax has {outer.numel()} and nested_quant_map {table.numel()} values for "
            f"{count} scales in blocks of {block}"
        )
    scales = table[scales.long()] * outer.repeat_interleave(block)[:count]
    scales += torch.tensor(float(offset))
    check_finite(scales)
    return scales


def to_files(weight: CodedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The inverse of `from_files`, for nf4; scales are stored as float32.

    Args:
        dtype: what the library dequantizes to.

    Raises:
        ValueError: for another format.
    """
    if weight.format != "nf4":
        raise ValueError(f"bitsandbytes files do not hold {weight.format}: they hold nf4")
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [weight.n, weight.k],
    }
    pairs = weight.codes.reshape(-1, 2)
    return {
        "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
        "weight.absmax": weight.scales.flatten().contiguous(),
        "weight.quant_map": torch.tensor(TABLE),
        f"weight.{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def config(not_converted: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": list(not_converted),
    }

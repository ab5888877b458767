"""Tiles of the mixture-of-experts kernels, and the arithmetic behind them. Not yet run on a GPU.

Roofs of an H100 (990 TFLOP/s of bf16 wgmma, 3.35 TB/s: 295 FLOP a byte), T tokens, k of E experts,
hidden H, width I. Forward 6 T k H I FLOP; backward 12: dA' 2, dx 4, dW 6.
- T = 32,768, H = 4,096, I = 1,024, E = 64, k = 4: 3.3 TFLOP forward, 3.3 ms of tensor cores. Bytes:
  weights 1.6 GB, pre 0.5, a 0.3 twice, x 0.3, the fp32 outputs of slots (kept so that a token's
  sum has one order and one rounding) 2.1 written and read: 7.2 GB, 2.2 ms. Those of the products
  pass beside their arithmetic; the combine, 2.4 GB, has none: 0.7 ms. At most 3.3 / 4.0 = 820
  TFLOP/s; 400 leave 7.5 ms to the products, 440 TFLOP/s in them.
- T = 24,576, H = 1,536, I = 256, E = 128, k = 8: 0.46 TFLOP, 0.47 ms of tensor cores and 3.3 GB,
  1.0 ms: bandwidth is the bound, 470 TFLOP/s, and three quarters of it are outputs of slots.
- Decode, 1 to 64 tokens: the bytes of the active experts' weights. A tile of 16 rows does 16 FLOP a
  byte, so its padding is free.
L2 (5.5 TB/s) bounds large products: a step of n x m rows does 2 n m FLOP for 2 (n + m) bytes, 64 a
byte at 128 x 128 (350 TFLOP/s), 85 at 256 x 128 (470): the tile of sm_90, 128 registers of sums.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import tuning
from .tuning import ProductTile, tile_for

# Sorting slots. Few: all pairs, n^2 compares over n / 64 programs: 8,192 slots are 67 M, 3 us of
# 132 SMs at 128 lanes a clock. Many: pairs inside a block only, 512 compares a slot.
FEW_SLOTS = 8192
FEW_SLOTS_BLOCK = 64
FEW_SLOTS_OTHERS = 128
SLOTS_BLOCK = 512
SLOTS_OTHERS = 32
SLOTS_WARPS = 8  # 512 x 32 compares at once: 64 a thread

# One product a tile, and two (gate and up, each n rows of weight). Rows of a tile: those of the
# mean expert, so that few are padding. The step is 64 columns (128 bytes, one swizzled line) for
# any number of rows: a row's sums do not depend on it. Registers, by ptxas, of 256 x 128: 248 with
# weights by descriptors, 254 by pointers; of gate and up 128 x 128 each: 190, 240. On sm_80, whose
# mma.sync takes operands from registers as well, both spill: 128 x 128, and 128 x 64 each.
_PRODUCT_BF16 = {
    16: ProductTile(64, 16, 64, 4, 6),
    32: ProductTile(64, 32, 64, 4, 6),
    64: ProductTile(128, 64, 64, 8, 4),
    128: ProductTile(128, 128, 64, 8, 4),
}
_PRODUCT_BF16_90 = _PRODUCT_BF16 | {128: ProductTile(256, 128, 64, 8, 3)}
_GATE_UP_BF16 = {
    16: ProductTile(64, 16, 64, 4, 4),
    32: ProductTile(64, 32, 64, 4, 4),
    64: ProductTile(128, 64, 64, 8, 3),
}
_GATE_UP_BF16_90 = _GATE_UP_BF16 | {128: ProductTile(128, 128, 64, 8, 3)}
# fp32 runs on FMA units, whose operands pass through registers.
_PRODUCT_FP32 = {
    16: ProductTile(64, 16, 16, 4, 4),
    64: ProductTile(64, 64, 16, 4, 3),
}
_GATE_UP_FP32 = {
    16: ProductTile(32, 16, 16, 4, 4),
    64: ProductTile(32, 64, 16, 4, 3),
}
# The product with W2, whose epilogue reads pre and writes dpre and w * a: 128 rows in four parts,
# one after the other, take 166 registers; at once they spill 440 bytes.
_DOWN_GRAD_BF16 = {
    16: ProductTile(64, 16, 64, 4, 4),
    32: ProductTile(64, 32, 64, 4, 4),
    64: ProductTile(128, 64, 64, 8, 4),
    128: ProductTile(128, 128, 64, 8, 4),
}
# Products with packed weights have the tiles of `tuning.quant_tile`. Their input gradients: n
# columns of dx, m rows, k rows of the weight a step, which becomes an operand through registers.
# 64 rows: one wgmma; the epilogue's three further tiles take registers.
_QUANT_INPUT_GRAD = {64: ProductTile(128, 64, 32, 4, 3), 128: ProductTile(128, 128, 32, 8, 3)}
_QUANT_DOWN_GRAD = {64: ProductTile(64, 64, 32, 4, 3)}
_QUANT_INPUT_GRAD_FP32 = {64: ProductTile(64, 64, 16, 4, 2)}
_QUANT_DOWN_GRAD_FP32 = {64: ProductTile(32, 64, 16, 4, 2)}
# Gradients of weights: n x k of the weight, m rows of tokens a step; 172 registers on sm_90.
_WEIGHT_GRAD_BF16 = ProductTile(128, 64, 128, 8, 4)
_WEIGHT_GRAD_BF16_90 = ProductTile(256, 64, 128, 8, 3)
_WEIGHT_GRAD_FP32 = ProductTile(64, 16, 64, 4, 3)
BIAS_GRAD_ROWS = 16
BIAS_GRAD_BLOCK = 128
COMBINE_BLOCK = 1024
ROUTER_GRAD_BLOCK = 1024


def mean_rows(n_rows: int, n_experts: int) -> int:
    """Rows of the mean expert: it chooses tiles, so that no count is read back from the device."""
    return -(-n_rows // max(1, n_experts))


def _fitting(tile: ProductTile, device: torch.device) -> ProductTile:
    """The tile with as many stages as 99 KB of shared memory hold, where there is no more."""
    if tuning.architecture(device) == 89 and tile.num_stages > 2:
        return replace(tile, num_stages=2)
    return tile


def product_tile(rows: int, dtype: torch.dtype, device: torch.device) -> ProductTile:
    """Tile of one product of experts of `rows` rows."""
    if dtype == torch.float32:
        return tile_for(_PRODUCT_FP32, rows)
    wide = tuning.architecture(device) == 90
    return _fitting(tile_for(_PRODUCT_BF16_90 if wide else _PRODUCT_BF16, rows), device)


def gate_up_tile(rows: int, dtype: torch.dtype, device: torch.device) -> ProductTile:
    """Tile of the first product: n rows of gate and n of up. Its m is that of `product_tile`."""
    if dtype == torch.float32:
        return tile_for(_GATE_UP_FP32, rows)
    wide = tuning.architecture(device) == 90
    return _fitting(tile_for(_GATE_UP_BF16_90 if wide else _GATE_UP_BF16, rows), device)


def down_grad_tile(rows: int, dtype: torch.dtype, device: torch.device) -> ProductTile:
    """Tile of the product of dy with the second weight."""
    table = _GATE_UP_FP32 if dtype == torch.float32 else _DOWN_GRAD_BF16
    return _fitting(tile_for(table, rows), device)


def weight_grad_tile(dtype: torch.dtype, device: torch.device) -> ProductTile:
    """Tile of a gradient of weights: n rows and k columns of the weight, m tokens a step."""
    if dtype == torch.float32:
        return _WEIGHT_GRAD_FP32
    wide = tuning.architecture(device) == 90
    return _fitting(_WEIGHT_GRAD_BF16_90 if wide else _WEIGHT_GRAD_BF16, device)


def use_descriptors(weight: torch.Tensor) -> bool:
    """Whether weight tiles are fetched by Hopper's copy engine: it needs rows of 16 bytes."""
    item = weight.element_size()
    aligned = all(stride * item % 16 == 0 for stride in weight.stride()[:-1])
    fits = weight.numel() > 0 and weight.data_ptr() % 16 == 0 and weight.stride(-1) == 1
    return (
        tuning.architecture(weight.device) == 90
        and weight.dtype == torch.bfloat16
        and aligned
        and fits
    )


def quant_input_grad_tile(
    rows: int, dtype: torch.dtype, device: torch.device, *, epilogue: bool
) -> ProductTile:
    """Tile of an input gradient of packed weights: n columns, m rows, k of the weight's rows."""
    if dtype == torch.float32:
        table = _QUANT_DOWN_GRAD_FP32 if epilogue else _QUANT_INPUT_GRAD_FP32
    else:
        table = _QUANT_DOWN_GRAD if epilogue else _QUANT_INPUT_GRAD
    return _fitting(tile_for(table, rows), device)

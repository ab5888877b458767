"""The rate that MFU is measured against: what the device's matrix unit does at most, in FLOP/s.

GPUs that are known by name have their maker's dense bfloat16 peak; others, and CPUs, are measured:
the best of a few products of two 1024 x 1024 matrices in the dtype of the model.
"""

from __future__ import annotations

import functools
import time

import torch

# Dense bfloat16 tensor-core rates of the makers' data sheets, without sparsity.
_NOMINAL = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_SIZE = 1024
_RUNS = 8


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of `device` for products in `dtype`."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, rate in _NOMINAL.items():
            if known in name:
                return rate
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a few products; some tens of milliseconds on a small CPU."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_RUNS):
        began = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    assert product.shape == (_SIZE, _SIZE), "the product has been made"
    return float(2 * _SIZE**3 / best)

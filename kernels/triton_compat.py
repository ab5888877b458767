"""What differs between Triton 3.6 and 3.8, or between the compiler and the interpreter.

The kernels use only names whose meaning is the same in all three versions; what needs care is
wrapped here once, so that no other file asks for a version or a mode.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# `TRITON_INTERPRET=1` must be set before triton is imported: triton's own library functions are
# wrapped at import as well.
INTERPRET = bool(knobs.runtime.interpret)
UPCAST_DOT = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in acc's dtype (fp32, or int32 for int8 operands).

    The interpreter keeps bf16 as its 16-bit pattern and multiplies the patterns (errors near
    1e11), so there operands are widened first. fp32 operands are multiplied in fp32, never TF32.
    """
    if UPCAST_DOT and a.dtype.is_floating():
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once: written out where two kernels must give the same bits."""
    return tl.math.fma(a, b, c)


@triton.jit
def exp2(x):
    """2 ** x as the hardware does it (`ex2.approx`, 2 ulp); 2 ** -inf is 0 and 2 ** 0 is 1."""
    return tl.math.exp2(x)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x) (`rsqrt.approx`, 2 ulp)."""
    return tl.math.rsqrt(x)


@triton.jit
def divide(a, b):
    """a / b of fp32, correctly rounded; `/` is the 2-ulp `div.full`."""
    return tl.math.div_rn(a, b)


@triton.jit
def round_even(x):
    """x rounded to the nearest integer, ties to even, for |x| < 2^22.

    Adding 1.5 * 2^23 leaves no fraction bits. The caller's launch sets `enable_fp_fusion=False`:
    fused with the product that makes x, the sum would skip the rounding of x.
    """
    return (x + 12582912.0) - 12582912.0

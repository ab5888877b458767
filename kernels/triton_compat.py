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
EMULATE = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in acc's dtype (fp32, or int32 for int8 operands).

    fp32 operands are multiplied in fp32, never TF32. The interpreter multiplies the bit patterns
    of bf16 operands (errors near 1e11), and its BLAS sums a row in an order that depends on the
    row's place in the tile; there floats are multiplied in fp64 and rounded once.
    """
    if EMULATE and a.dtype.is_floating():
        a64, b64 = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return tl.dot(a64, b64, acc.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x (fp32, or small integers) in `dtype`, rounded to nearest even.

    The interpreter truncates to bf16 and stores integers as bf16's bit pattern; there the
    fraction bits that bf16 lacks are rounded away first.
    """
    if EMULATE and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


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


@triton.jit
def recomputed(x):
    """x (int32), of which the compiler knows nothing: what follows from it is computed here.

    Addresses of an epilogue are otherwise the prologue's, kept in registers across the loops.
    """
    if EMULATE:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def forgotten(x):
    """x (bf16 or fp32), of which the compiler forgets how it was made.

    It otherwise keeps the fp32 values that bf16 was rounded from, in twice the registers.
    """
    if EMULATE or x.dtype != tl.bfloat16:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def tanh(x):
    """tanh of fp32 within 2 ulp (`tanh.approx` is good to 2^-11 alone).

    Near 0, where 1 - 2 / (1 + e^2x) cancels, x + x^3 P(x^2), P fitted to tanh up to 0.6.
    """
    z = x * x
    p = ((-0.00589515868 * z + 0.0207959722) * z - 0.0537838305) * z + 0.133319241
    near = x + x * z * (p * z - 0.33333298)
    far = 1.0 - 2.0 / (exp2(tl.abs(x) * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))

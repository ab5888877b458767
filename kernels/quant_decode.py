"""Codes of packed weights as operands of matrix instructions, four bytes of them at a time.

A 4-bit weight at full bandwidth brings an SM of an H100 30 codes a clock (3.35 TB/s / 132 / 1.7
GHz), and a large tile needs as many, against 128 instructions a clock: a code may cost 4 of them.
Converted one by one, as the compiler would, they cost 6 to 15. PTX here takes, a code: nibbles to
bf16 1.4, to int8 0.9; nf4 to bf16 3.3, to int8 2; e4m3 to bf16 4. The interpreter, which knows no
PTX, computes the same values by definition; a test runs the PTX of every byte in plain Python.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from .triton_compat import EMULATE, cast

# NormalFloat-4 (Dettmers et al., "QLoRA", 2023), rounded to bfloat16
NF4_TABLE = (
    -1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125, -0.0908203125, 0.0,
    0.07958984375, 0.1611328125, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0,
)  # fmt: skip
NF4_INT8 = tuple(round(127 * value) for value in NF4_TABLE)  # codes of mode "int8"


def _bf16(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def _twice(value: float) -> str:
    """Two bf16 in a register."""
    return f"0x{_bf16(value):04X}{_bf16(value):04X}"


def _split() -> list[str]:
    """Nibbles of 4 bytes: low ones in lo, high ones in hi, a byte each."""
    return [
        "and.b32 lo, q, 0x0F0F0F0F;",
        "shr.u32 hi, q, 4;",
        "and.b32 hi, hi, 0x0F0F0F0F;",
    ]


def _offset_bf16(source: str, outputs: tuple[str, str], offset: int) -> list[str]:
    """Bytes below 128 minus offset: 0x43uu is 128 + u, from which 128 + offset is taken."""
    lines = [f"mov.b32 u, {_twice(1.0)};", f"mov.b32 w, {_twice(-128.0 - offset)};"]
    for output, order in zip(outputs, ("0x4140", "0x4342"), strict=True):
        lines += [
            f"prmt.b32 t, {source}, 0x43434343, {order};",
            f"fma.rn.bf16x2 {output}, t, u, w;",
        ]
    return lines


def _offset_int8(source: str, output: str, offset: int) -> list[str]:
    """Bytes below 120 minus offset (at most 120), a byte each: nothing is borrowed."""
    shift = (128 - offset) * 0x01010101
    return [f"add.u32 t, {source}, 0x{shift:08X};", f"xor.b32 {output}, t, 0x80808080;"]


def _table(source: str, table: bytes, output: str) -> list[str]:
    """Bytes of a table of 16 at the indices in register i, whose high bits are in register c."""
    words = [f"0x{int.from_bytes(table[j : j + 4], 'little'):08X}" for j in range(0, 16, 4)]
    return [
        f"mov.b32 w, {words[0]};",
        f"prmt.b32 t, w, {words[1]}, i;",
        f"mov.b32 w, {words[2]};",
        f"prmt.b32 u, w, {words[3]}, i;",
        f"prmt.b32 {output}, t, u, c;",
    ]


def _indices(source: str) -> list[str]:
    """Four bytes below 16 as selectors of prmt: i within 8 entries, c which 8."""
    return [
        f"shr.u32 t, {source}, 4;",
        f"or.b32 t, t, {source};",
        "prmt.b32 t, t, 0, 0x4420;",
        "and.b32 i, t, 0x7777;",
        "and.b32 c, t, 0x8888;",
        "shr.u32 c, c, 1;",
        "or.b32 c, c, 0x3210;",
    ]


def _nf4_bf16(source: str, outputs: tuple[str, str]) -> list[str]:
    bits = [_bf16(value) for value in NF4_TABLE]
    low, high = bytes(b & 255 for b in bits), bytes(b >> 8 for b in bits)
    return [
        *_indices(source),
        *_table(source, low, "a"),
        *_table(source, high, "b"),
        f"prmt.b32 {outputs[0]}, a, b, 0x5140;",
        f"prmt.b32 {outputs[1]}, a, b, 0x7362;",
    ]


def _nf4_int8(source: str, output: str) -> list[str]:
    table = bytes(value & 255 for value in NF4_INT8)
    return [*_indices(source), *_table(source, table, output)]


def _e4m3_bf16() -> list[str]:
    """Sign, exponent and fraction where bf16 has them, times 2^120 (subnormals too); NaN stays."""
    lines = ["and.b32 b, q, 0x7F7F7F7F;", "add.u32 b, b, 0x01010101;"]  # bit 7: NaN
    lines += [f"mov.b32 i, {_twice(2.0**120)};", f"mov.b32 w, {_twice(-0.0)};"]
    halves = (("$0", "0x1404", "0x9988"), ("$1", "0x3424", "0xBBAA"))
    for output, spread, sign in halves:
        lines += [
            f"prmt.b32 t, q, 0, {spread};",
            "shr.u32 u, t, 4;",
            "and.b32 u, u, 0x07F007F0;",
            "and.b32 t, t, 0x80008000;",
            "or.b32 t, t, u;",
            "fma.rn.bf16x2 t, t, i, w;",
            f"prmt.b32 u, b, 0, {sign};",
            f"or.b32 {output}, t, u;",
        ]
    return lines


def _program(lines: list[str], source: str) -> str:
    body = ["mov.b32 q, " + source + ";", *lines]
    return "{ .reg .b32 q, lo, hi, t, u, w, i, c, a, b;\n" + "\n".join(body) + "\n}"


def _programs() -> dict[str, str]:
    split = _split()
    programs = {
        "nf4 pairs bf16": _program(
            split + _nf4_bf16("lo", ("$0", "$1")) + _nf4_bf16("hi", ("$2", "$3")), "$4"
        ),
        "nf4 pairs int8": _program(split + _nf4_int8("lo", "$0") + _nf4_int8("hi", "$1"), "$2"),
        "nf4 bytes bf16": _program(_nf4_bf16("q", ("$0", "$1")), "$2"),
        "e4m3 bytes bf16": _program(_e4m3_bf16(), "$2"),
    }
    for offset in (0, 8, 16, 32):
        bf16 = _offset_bf16("lo", ("$0", "$1"), offset) + _offset_bf16("hi", ("$2", "$3"), offset)
        int8 = _offset_int8("lo", "$0", offset) + _offset_int8("hi", "$1", offset)
        programs |= {
            f"{offset} pairs bf16": _program(split + bf16, "$4"),
            f"{offset} pairs int8": _program(split + int8, "$2"),
            f"{offset} bytes bf16": _program(_offset_bf16("q", ("$0", "$1"), offset), "$2"),
        }
    return programs


PROGRAMS = _programs()  # name: codes, "pairs" of nibbles or "bytes" of a code each, result


@triton.constexpr_function
def ptx(codes, name):
    """PTX of a decoder: 4 bytes in, 4 or 8 values out."""
    return PROGRAMS[f"{codes} {name}"]


@triton.jit
def nf4_emulated(u, INT8: tl.constexpr):
    """Entries of the table by comparing, for the interpreter: fp32."""
    value = tl.zeros(u.shape, dtype=tl.float32)
    for i in tl.static_range(16):
        entry: tl.constexpr = nf4_entry(i, INT8)
        value = tl.where(u == i, entry, value)
    return value


@triton.constexpr_function
def nf4_entry(i, int8):
    """One entry of the table."""
    return float(NF4_INT8[i]) if int8 else NF4_TABLE[i]


@triton.jit
def decode_pairs(pairs, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """(low, high nibbles) of uint8 minus OFFSET, as int8, bf16 or fp32."""
    if EMULATE or dtype == tl.float32:
        low, high = (pairs & 0xF).to(tl.int8), (pairs >> 4).to(tl.int8)
        return cast(low - OFFSET, dtype), cast(high - OFFSET, dtype)
    elif dtype == tl.int8:
        return tl.inline_asm_elementwise(
            ptx(OFFSET, "pairs int8"), "=r,=r,r", [pairs],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            ptx(OFFSET, "pairs bf16"), "=r,=r,=r,=r,r", [pairs],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def decode_bytes(u, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Codes (uint8 below 120) minus OFFSET, as int8, bf16 or fp32."""
    if EMULATE or dtype != tl.bfloat16:
        return cast(u.to(tl.int8) - OFFSET, dtype)
    else:
        return tl.inline_asm_elementwise(
            ptx(OFFSET, "bytes bf16"), "=r,=r,r", [u], dtype=tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def decode_nf4_pairs(pairs, dtype: tl.constexpr):
    """(low, high nibbles) of uint8 as entries of the table: int8 (times 127), bf16 or fp32."""
    if EMULATE:
        INT8: tl.constexpr = dtype == tl.int8
        low, high = nf4_emulated(pairs & 0xF, INT8), nf4_emulated(pairs >> 4, INT8)
        return cast(low, dtype), cast(high, dtype)
    elif dtype == tl.int8:
        return tl.inline_asm_elementwise(
            ptx("nf4", "pairs int8"), "=r,=r,r", [pairs],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            ptx("nf4", "pairs bf16"), "=r,=r,=r,=r,r", [pairs],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
        return low.to(dtype), high.to(dtype)


@triton.jit
def decode_nf4(u):
    """Entries of the table at uint8 below 16: fp32."""
    if EMULATE:
        return nf4_emulated(u, False)
    else:
        return tl.inline_asm_elementwise(
            ptx("nf4", "bytes bf16"), "=r,=r,r", [u], dtype=tl.bfloat16, is_pure=True, pack=4
        ).to(tl.float32)


@triton.jit
def decode_e4m3(u, dtype: tl.constexpr):
    """e4m3 (uint8) as bf16 or fp32, exactly; 0x7F and 0xFF are NaN."""
    if EMULATE:
        wide = u.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        return cast(tl.where((wide & 0x7F) == 0x7F, float("nan"), value), dtype)
    else:
        return tl.inline_asm_elementwise(
            ptx("e4m3", "bytes bf16"), "=r,=r,r", [u], dtype=tl.bfloat16, is_pure=True, pack=4
        ).to(dtype)

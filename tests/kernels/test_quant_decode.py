"""The decoders of packed codes: their PTX, run here in plain Python, and the table of formats."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from fastllm.kernels import quant_decode, quant_format
from fastllm.ops.quant_format import NF4_INT8, NF4_TABLE, QUANT_FORMATS

WORD = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """Four of the eight bytes of b:a, each by a nibble; bit 3 spreads the byte's sign instead."""
    source, result = a | b << 32, 0
    for i in range(4):
        choice = selector >> (4 * i) & 15
        byte = source >> (8 * (choice & 7)) & 255
        if choice & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def from_bf16(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def to_bf16(value: float) -> int:
    """Bits of a value that bf16 holds exactly: a decoder may not round."""
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    assert bits & 0xFFFF == 0, f"{value} is no bf16 value"
    return bits >> 16


def fma_bf16x2(a: int, b: int, c: int) -> int:
    parts = [[from_bf16(v >> shift & 0xFFFF) for v in (a, b, c)] for shift in (0, 16)]
    low, high = (to_bf16(x * y + z) for x, y, z in parts)
    return low | high << 16


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b & WORD,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": fma_bf16x2,
}


def run(program: str, word: int) -> list[int]:
    """The output registers of a program, in order; its one input comes after them."""
    n_outputs = max(int(n) for n in re.findall(r"\$(\d+)", program))
    registers: dict[str, int] = {f"${n_outputs}": word}
    lines = program.strip("{}").split("\n")
    assert lines[0].strip().startswith(".reg .b32 ")
    declared = set(re.findall(r"\w+", lines[0].split("b32", 1)[1]))
    for line in filter(None, (line.strip() for line in lines[1:])):
        name, rest = line.rstrip(";").split(" ", 1)
        target, *sources = (part.strip() for part in rest.split(","))
        assert target in declared or target.startswith("$"), line
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(n_outputs)]


def bytes_of(words: list[int]) -> list[int]:
    return [word >> shift & 255 for word in words for shift in (0, 8, 16, 24)]


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def values_of(words: list[int], dtype: str) -> list[float]:
    if dtype == "int8":
        return [float(signed(byte)) for byte in bytes_of(words)]
    return [from_bf16(word >> shift & 0xFFFF) for word in words for shift in (0, 16)]


def expected(codes: str, byte: int, dtype: str) -> float:
    if codes == "nf4":
        return float((NF4_INT8 if dtype == "int8" else NF4_TABLE)[byte])
    if codes == "e4m3":
        return torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
    return float(byte - int(codes))


def most(codes: str) -> int:
    """Bytes that a decoder of a byte a code may meet."""
    return {"nf4": 16, "e4m3": 256}.get(codes, 64)


@pytest.mark.parametrize("name", quant_decode.PROGRAMS)
def test_ptx_decodes_every_byte(name: str) -> None:
    codes, layout, dtype = name.split()
    program = quant_decode.PROGRAMS[name]
    limit = 256 if layout == "pairs" else most(codes)
    for byte in range(limit):  # at every place of a word, beside other bytes
        four = [byte, (byte + 77) % limit, (byte + 131) % limit, limit - 1 - byte]
        found = values_of(run(program, int.from_bytes(bytes(four), "little")), dtype)
        wanted = four if layout == "bytes" else [b & 15 for b in four] + [b >> 4 for b in four]
        for value, code in zip(found, wanted, strict=True):
            right = expected(codes, code, dtype)
            assert value == right or (value != value and right != right), (name, code, value)


def test_formats_are_those_of_the_ops() -> None:
    quantized = {name: f for name, f in QUANT_FORMATS.items() if not f.dense}
    assert set(quant_format.FORMATS) == set(quantized)
    assert quant_decode.NF4_TABLE == NF4_TABLE and quant_decode.NF4_INT8 == NF4_INT8
    for name, there in quantized.items():
        here = quant_format.FORMATS[name]
        assert (here.bits, here.group, here.codes, here.scales, here.offset) == (
            there.bits, there.group, there.codes, there.scales, there.offset,
        )  # fmt: skip
        assert set(quant_format.modes(name)) == set(there.modes)


def test_formats_of_equal_layout_share_kernels() -> None:
    assert quant_format.kernel_format("int4_g32") == "q4_0"
    shared = {name: quant_format.kernel_format(name) for name in quant_format.FORMATS}
    assert {a for a, b in shared.items() if a != b} == {"int4_g32"}

"""How the CPU's `quant_matmul` goes about a product, and the measurements that chose it.

One path per (mode, number of rows); every path takes the same steps in the same order, so the
choice never shows in the bits. `fastllm doctor` prints the table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

MEASURED = "2026-11-22, one core of a Zen 5, AVX-512 BF16, N = K = 2048, weights out of memory"


@dataclass(frozen=True, slots=True)
class Path:
    """What serves a range of rows in some modes.

    rows: at AVX-512; below it the last row of the first range is 4 (AVX2) or 2.
    measured: of that path, and of the one it was chosen over.
    """

    modes: str
    rows: str
    path: str
    measured: str


PATHS = (
    Path(
        "int8",
        "1-8",
        "codes decoded in registers, one panel of 16 outputs at a time",
        "q4_0, 1 row: 34 GB/s of 41 (unpacked strips of 4 panels: 21); 8 rows: 22 GB/s",
    ),
    Path(
        "bf16, fp8",
        "1-8",
        "the same, with two or four chunks side by side where a scale serves 64 columns or more",
        "int4_g128, 1 row: 34 GB/s of 41 (one chunk at a time: 21)",
    ),
    Path(
        "fp32",
        "1-8",
        "strips of 4 panels, unpacked 128 columns at a time",
        "no bar: decoded weights are 8 times the size of 4-bit codes",
    ),
    Path(
        "int8",
        "9 and more",
        "strips of 2 panels, unpacked 256 columns at a time for all rows, tiles of 6 rows",
        "512 rows: 1.37 to 1.50 times torch bf16 (tiles of 12 rows: 1.21 to 1.31)",
    ),
    Path(
        "bf16, fp8, fp32",
        "9 and more",
        "the same with codes as pairs of bf16, or as floats, and tiles of 12 rows",
        "512 rows: 361 to 437 Gflop/s, 0.81 (q6_k) to 0.99 (int4_g128) times torch bf16",
    ),
)


def quant_paths() -> list[dict[str, str]]:
    """The table as plain data, in the order of its rows."""
    return [asdict(path) for path in PATHS]

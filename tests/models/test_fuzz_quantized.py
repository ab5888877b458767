"""Damaged and hostile directories of quantized weights: success or ModelFileError, in bounds."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.quantize import (
    awq_files,
    bitsandbytes_files,
    compressed_tensors,
    fastllm_files,
    gptq_files,
)
from fastllm.quantize.coded import CodedWeight

CASES, FULL = 50, 10_000


def _fuzzer() -> ModuleType:
    """`test_fuzz_files`, whose limits and damages these are (test folders are not packages)."""
    path = Path(__file__).with_name("test_fuzz_files.py")
    spec = importlib.util.spec_from_file_location("fuzz_files", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_files"] = module
    spec.loader.exec_module(module)
    return module


fuzz_files = _fuzzer()


def _int4(n: int, k: int, *, asymmetric: bool) -> CodedWeight:
    codes = torch.arange(n * k).view(n, k).remainder(16).to(torch.uint8)
    scales = torch.full((n, k // 32), 0.01, dtype=torch.float16)
    if not asymmetric:
        return CodedWeight("int4_g32", codes, scales)
    return CodedWeight("int4_asym_g32", codes, scales, torch.full((n, k // 32), 7).byte())


def gptq(n: int, k: int) -> Mapping[str, Tensor]:
    return gptq_files.to_files(_int4(n, k, asymmetric=False))


def awq(n: int, k: int) -> Mapping[str, Tensor]:
    return awq_files.to_files(_int4(n, k, asymmetric=True))


def packed(n: int, k: int) -> Mapping[str, Tensor]:
    return compressed_tensors.to_files(_int4(n, k, asymmetric=True))


def fp8(n: int, k: int) -> Mapping[str, Tensor]:
    codes = torch.zeros(n, k, dtype=torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.ones(-(-n // 128), -(-k // 128))}


def own(n: int, k: int) -> Mapping[str, Tensor]:
    return fastllm_files.to_files(*_int4(n, k, asymmetric=True).canonical())


def nf4(n: int, k: int) -> Mapping[str, Tensor]:
    """With scales that are quantized too."""
    codes = torch.zeros(n, k, dtype=torch.uint8)
    plain = bitsandbytes_files.to_files(CodedWeight("nf4", codes, torch.ones(n, k // 64)))
    name = f"weight.{bitsandbytes_files.STATE}"
    state = json.loads(bytes(plain[name].tolist()))
    state |= {"nested_blocksize": 16, "nested_offset": 0.5, "nested_dtype": "float32"}
    return plain | {
        name: torch.tensor(list(json.dumps(state).encode())).to(torch.uint8),
        "weight.absmax": torch.zeros(n * k // 64, dtype=torch.uint8),
        "weight.nested_absmax": torch.ones(-(-n * k // 64 // 16)),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
    }


NAMES = [f"model.layers.{i}.{part}_proj" for i in range(2)
         for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                      "mlp.up", "mlp.down")]  # fmt: skip
LAYOUTS = {
    "gptq": (gptq, gptq_files.config(4, 32, True)),
    "awq": (awq, awq_files.config(32)),
    "packed": (packed, compressed_tensors.config({"x": "int4_asym_g32"})),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "nf4": (nf4, bitsandbytes_files.config()),
    "fastllm": (own, fastllm_files.config(dict.fromkeys(NAMES, "int4_asym_g32"))),
}


def write(kind: str, path: Path) -> None:
    """A small directory of that kind."""
    to_files, quantization = LAYOUTS[kind]
    config = fuzz_files.CONFIG | {"hidden_size": 64}
    tensors: dict[str, Tensor] = {}
    for name, shape in ModelConfig.from_hf(config).weight_shapes().items():
        module = name.removesuffix(".weight")
        if module in NAMES and name.endswith(".weight"):
            made = to_files(*shape)
            tensors |= {f"{module}.{part}": t.contiguous() for part, t in made.items()}
        else:
            tensors[name] = torch.ones(shape)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_damaged_quantized_directories(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns out of order, which damage can make
        counts = fuzz_files.fuzz_directory(tmp_path, 3 * CASES, partial(write, kind))
    # one damage in some forty harms nothing: of so many cases, one at least
    assert counts["refused"] > CASES // 4 and counts["accepted"] > 0, counts


@pytest.mark.full
@pytest.mark.parametrize("kind", LAYOUTS)
def test_ten_thousand_damaged_quantized_directories(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = fuzz_files.fuzz_directory(tmp_path, FULL, partial(write, kind))
    assert counts["refused"] > FULL // 4, counts


@pytest.mark.parametrize("kind", LAYOUTS)
def test_damaged_contents_of_quantized_tensors(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(kind, path)
    file = path / "model.safetensors"
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")

    def damage(rng: random.Random) -> None:
        data = bytearray(raw)
        for _ in range(rng.choice((1, 30, 300))):
            data[rng.randrange(header, len(raw))] = rng.choice((0, 1, 127, 128, 255))
        file.write_bytes(data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = fuzz_files.fuzz(path, CASES, damage)
    assert counts["accepted"] + counts["refused"] == CASES

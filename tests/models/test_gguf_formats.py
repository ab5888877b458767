"""GGUF files in every quantized format and in mixtures of them: loaded as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import decided_answer, greedy_llama_cpp, save_model, small_config
from torch import Tensor

from fastllm import LLM
from fastllm.cli.main import main
from fastllm.models.gguf import GGUFFile
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.loader import load_model
from fastllm.models.stored_tensor import StoredTensor
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import open_weights
from fastllm.ops.quant_format import fit
from fastllm.quantize.gguf_blocks import (
    DENSE_DTYPES,
    QUANTIZED_FORMATS,
    block_type,
    dequantize,
    quantize,
)

# As llama.cpp's Q4_K_M: some matrices in six bits, and one that no K-quant fits.
MIXED = {
    "token_embd": "q6_k", "attn_q": "q4_k", "attn_k": "q4_k", "attn_v": "q6_k",
    "attn_output": "q5_k", "ffn_gate": "q4_k", "ffn_up": "q5_1", "ffn_down": "q6_k",
    "output": "q5_0",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A GGUF file in F32 of a model whose rows are whole blocks of K-quants."""
    folder = tmp_path_factory.mktemp("formats")
    config = replace(
        small_config("llama", tokenizer.vocab_size), hidden_size=256, intermediate_size=512,
        head_dim=64, num_hidden_layers=1, sliding_window=(),
    )  # fmt: skip
    save_model(folder / "hf", config, tokenizer)
    path = folder / "f32.gguf"
    export_gguf(weights_of(open_weights(folder / "hf")), path, "f32", tokenizer)
    return path


def rewritten(source: Path, path: Path, kind_of: Callable[[str], str]) -> Path:
    """The file with its matrices in other formats; their values in F32 again in `values.gguf`."""
    file = GGUFFile.open(source)
    tensors, values = {}, {}
    for name, tensor in file.tensors.items():
        data = tensor.data.view(torch.float32).view(tensor.shape)
        values[name] = tensors[name] = StoredTensor("f32", tensor.shape, data)
        if len(tensor.shape) == 2:
            format = kind_of(name)
            rows = quantize(format, data.contiguous())
            tensors[name] = StoredTensor(format, tensor.shape, rows)
            values[name] = StoredTensor("f32", tensor.shape, dequantize(format, rows))
    metadata = dict(file.metadata) | {"general.quantization_version": 2}
    write_gguf(path, metadata, tensors)
    write_gguf(path.with_name("values.gguf"), metadata, values)
    return path


def uniform(format: str) -> Callable[[str], str]:
    return lambda name: format


def mixed(name: str) -> str:
    return MIXED[name.split(".")[-2]]


def logits(path: Path, activation: str) -> Tensor:
    llm = LLM(path, dtype="float32", activation=activation)
    return llm.logits([5, 9, 301, 77, 12, 40, 3])


@pytest.mark.parametrize("format", [*QUANTIZED_FORMATS, "mixed"])
def test_logits_are_those_of_the_files_values(format: str, plain: Path, tmp_path: Path) -> None:
    kind_of = mixed if format == "mixed" else uniform(format)
    path = rewritten(plain, tmp_path / "m.gguf", kind_of)
    want = logits(tmp_path / "values.gguf", "fp32")
    got = logits(path, "fp32")
    assert (got - want).norm() < 1e-5 * want.norm()
    rounded = logits(path, "int8")
    assert (rounded - want).norm() < 0.05 * want.norm()


def test_weights_stay_packed_in_their_own_formats(plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", mixed)
    model = load_model(path)
    found = {
        name: module.packed.format
        for name, module in model.model.layers[0].named_modules()
        if getattr(module, "packed", None) is not None
    }
    assert found == {
        "self_attn.q_proj": "q4_k", "self_attn.k_proj": "q4_k", "self_attn.v_proj": "q6_k",
        "self_attn.o_proj": "q5_k", "mlp.gate_proj": "q4_k", "mlp.up_proj": "q5_1",
        "mlp.down_proj": "q6_k",
    }  # fmt: skip
    table, head = model.model.embed_tokens.packed, model.lm_head.packed
    assert table is not None and head is not None
    assert table.format == "q6_k" and head.format == "q5_0"
    expected = sum(t.nbytes for t in GGUFFile.open(path).tensors.values())
    assert model.nbytes < 1.05 * expected, "nothing is held twice, or in a wider format"
    same = load_model(rewritten(plain, tmp_path / "u.gguf", uniform("q5_k")))
    groups = [group.packed for _, group in same.parallel_linears()]
    assert {g.format for g in groups if g is not None} == {"q5_k"} and None not in groups


@pytest.mark.parametrize(
    "format",
    ["mixed", *(pytest.param(f, marks=pytest.mark.full) for f in QUANTIZED_FORMATS if f != "q8_0")],
)
def test_llama_cpp_gives_the_same_greedy_tokens(
    format: str, plain: Path, llama_cpp: Any, tmp_path: Path
) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", mixed if format == "mixed" else uniform(format))
    prompt, answer = decided_answer(path, 12)
    assert greedy_llama_cpp(llama_cpp, path, prompt, 12) == answer


def test_inspect_tells_formats_and_bits(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", mixed)
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for format in ("q4_k", "q5_k", "q6_k", "q5_0", "q5_1"):
        (line,) = [
            words for words in map(str.split, text.splitlines())
            if words[:1] == [format] and len(words) > 4
        ]  # fmt: skip
        kind = block_type(format)
        assert float(line[-1]) == pytest.approx(8 * kind.nbytes / kind.values, abs=0.005)


def test_formats_of_rows_that_do_not_fit_are_named_before_a_file_is_written() -> None:
    assert [fit(format, 576) for format in ("q4_k", "q5_k", "q6_k")] == ["q5_0", "q5_1", "q8_0"]
    with pytest.raises(ValueError, match="q6_k needs rows of a multiple of 256, got 576"):
        quantize("q6_k", torch.zeros(1, 576))
    assert set(DENSE_DTYPES).isdisjoint(QUANTIZED_FORMATS)

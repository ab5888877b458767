"""`inspect`, `models`, `generate`, `chat` and `demo` on model files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastllm.cli.main import main
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.stored_tensor import StoredTensor


def _tensor(format: str, rows: int, bytes_per_row: int, columns: int) -> StoredTensor:
    data = torch.zeros(rows, bytes_per_row, dtype=torch.uint8)
    return StoredTensor(format, (rows, columns), data)


def test_inspect_shows_a_file_that_cannot_be_run_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.gguf"
    tensors = {f"blk.{i}.in.weight": _tensor("q4_0", 4, 36, 64) for i in range(3)}
    write_gguf(path, {"general.architecture": "mamba", "list": list(range(50))}, tensors)
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "50 values: 0, 1, 2, 3, ..." in text
    (line,) = [line for line in text.splitlines() if line.startswith("blk.*.in.weight")]
    assert line.split()[1:] == ["4", "x", "64", "q4_0", "3", "432", "B"]
    assert "4.50" in text  # bits per value of q4_0
    assert "cannot run this model" in text and "mamba" in text
    assert main(["inspect", str(path), "--tensors"]) == 0
    assert "blk.2.in.weight" in capsys.readouterr().out


def test_inspect_reads_a_directory_with_its_cache_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "model.norm.weight" in text and "f32" in text
    # 2 (K and V) x 2 layers x 2 heads x 16 dims x 2 bytes
    assert "256 B in bfloat16" in text


def test_models_lists_the_packaged_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "smollm2" in capsys.readouterr().out


def test_generate_streams_one_prompt_and_batches_several(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--max-tokens", "4", "--max-model-len", "128"]
    assert main(["generate", "smollm2", "One, two, three,", *options]) == 0
    streamed = capsys.readouterr()
    assert streamed.out.startswith(" four, five") and "4 tokens" in streamed.err
    prompts = ["One, two, three,", "Once upon a time"]
    assert main(["generate", "smollm2", *prompts, *options, "--json", "--logprobs", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["prompt"] == prompts[0] and second["prompt"] == prompts[1]
    (answer,) = first["answers"]
    assert answer["text"] == streamed.out[:-1]
    assert len(answer["logprobs"]) == len(answer["token_ids"]) == 4


def test_chat_reads_lines_until_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\n/reset\nSay hello.\n"))
    options = ["--max-tokens", "4", "--temperature", "0", "--max-model-len", "256"]
    assert main(["chat", "smollm2", *options]) == 0
    first, again = capsys.readouterr().out.splitlines()
    assert first and first == again


def test_demo_answers_three_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--parts", "answers", "--max-tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n> ") == 3 and "Self-test" in text

"""`fastllm verify`: exit statuses for scripts, JSON, files of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastllm.cli import main as cli
from fastllm.integrations.transformers import attention, registry
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.weights import open_weights

QUICK = ["--tokens", "2", "--shape", "2x8", "--no-speed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a Hugging Face directory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_an_equal_model_gives_0_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(folder), *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["path"] == str(folder) and found["dtype"] == "float32"
    assert found["replaced"]["attention"] == {"replaced": 2, "of": 2}
    assert {check["what"] for check in found["checks"]} >= {"logits", "gradients", "tokens"}


def test_a_wrong_kernel_gives_1_and_says_what_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention.attention_forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, weights = right(*args, **kwargs)
        return 1.1 * out, weights

    monkeypatch.setattr(attention, "attention_forward", wrong)
    try:
        assert cli.main(["verify", str(folder), *QUICK, "--ops", "attention"]) == 1
    finally:
        monkeypatch.undo()
        registry.register()
    assert "NOT equal: logits (random)" in capsys.readouterr().out


def test_ops_dtype_and_gradients_can_be_chosen(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ops", "attention,loss", "--dtype", "bfloat16", "--no-gradients", "--report"]
    assert cli.main(["verify", str(folder), *QUICK, *options]) == 0
    text = capsys.readouterr().out
    assert "bfloat16; replaced: " in text and "attention 2 of 2" in text and "norm" not in text
    assert "gradients" not in text and "model.layers.{0-1}.self_attn" in text


def test_a_gguf_file_is_compared_as_dense_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    export_gguf(weights_of(open_weights(folder), None), file, "bf16", None)
    assert cli.main(["verify", str(file), *QUICK]) == 0
    assert "LlamaForCausalLM, bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ops", "atention"], "--ops: atention unknown"),
        (["--tokens", "-1"], "--tokens"),
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--shape", "2by8"], "ROWSxLENGTH"),
    ],
)
def test_what_cannot_be_run_gives_2(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(folder), *options]) == 2
    assert said in capsys.readouterr().err

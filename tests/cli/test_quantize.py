"""`fastllm quantize`: what it says, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastllm.cli.main import main
from fastllm.models.config import ModelConfig
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize

TEXT = "The cat sat on the mat, and the dog barked at 1234 cats. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = train_tokenizer([TEXT], 300, allow_smaller=True, show_progress=False)
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    save_pretrained(initialize(config, dtype=torch.float32), folder, tokenizer)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_rule_the_rows_and_the_real_bits_are_shown(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--format", "int4", "--method", "gptq", "--calibration", str(text), "--out", str(out)]
    assert main(["quantize", str(model), *words, "--samples", "9", "--length", "32"]) == 0
    shown = capsys.readouterr()
    assert "self_attn.q_proj: int4_g128" in shown.out
    assert "int4_g128 does not fit the rows of mlp.down_proj (2 matrices): int4_g32" in shown.out
    assert "left as they are: model.embed_tokens, lm_head" in shown.out
    assert f"{out}: " in shown.out
    assert "bits per quantized weight    4.18" in shown.out
    assert "calibration: 9 rows of 32 tokens" in shown.err
    assert "layer 2/2: relative error" in shown.err
    assert (out / "tokenizer.json").exists()
    assert load_model(out).config.hidden_size == 128


def test_an_importance_matrix_is_kept_and_used_again(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["quantize", str(model), "--format", "q4_0", "--method", "imatrix"]
    kept = str(tmp_path / "imatrix.gguf")
    first = ["--calibration", str(text), "--length", "32", "--save-imatrix", kept]
    assert main([*base, *first, "--out", str(tmp_path / "a.gguf")]) == 0
    assert main([*base, "--imatrix", kept, "--out", str(tmp_path / "b.gguf")]) == 0
    a, b = (load_model(tmp_path / f"{name}.gguf") for name in "ab")
    found = [m.get_submodule("model.layers.1.mlp.down_proj").packed.data for m in (a, b)]
    assert torch.equal(*found)
    assert "the importance matrix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "int5"], "format 'int5' is not known; did you mean"),
        (["--format", "int4", "--method", "gptq"], "--method gptq needs --calibration FILE"),
        (["--format", "int4", "--save-imatrix", "x"], "--save-imatrix goes with --method imatrix"),
        (["--format", "q4_0", "--method", "imatrix", "--imatrix", "x", "--calibration", "y"],
         "--imatrix takes the place of --calibration"),
        (["--format", "int4", "--method", "awq", "--calibration", "EMPTY"],
         "the calibration text is empty"),
        (["--format", "int4", "--method", "awq", "--calibration", "MISSING"], "MISSING"),
        (["--format", "int4", "--method", "gptq", "--calibration", "TEXT", "--damping", "0"],
         "damping must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], message: str, model: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    places = {"EMPTY": str(empty), "TEXT": str(text), "MISSING": str(tmp_path / "MISSING")}
    out = tmp_path / "out"
    given = [places.get(word, word) for word in words]
    assert main(["quantize", str(model), *given, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))

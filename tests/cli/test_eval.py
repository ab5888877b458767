"""`fastllm eval perplexity`: one model, a table of its formats, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastllm import LLM
from fastllm.cli.eval_formats import markdown, wanted_rows
from fastllm.cli.main import main
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import open_weights


def _helpers() -> ModuleType:
    """The small models of tests/models (test folders are not packages)."""
    path = Path(__file__).parents[1] / "models" / "exported_models.py"
    spec = importlib.util.spec_from_file_location("eval_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["eval_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of two random layers and a byte-level BPE."""
    helpers = _helpers()
    tokenizer = helpers.small_tokenizer()
    config = helpers.small_config("llama", tokenizer.vocab_size)
    return helpers.save_model(tmp_path_factory.mktemp("eval") / "model", config, tokenizer)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("She sells sea shells by the sea shore, and 1234 cats sat on the mat.\n" * 3)
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["eval", "perplexity", *map(str, argv)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_perplexity_is_that_of_the_models_logits(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = evaluate(capsys, model, "--text", text, "--json", "--length", 256)
    found = json.loads(out)
    ids = Tokenizer.from_hf(model).encode(text.read_text(), parse_special=False)
    llm = LLM(model, enforce_eager=True)
    logits, targets = llm.logits(ids)[:-1], torch.tensor(ids[1:])
    nll = float(torch.nn.functional.cross_entropy(logits, targets))
    assert status == 0 and found["tokens"] == len(ids) - 1
    assert found["nats_per_token"] == pytest.approx(nll, rel=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-2)
    nbytes = len(text.read_bytes()) - len(Tokenizer.from_hf(model).decode(ids[:1]).encode())
    assert found["bytes"] == nbytes
    status, out, _ = evaluate(capsys, model, "--text", text, "--limit", 9)
    assert status == 0 and "tokens predicted  9 in" in out


def test_a_table_compares_formats_with_the_first(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = model, "--text", text, "--limit", 40, "--formats", "f32,bf16,q8_0,Q4_0"
    status, out, err = evaluate(capsys, *args, "--no-speed", "--json")
    table: dict[str, Any] = json.loads(out)
    rows = {row["format"]: row for row in table["rows"]}
    assert status == 0 and list(rows) == ["f32", "bf16", "q8_0", "q4_0"]
    assert rows["f32"]["difference"] == rows["f32"]["error"] == 0
    assert rows["f32"]["bits_per_weight"] == pytest.approx(32)
    assert rows["bf16"]["bits_per_weight"] == pytest.approx(16)
    assert 8.4 < rows["q8_0"]["bits_per_weight"] < 9
    assert 4.4 < rows["q4_0"]["bits_per_weight"] < rows["q8_0"]["bits_per_weight"]
    worst = abs(rows["q4_0"]["difference"])
    assert 0 < abs(rows["q8_0"]["difference"]) < worst and rows["q4_0"]["error"] > 0
    assert rows["q4_0"]["perplexity"] - rows["f32"]["perplexity"] == rows["q4_0"]["difference"]
    assert not any("itself quantized" in line for line in table["notes"])
    assert "q8_0: perplexity" in err


def test_speeds_markdown_and_the_note_of_a_quantized_model(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.gguf"
    assert main(["export", str(model), "--type", "q4_0", "--out", str(file)]) == 0
    status, out, _ = evaluate(
        capsys, file, "--text", text, "--formats", "f32,q4_0", "--markdown", "--limit", 20
    )
    lines = out.splitlines()
    assert status == 0 and lines[0].startswith("| format | bits/weight | size | perplexity |")
    assert lines[1] == "| --- |" + " ---: |" * 6
    f32, q4_0 = ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:4])
    assert f32[0] == "f32" and q4_0[0] == "q4_0" and f32[4] == "" and "±" in q4_0[4]
    assert all(float(cell) > 0 for cell in (*f32[5:], *q4_0[5:]))
    assert any("itself quantized (q4_0)" in line and "look better" in line for line in lines[4:])


def test_a_method_that_reads_text_is_named_in_its_rows(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = evaluate(
        capsys, model, "--text", text, "--formats", "f32,int4_g32,q4_0:rtn,fp8:awq",
        "--method", "gptq", "--calibration", text, "--no-speed", "--limit", 20,
    )  # fmt: skip
    lines = out.splitlines()
    assert status == 0
    for label in ("int4_g32 (gptq)  ", "q4_0  ", "fp8 (awq)  "):
        assert any(line.startswith(label) for line in lines), label
    assert "int4_g32 int8, q4_0 int8, fp8 fp8" in out  # e4m3 codes have no int8 products


def test_the_table_tells_the_windows_and_the_formats_of_rows_that_do_not_fit(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positions = open_weights(model).config.max_position_embeddings
    status, out, err = evaluate(
        capsys, model, "--text", text, "--formats", "f32,q4_k_m", "--no-speed", "--limit", 20,
        "--length", 10 * positions,
    )  # fmt: skip
    assert status == 0
    assert f"windows of {positions} tokens, stride {positions}, 1 document;" in out
    assert "q4_k_m: q4_k does not fit the rows of " in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--formats", "q4_k_x"], "format 'q4_k_x' is not known; did you mean"),
        (["--formats", " , "], "--formats is empty"),
        (["--formats", "int4:gtpq"], "'int4:gtpq': methods are rtn, imatrix, awq, gptq"),
        (["--formats", "bf16:gptq"], "bf16 is not quantized, by no method"),
        (["--formats", "f32,int4:awq"], "--method awq needs --calibration FILE"),
        (["--formats", "int4", "--method", "gptq"], "--method gptq needs --calibration FILE"),
        (["--markdown"], "--markdown goes with --formats"),
        (["--formats", "q4_0", "--adapter", "x"], "takes a model alone"),
        (["--length", "0"], "length must be from 1"),
        (["--stride", "600"], "stride must be from 1 to the length"),
        (["--limit", "0"], "limit must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(
    argv: list[str], message: str, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = evaluate(capsys, model, "--text", text, *argv)
    assert status == 2 and message in err


def test_text_without_anything_to_predict_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    status, _, err = evaluate(capsys, model, "--text", empty)
    assert status == 2 and f"{empty}: the text is empty" in err
    status, _, err = evaluate(capsys, model, "--text", tmp_path / "none.txt")
    assert status == 2 and "none.txt: there is no such file" in err


def test_names_of_formats_are_resolved_once_each() -> None:
    assert wanted_rows("F32, int4,int4_g128:RTN,Q4_K_M:gptq", "rtn") == [
        ("f32", ""), ("int4_g128", "rtn"), ("q4_k_m", "gptq"),
    ]  # fmt: skip
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]

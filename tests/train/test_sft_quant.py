"""QLoRA runs: the base is quantized as it is loaded, an adapter learns, and both come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.cli.main import main as fastllm_main
from fastllm.errors import CheckpointError
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.testing.quantized_models import directory
from fastllm.train import sft

CHATS = [("What is two and two?", "Two and two are four."), ("Name a color.", "Blue is a color.")]
QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false", "--holdout=none"]
LEARN = ["--batch_size=2", "--epochs=40", "--lr=5e-3", "--samples=2", "--weight_decay=0"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in CHATS))
    return file


def base(folder: Path, case: str) -> Path:
    """A Hugging Face directory of random weights with a tokenizer for the chats."""
    tokenizer = train_tokenizer([f"{q} {a}" for q, a in CHATS] * 2, 330, allow_smaller=True)
    return directory(
        case, folder / "base", tokenizer, vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
    )  # fmt: skip


def fine_tune(model: Path, data: Path, out: Path, *more: str) -> sft.SftResult:
    words = [f"--model={model}", f"--data={data}", f"--out={out}", *QUIET, *more]
    return sft.main(sft.load(None, words), say=lambda line: None)


@pytest.mark.parametrize(
    ("case", "quant"), [("llama", "nf4"), ("qwen3 moe", "int4"), ("deepseek v3 experts", "q4_k")]
)
def test_an_adapter_learns_on_weights_quantized_at_load_and_is_served_on_them(
    case: str, quant: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = base(tmp_path, case)
    spoken = "--loop.metrics.progress=plain"
    result = fine_tune(path, chats, tmp_path / "run", f"--quant={quant}", *LEARN, spoken)
    assert [a.after for a in result.answers] == [a.expected for a in result.answers]
    assert [a.before for a in result.answers] != [a.expected for a in result.answers]
    assert {f.name for f in result.output.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    llm = LLM(path, adapter=result.output, quantization=quant)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    for question, answer in CHATS:
        (output,) = llm.chat([{"role": "user", "content": question}], params)
        assert output.outputs[0].text == answer
    assert f"weights quantized to {llm.model.quantization.format}" in capsys.readouterr().err


def test_a_quantized_file_is_rounded_again_only_if_asked_and_says_so(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "base.gguf"
    path = base(tmp_path, "llama")
    assert fastllm_main(["export", str(path), "--type", "q8_0", "--out", str(file)]) == 0
    options = ["--epochs=1", "--batch_size=2", "--samples=0", "--loop.metrics.progress=plain"]
    fine_tune(file, chats, tmp_path / "as-it-is", *options)
    said = capsys.readouterr().err
    assert "on packed quantized weights" in said and "weights quantized to" not in said
    fine_tune(file, chats, tmp_path / "again", "--quant=q4_0", *options)
    said = capsys.readouterr().err
    assert "weights quantized to q4_0" in said and "errors of both roundings add up" in said


def test_a_resumed_run_has_the_same_bits_and_the_same_base(chats: Path, tmp_path: Path) -> None:
    path = base(tmp_path, "llama")
    options = ["--quant=q8_0", "--batch_size=1", "--epochs=2", "--samples=0", "--loop.save_every=2"]
    whole = fine_tune(path, chats, tmp_path / "whole", *options)
    middle = tmp_path / "whole" / "checkpoints" / "step-000002"
    resumed = fine_tune(path, chats, tmp_path / "resumed", *options, f"--resume={middle}")
    ours, theirs = (r.output / "adapter_model.safetensors" for r in (whole, resumed))
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(CheckpointError, match="quant is 'q8_0' there and 'q4_0' here"):
        fine_tune(path, chats, tmp_path / "o", "--quant=q4_0", *options[1:], f"--resume={middle}")


def test_what_cannot_be_is_refused_before_anything_is_read(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quant freezes the weights, which method full trains"):
        sft.load(None, ["--model=x", "--data=y", "--quant=nf4", "--method=full"])
    with pytest.raises(ValueError, match="did you mean"):
        sft.load(None, ["--model=x", "--data=y", "--quant=nf5"])
    assert fastllm_main(["sft", "x", str(chats), "--quant", "nf5"]) == 2

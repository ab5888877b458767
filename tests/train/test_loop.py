"""The loop in this process: what a step computes, and when it refuses to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.cli.main import main
from fastllm.engine.llm import LLM
from fastllm.errors import CheckpointError, NumericalError
from fastllm.nn.batch import Documents
from fastllm.train import loop, pretrain
from fastllm.train.pretrain import Pretraining


def train(tiny: Any, out: Path, *words: str, kind: type[Pretraining] = Pretraining) -> Any:
    """(task, result, metrics) of a run in this process."""
    torch.set_num_threads(1)
    config = pretrain.load(None, tiny.words(out, "loop.metrics.progress=plain", *words))
    task = kind(config, torch.device("cpu"))
    result = loop.run(task, config.loop)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return task, result, [json.loads(line) for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_does_not_depend_on_how_it_is_cut(tiny: Any, tmp_path: Path, dtype: str) -> None:
    words = ("loop.steps=3", f"dtype={dtype}", "data.batch_tokens=256")
    one, _, metrics = train(tiny, tmp_path / "1", *words, "data.micro_rows=1")
    eight, _, expected = train(tiny, tmp_path / "8", *words, "data.micro_rows=8")
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for key in ("loss", "norm"):
        got, wanted = ([m[key] for m in ms] for ms in (metrics, expected))
        assert got == pytest.approx(wanted, rel=tolerance)
    for a, b in zip(one.model.parameters(), eight.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 if dtype == "float32" else 4e-2)


def test_the_first_step_is_the_one_that_a_plain_optimizer_makes(tiny: Any, tmp_path: Path) -> None:
    words = ("loop.steps=1", "dtype=float32", "loop.max_norm=0.5", "loop.schedule.final=1")
    task, _, metrics = train(tiny, tmp_path, *words)
    config = pretrain.load(None, tiny.words(tmp_path, *words))
    plain = Pretraining(config, torch.device("cpu"))
    micros = next(plain.batches)
    tokens = sum(m.tokens for m in micros)
    loss = sum((plain.loss(m) for m in micros), torch.zeros(())) / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
    assert norm > 0.5
    assert metrics[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics[0]["norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics[0]["lr"] == 0.01
    decayed = {id(p) for n, p in plain.model.named_parameters() if p.ndim == 2 and "embed" not in n}
    for p, got in zip(plain.model.parameters(), task.model.parameters(), strict=True):
        decay = config.optim.weight_decay if id(p) in decayed else 0.0
        torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), weight_decay=decay).step()
        torch.testing.assert_close(got, p, rtol=1e-4, atol=1e-6)


def test_the_model_learns_the_words(tiny: Any, tmp_path: Path) -> None:
    _, result, metrics = train(tiny, tmp_path, "loop.steps=80", "loop.eval_every=80")
    assert result.status == "finished" and result.step == 80
    # Letters of 20 known words, drawn evenly: about 1.6 bits a byte with the spaces.
    assert result.metrics["bits_per_byte"] < 2.6 < metrics[0]["loss"] / 0.6931
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 81))
    assert metrics[0]["tokens"] == 128 and metrics[0]["mfu"] > 0


def test_bits_per_byte_count_the_whole_held_out_text(tiny: Any, tmp_path: Path) -> None:
    task, result, _ = train(tiny, tmp_path, "loop.steps=1", "loop.eval_every=1", "data.eval_rows=0")
    total = 0.0
    split = task.store.split("holdout")
    with torch.no_grad():
        for number in range(split.first, split.first + split.documents):
            tokens = [0, *task.store.document(number).tolist()]
            for low in range(0, len(tokens) - 1, 32):
                piece = tokens[low : low + 33]
                documents = Documents.pack([piece[:-1]])
                total += float(task.decoder.loss(documents, torch.tensor(piece[1:])))
    # Rows may cut documents elsewhere: the sums differ by what the model sees of the past.
    bits = total / 0.6931472 / split.text_bytes
    assert result.metrics["bits_per_byte"] == pytest.approx(bits, rel=0.02)


class Poisoned(Pretraining):
    """Its loss is NaN in the third step."""

    def loss(self, micro: Any) -> Tensor:
        loss = super().loss(micro)
        return loss * float("nan") if self.batches.state_dict()["row"] == 12 else loss


def test_a_loss_of_nan_stops_before_the_update_and_keeps_the_checkpoint(
    tiny: Any, tmp_path: Path
) -> None:
    with pytest.raises(NumericalError) as caught:
        train(tiny, tmp_path, "loop.steps=6", "loop.save_every=1", kind=Poisoned)
    message = str(caught.value)
    assert "step 3: the loss is nan" in message and "step-000002" in message
    assert "values of the gradient of model.embed_tokens.weight" in message
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    # The third step's data again, without the poison, from the checkpoint that was kept.
    train(tiny, tmp_path, "loop.steps=3", "loop.resume=auto")


def test_a_parameter_of_infinity_is_named(tiny: Any, tmp_path: Path) -> None:
    class Broken(Pretraining):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            with torch.no_grad():
                self.decoder.model.norm.weight[3] = float("inf")

    with pytest.raises(NumericalError, match=r"1 of 32 values of the parameter of model\.norm\."):
        train(tiny, tmp_path, "loop.steps=1", kind=Broken)


def test_numbers_that_are_none_exit_with_1(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain, "Pretraining", Poisoned)
    assert main(["pretrain", *tiny.words(tmp_path, "loop.steps=6")]) == 1
    assert "error: step 3: the loss is nan" in capfd.readouterr().err


def test_a_step_without_targets_is_an_error(tiny: Any, tmp_path: Path) -> None:
    class Masked(Pretraining):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.batches = self

        def __next__(self) -> list[Any]:
            return []

    with pytest.raises(ValueError, match="step 1 has no target that counts"):
        train(tiny, tmp_path, "loop.steps=1", kind=Masked)


def test_samples_are_beginnings_of_documents(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    generate = LLM.generate

    def seen(llm: LLM, given: Any, *more: Any) -> Any:
        prompts.extend(given)
        return generate(llm, given, *more)

    monkeypatch.setattr(LLM, "generate", seen)
    words = ("loop.steps=1", "loop.sample_every=1", "sample.prompts=[a, '']")
    task, _, metrics = train(tiny, tmp_path, *words)
    start = task.store.start_token_id
    assert prompts == [[start, *task.tokenizer.encode("a", False)], [start]]
    assert [pair[0] for pair in metrics[-1]["samples"]] == ["a", ""]


def test_another_run_is_not_written_over(tiny: Any, tmp_path: Path) -> None:
    train(tiny, tmp_path, "loop.steps=1")
    with pytest.raises(CheckpointError, match=r"holds a run already \(step-000001\)"):
        train(tiny, tmp_path, "loop.steps=1")


def test_two_runs_do_not_write_into_one_folder(tiny: Any, tmp_path: Path) -> None:
    class Nosy(Pretraining):
        def evaluate(self) -> dict[str, float]:
            with pytest.raises(BlockingIOError, match="another run is writing into this folder"):
                train(tiny, tmp_path, "loop.steps=1", "loop.resume=auto")
            return {"seen": 1.0}

    _, result, _ = train(tiny, tmp_path, "loop.steps=2", "loop.eval_every=1", kind=Nosy)
    assert result.metrics == {"seen": 1.0}


def test_seconds_decide_the_number_of_steps(tiny: Any, tmp_path: Path) -> None:
    _, result, metrics = train(
        tiny, tmp_path, "loop.seconds=1.0", "loop.steps=100000", "loop.save_every=0"
    )
    assert result.status == "finished" and 10 < result.step < 100000
    assert 0.3 < metrics[-1]["seconds"] < 3
    assert metrics[-1]["lr"] == pytest.approx(0.001, rel=0.05)  # the schedule has come to its end


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("loop.steps=0", r"loop\.steps must be at least 1, got 0"),
        ("loop.max_norm=-1", r"loop\.max_norm must be a number from 0"),
        ("loop.metrics.every=0", r"loop\.metrics\.every must be at least 1"),
        ("data.store=nowhere", "nowhere/index.json: the file does not exist"),
        ("data.tokenizer=nowhere", "'nowhere' is not a directory"),
        ("model.width=30", "width 30 is not a multiple of head_dim 16"),
        ("optim.nam=muon", "did you mean optim.name"),
        ("optim.betas=0.9", r"optim\.betas must be two numbers"),
        ("sample.max_tokens=0", r"sample\.max_tokens must be at least 1"),
        ("sample.temperature=-1", r"sample\.temperature must be a number from 0"),
    ],
)
def test_what_cannot_be_is_named(tiny: Any, tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny, tmp_path, "loop.steps=1", word)


def test_a_tokenizer_of_other_data_is_refused(tiny: Any, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    for file in tiny.tokenizer.iterdir():
        text = file.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true')
        (other / file.name).write_text(text.replace('space": false', 'space": true'))
    with pytest.raises(ValueError, match=r"is not the tokenizer that .* was made with"):
        train(tiny, tmp_path / "run", "loop.steps=1", f"data.tokenizer={other}")

"""Distillation by answers: the teacher's, kept by rewards, and the student's own."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.cli import distill as cli
from fastllm.errors import CheckpointError, DataError, RewardError
from fastllm.models.config import ModelConfig
from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.train import distill, sft
from fastllm.train.data.prompts import PromptRecord
from fastllm.train.distill import DistillResult, SequencesResult
from fastllm.train.distillation import sequences
from fastllm.train.distillation.on_policy import OnPolicyConfig
from fastllm.train.distillation.sequences import Answer, SequencesConfig, keep, write_sequences
from fastllm.train.rewards import resolve

QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false"]
SUMS = [(a, b) for a in range(4) for b in range(3)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


def random_model(path: Path, tokenizer: Tokenizer, hidden: int, seed: int) -> Path:
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=hidden,
        intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16, head_dim=16, rms_norm_eps=1e-5,
        max_position_embeddings=64, tie_word_embeddings=True, dtype=torch.float32,
        eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
    )  # fmt: skip
    save_pretrained(initialize(config, dtype=torch.float32, seed=seed), path, tokenizer)
    return path


def tokenizer_of(texts: list[str], size: int) -> Tokenizer:
    return train_tokenizer(texts * 4, size, allow_smaller=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher that has learned sums of small numbers, students of its and of another vocabulary,
    sums as conversations (some of them wrong), and as questions with their answers."""
    folder = tmp_path_factory.mktemp("answers")
    chats, questions = folder / "chats.jsonl", folder / "questions.jsonl"
    lines = [{"prompt": f"{a}+{b}=", "completion": f"It is {a + b}."} for a, b in SUMS]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in SUMS]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    texts = [f"{line['prompt']} {line['completion']}" for line in lines]
    tokenizer = tokenizer_of(texts, 300)
    reversed_ = tokenizer_of([text[::-1] for text in texts], 275)
    words = [f"--model={random_model(folder / 'untaught', tokenizer, 64, 1)}", f"--data={chats}",
             f"--out={folder / 'taught'}", "--method=full", "--holdout=none", "--epochs=60",
             "--batch_size=12", "--lr=1e-2", "--samples=0",
             "--loop.save_every=0", *QUIET]  # fmt: skip
    torch.set_num_threads(1)
    taught = sft.main(sft.load(None, words), say=lambda line: None)
    return {
        "teacher": taught.output, "chats": chats, "questions": questions,
        "student": random_model(folder / "student", tokenizer, 32, 2),
        "foreign": random_model(folder / "foreign", reversed_, 48, 3),
    }  # fmt: skip


def run(files: dict[str, Path], out: Path, mode: str, *more: str) -> Any:
    options = [f"--model={files['student']}", f"--teacher={files['teacher']}", f"--out={out}",
               f"--data={files['questions']}", "--method=full", f"--mode={mode}",
               *QUIET]  # fmt: skip
    said: list[str] = []
    return distill.main(distill.load(None, [*options, *more]), said.append)


TAUGHT = ["--sequences.max_completion=12", "--sequences.samples=3", "--epochs=80", "--lr=1e-2",
          "--batch_size=12", "--holdout=none", "--sequences.temperature=0.7",
          "--sequences.rewards=exact_match"]  # fmt: skip


# the teacher's answers


def test_a_student_of_another_vocabulary_learns_the_teachers_right_answers(
    files: dict[str, Path], tmp_path: Path
) -> None:
    result = run(files, tmp_path / "run", "sequences", *TAUGHT, f"--model={files['foreign']}")
    assert isinstance(result, SequencesResult)
    kept = [json.loads(line) for line in result.sequences.read_text().splitlines()]
    assert len(kept) == result.kept.kept and result.kept.answers == 36
    assert result.kept.prompts >= 10 and result.kept.repeated > 0
    for record in kept:
        question, said = (message["content"] for message in record["messages"])
        assert said == f"It is {sum(map(int, question[:-1].split('+')))}."
    llm = LLM(result.sft.output)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    right = 0
    for a, b in SUMS:
        (output,) = llm.chat([{"role": "user", "content": f"{a}+{b}="}], params)
        right += output.outputs[0].text == f"It is {a + b}."
    assert right >= 10


def test_answers_that_were_interrupted_go_on_and_are_not_asked_again(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "CHUNK", 5)
    short = ["--steps=1", "--loop.save_every=0"]
    whole = run(files, tmp_path / "whole", "sequences", *TAUGHT, *short)
    calls: list[range] = []
    generate = sequences._generate

    def failing(llm: LLM, prompts: Any, numbers: range, *rest: Any) -> Any:
        calls.append(numbers)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(llm, prompts, numbers, *rest)

    monkeypatch.setattr(sequences, "_generate", failing)
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "run", "sequences", *TAUGHT, *short)
    again = run(files, tmp_path / "run", "sequences", *TAUGHT, *short)
    assert [numbers.start for numbers in calls] == [0, 5, 5, 10]
    assert again.sequences.read_bytes() == whole.sequences.read_bytes()
    assert len(calls) == 4
    other = [*TAUGHT, "--sequences.samples=2"]
    with pytest.raises(DataError, match="samples: is 3, this run has 2"):
        run(files, tmp_path / "run", "sequences", *other, "--resume=auto")
    with pytest.raises(CheckpointError, match="holds a run already"):  # before the teacher is asked
        run(files, tmp_path / "run", "sequences", *other)


def test_no_answer_that_is_right_is_an_error_that_counts_them(
    files: dict[str, Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"question": "1+1=", "answer": "77"}) + "\n")
    with pytest.raises(
        DataError, match=r"3 answers: 0 kept.*3 below the threshold.*the best has 0"
    ):
        run(files, tmp_path / "run", "sequences", *TAUGHT, f"--data={wrong}")
    with pytest.raises(DataError, match="12 too long"):
        run(files, tmp_path / "cut", "sequences", *TAUGHT, "--sequences.max_completion=1",
            "--sequences.samples=1")  # fmt: skip
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text(json.dumps({"question": "1+1="}) + "\n")
    with pytest.raises(RewardError, match="answer"):
        run(files, tmp_path / "none", "sequences", *TAUGHT, f"--data={unanswered}")
    assert not (tmp_path / "none" / "answers").exists()


def test_the_best_distinct_answers_of_each_prompt_are_kept(tmp_path: Path) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        return [float(text.strip()) for text in completions]

    records = [PromptRecord(prompt="a", plain="Q: a"), PromptRecord(prompt="b")]
    answers = [
        Answer(0, 0, "2", False), Answer(0, 1, " 2 ", False), Answer(0, 2, "3", False),
        Answer(0, 3, "1", False), Answer(0, 4, "9", True), Answer(1, 0, "0.5", False),
        Answer(1, 1, " ", False), Answer(0, 5, "3.5", False),
    ]  # fmt: skip
    config = SequencesConfig(threshold=2.0, keep=2)
    kept, counts = keep(answers, records, resolve([reward]), config)
    assert [answer.text for answer in kept] == ["3.5", "3"]
    assert (counts.answers, counts.kept, counts.prompts) == (8, 2, 1)
    assert (counts.cut, counts.low, counts.repeated, counts.beyond) == (2, 2, 1, 1)
    everything, _ = keep(answers, records, [], SequencesConfig(rewards=()))
    assert [answer.text for answer in everything] == ["2", "3", "1", "3.5", "0.5"]
    write_sequences(tmp_path / "a.jsonl", kept, records, plain=True)
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0]) == {
        "prompt": "Q: a", "completion": "3.5",
    }  # fmt: skip


def test_thoughts_that_the_template_began_are_whole() -> None:
    class Engine:
        class tokenizer:
            @staticmethod
            def decode(ids: list[int], skip_special_tokens: bool) -> str:
                return "<|im_start|>assistant\n<think>\n"

        @staticmethod
        def generate(prompts: Any, params: Any) -> Any:
            output = type(
                "Output", (), {"text": "so</think>4", "index": 0, "finish_reason": "stop"}
            )
            return [type("Outputs", (), {"outputs": [output]})]

    prompt = type("Prompt", (), {"ids": (1, 2)})
    (answer,) = sequences._generate(Engine, [prompt], range(1), SequencesConfig(), 0)  # type: ignore[arg-type]
    assert answer.text == "<think>\nso</think>4"


# the student's own


OWN = ["--on_policy.max_completion=8", "--batch_size=6", "--lr=5e-3", "--loop.metrics.every=1"]


def test_a_student_comes_nearer_to_its_teacher_by_its_own_answers(
    files: dict[str, Path], tmp_path: Path
) -> None:
    result = run(files, tmp_path / "run", "on_policy", *OWN, "--epochs=60", "--holdout=0.2")
    assert isinstance(result, DistillResult)
    assert result.before is not None and result.after is not None
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "divergence" in line]
    assert steps[-1]["divergence"] < 0.5 * steps[0]["divergence"]
    assert 1 <= steps[0]["completions/mean_length"] <= 8
    assert 0 <= steps[0]["completions/clipped_ratio"] <= 1 and "seconds/rollout" in steps[0]


def test_problems_of_tasks_are_asked_and_shown(files: dict[str, Path], tmp_path: Path) -> None:
    held_out = f"--holdout={files['questions']}"
    result = run(files, tmp_path / "run", "on_policy", "--data=arithmetic:1", "--task_count=12",
                 "--on_policy.max_completion=4", "--chat_template=plain", "--steps=2",
                 "--loop.sample_every=1", held_out, "--batch_size=4")  # fmt: skip
    assert result.before is not None and result.run.step == 2
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    samples = [line["samples"] for line in lines if "samples" in line]
    assert len(samples) == 2 and len(samples[0]) == 4


@pytest.mark.parametrize("share", ["0", "0.5", "1"])
def test_a_share_of_the_prompts_is_answered_by_the_student(
    files: dict[str, Path], tmp_path: Path, share: str
) -> None:
    result = run(files, tmp_path / "run", "on_policy", *OWN, f"--data={files['chats']}",
                 f"--on_policy.student_share={share}", "--epochs=3", "--divergence=js",
                 "--method=lora", "--holdout=0.2")  # fmt: skip
    assert result.run.status == "finished" and result.output.name == "adapter"
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("completions/mean_length" in line for line in lines) == (share != "0")


def test_a_run_killed_with_9_in_the_middle_resumes_with_the_same_bits(
    files: dict[str, Path], tmp_path: Path, runner: Any
) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")

    def argv(out: Path) -> list[str]:
        return ["distill", "--config", str(empty), f"--model={files['student']}",
                f"--teacher={files['teacher']}", f"--data={files['chats']}", f"--out={out}",
                "--mode=on_policy", "--method=full", *OWN, *QUIET, "--epochs=4", "--holdout=0.2",
                "--on_policy.student_share=0.7", "--loop.save_every=2", "--resume=auto",
                "--loop.metrics.every=1"]  # fmt: skip

    assert runner.run(argv(tmp_path / "whole")) == 0, runner.log.read_text()
    out = tmp_path / "run"
    for number, step in ((signal.SIGTERM, 1), (signal.SIGKILL, 4)):
        begun = f'"step": {step}'
        status = runner.stop_when(  # most often within a rollout
            argv(out), out / "metrics.jsonl", lambda text, begun=begun: begun in text, number
        )
        assert status in (-signal.SIGKILL, 0), runner.log.read_text()
    assert runner.run(argv(out)) == 0, runner.log.read_text()
    found, wanted = (
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "whole")
    )
    for record in (*found, *wanted):
        for timed in ("seconds", "tokens_per_second", "mfu", "seconds/rollout"):
            record.pop(timed, None)
    assert found == wanted
    one, other = (d / "model/model.safetensors" for d in (out, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_asked_is_named(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for words, match in [
        (["--on_policy.max_completion=64"], "fills the context of 64"),
        (["--alpha=0.5"], "alpha must be 1 in mode on_policy"),
        (["--on_policy.student_share=0.5"], "the data has no answers"),
        (["--on_policy.temperature=0"], "temperature must be above 0"),
        (["--store_top_k=3"], "store_top_k belongs to mode logits"),
        ([f"--model={files['foreign']}"], "different vocabularies"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(files, out, "on_policy", *words)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "x" * 300}) + "\n")
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens, more than 56"):
        run(files, out, "on_policy", *OWN, f"--data={long}")
    for words, match in [
        (["--sequences.max_completion=64"], "fills the teacher's context of 64"),
        (["--sequences.temperature=0"], "samples must be 1 at temperature 0"),
        (["--model=new"], "a new student knows no language yet"),
        (["--sequences.reward_weights=1,2"], "reward_weights has 2 numbers for 1 rewards"),
        (["--sequences.reward_weights=inf"], "reward_weights must be finite"),
        (["--sequences.reward_timeout=0"], "reward_timeout must be above 0"),
        (["--sequences.threshold=nan"], "threshold must be finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(files, out, "sequences", *words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        run(files, out, "on_policy")
    assert not out.exists()
    assert OnPolicyConfig().student_share == 1.0


def test_the_command_says_what_was_kept(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(files["student"]), str(files["questions"]), "--teacher", str(files["teacher"]),
            "--mode=sequences", "--out", str(tmp_path / "run"), *TAUGHT, *QUIET,
            "--steps=1"]  # fmt: skip
    assert cli.run(argv) == 0
    out = capsys.readouterr().out
    assert "36 answers:" in out and "finished after 1 steps" in out
    assert cli.run(["--help"]) == 0
    assert "--on_policy.student_share" in capsys.readouterr().out

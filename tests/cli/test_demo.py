"""The demo's own pieces: what it trains on, what it compares with, how it draws."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.cli import demo, demo_distill, demo_grpo, demo_pretrain
from fastllm.cli.demo_reward import rankings
from fastllm.cli.demo_sft import configuration, score
from fastllm.cli.demo_stage import Part, Setting, Stage
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.train import distill, grpo
from fastllm.train.config import save_config
from fastllm.train.data.conversations import read_conversations
from fastllm.train.data.example_dialogues import has_style
from fastllm.train.data.store_writer import Vocabulary, write_store
from fastllm.train.presets import active_parameters, model_config
from fastllm.train.pretrain import load
from fastllm.train.sft import Answer


def test_parts_are_chosen_by_name() -> None:
    def names(parts: str, quick: bool = False) -> list[str]:
        return [stage.name for stage in demo.chosen_stages(parts, quick=quick)]

    assert names(",".join(demo.WHAT)) == [stage.name for stage in demo.STAGES]
    assert names("sft, answers") == ["answers", "sft"]
    assert names("speed,sft", quick=True) == ["sft"]
    with pytest.raises(ValueError, match="--parts names 'train'; there are answers, speed"):
        demo.chosen_stages("answers,train")


def test_the_stages_fit_the_time_that_the_help_promises() -> None:
    # what is not training took as long as that, or less, in the runs that NOTES.md tells of
    for total, training in (
        (demo.MINUTES, sum(stage.training for stage in demo.STAGES)),
        (demo.QUICK_MINUTES, sum(stage.quick for stage in demo.STAGES)),
    ):
        assert 0 < training < 0.65 * 60 * total


def test_the_corpus_is_this_pythons_own_and_enough(tmp_path: Path) -> None:
    files = demo_pretrain.corpus(tmp_path / "topics")
    assert len(files) == len(set(files)) > 300
    assert sum(file.stat().st_size for file in files) > 5e6
    assert {"asyncio", "json"} <= {file.parent.name for file in files}
    assert not any("test" in file.parts or "site-packages" in file.parts for file in files)
    for file in files:
        assert file.read_text("utf-8")


def test_gzip_is_measured_on_the_very_files_that_are_held_out(tmp_path: Path) -> None:
    texts = ["def f(x):\n    return x\n" * 3, "naïve café 你好\n" * 5, "held out\r\n\ttext " * 7]
    tokenizer = train_tokenizer(texts, 300, allow_smaller=True)
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    ids = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
    vocabulary = Vocabulary(vocab_size=tokenizer.vocab_size, start_token_id=end, end_token_id=end)
    store = write_store(tmp_path / "store", {"train": ids[:1], "holdout": ids[1:]}, vocabulary)
    held = "".join(texts[1:]).encode()
    expected = 8 * len(gzip.compress(held, 9)) / len(held)
    assert demo_pretrain.gzip_bits(store, tokenizer) == pytest.approx(expected)


def run_of(load: float | None) -> demo_pretrain.Run:
    lines = [
        {"step": step, "tokens": 1000 * step, "loss": 4.0 / step, "tokens_per_second": 500.0}
        | ({} if load is None else {"expert_load": load, "experts": {"layer": [0], "load": [load]}})
        for step in (1, 2, 3)
    ]
    return demo_pretrain.Run(
        model=Path("model"), parameters=9, active=3, steps=3, bits_per_byte=2.0,
        tokens_per_second=500.0, lines=lines,
    )  # fmt: skip


def test_two_trainings_are_recorded_and_drawn_together(tmp_path: Path) -> None:
    done = demo_pretrain.Pretrained(
        experts=run_of(1.25), dense=run_of(None), gzip_bits_per_byte=2.5
    )
    record = json.loads(json.dumps(done.record()))
    assert record["expert_load"] == 1.25 and record["active"] == record["dense"]["active"] == 3
    chart = demo_pretrain._chart(done, tmp_path / "chart.png")
    assert Path(chart).read_bytes().startswith(b"\x89PNG")


def test_the_dense_model_reads_what_the_experts_read(tmp_path: Path) -> None:
    ids = [[1, 2, 3, 4] * 60, [5, 6, 7, 8] * 60]
    vocabulary = Vocabulary(vocab_size=64, start_token_id=0, end_token_id=0, name=str(tmp_path))
    write_store(tmp_path / "store", {"train": ids[:1], "holdout": ids[1:]}, vocabulary)
    shared = demo_pretrain.overrides(tmp_path, tmp_path / "experts")
    experts = load(None, [*shared, *demo_pretrain.expert_overrides(1.0, 3)])
    (tmp_path / "experts").mkdir()
    save_config(experts, tmp_path / "experts" / "config.yaml")
    words = demo_pretrain.dense_overrides(77, tmp_path / "experts", 3)
    dense = load(None, [*shared, *words])
    assert dense.loop.steps == 77
    assert dense.data == experts.data and dense.optim == experts.optim
    sizes = [
        model_config(config.model, vocab_size=8192, bos=None, eos=(), context=512)
        for config in (experts, dense)
    ]
    assert active_parameters(sizes[0]) == pytest.approx(active_parameters(sizes[1]), rel=0.01)


def test_sparklines_fall_as_the_values_do() -> None:
    line = demo_pretrain.sparkline([8.0, 6.0, 5.0, 4.0])
    assert line.startswith("8.00 ") and line.endswith(" 4.00")
    blocks = line.split()[1]
    assert len(blocks) == 4 and list(blocks) == sorted(blocks, reverse=True)
    assert blocks[0] == "█" and blocks[-1] == "▁"
    assert len(demo_pretrain.sparkline([1.0] * 500).split()[1]) == 48
    assert demo_pretrain.sparkline([]) == "no values"


def test_answers_are_scored_by_result_and_style(tmp_path: Path) -> None:
    answers = [
        Answer(prompt="?", expected="Work: 1 + 1 = 2\nAnswer: 2", before="", after="")
        for _ in range(4)
    ]
    texts = ["Work: 1 + 1 = 2\nAnswer: 2", "It is\n2.", "Work: 1 + 1 = 3\nAnswer: 3", ""]
    assert score(texts, answers) == (0.5, 0.5)


def test_rankings_have_four_answers_and_a_known_order() -> None:
    records = rankings(40)
    assert rankings(40) == records and rankings(12, holdout=True)[0] != records[0]
    for record in records:
        assert set(record["ranks"]) in ({1, 2, 3, 4}, {1, 2, 4})
        best = [a for a, r in zip(record["answers"], record["ranks"], strict=True) if r == 1]
        bare = record["answers"][record["ranks"].index(2)]
        assert any(has_style(answer) and answer.endswith(f"Answer: {bare}") for answer in best)
    held = {record["prompt"] for record in rankings(40, holdout=True)}
    assert not held & {record["prompt"] for record in records}


def grpo_lines(accuracies: list[float], difference: float = 0.0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step, value in enumerate(accuracies):
        lines.append({"step": step, "eval_exact_match": value})
        lines.append({
            "step": step + 1, "reward": value, "completions/mean_length": 20.0,
            "logprob_difference": difference, "tokens_per_second": 100.0,
            "seconds/rollout": 1.0, "seconds/reward": 0.0, "seconds/update": 3.0,
        })  # fmt: skip
    return lines


def test_grpo_fails_unless_accuracy_rises_and_bits_agree(tmp_path: Path) -> None:
    part = demo_grpo.shown(tmp_path, grpo_lines([0.25, 0.5, 0.75]))
    assert part.problem is None and part.record["accuracy"] == [0.25, 0.75]
    assert part.record["seconds_per_step"] == {"rollout": 1.0, "reward": 0.0, "update": 3.0}
    curve = part.curves["share of right answers, over steps"][0]
    assert curve == ("held out", [(0, 0.25), (1, 0.5), (2, 0.75)])
    assert "did not rise" in str(demo_grpo.shown(tmp_path, grpo_lines([0.5, 0.9, 0.5])).problem)
    lines = grpo_lines([0.5, 0.9, 0.5])
    lines[-1]["reward"] = 0.6  # the samples' reward says what 100 greedy answers cannot
    assert demo_grpo.shown(tmp_path, lines).problem is None
    problem = demo_grpo.shown(tmp_path, grpo_lines([0.1, 0.9], difference=1e-7)).problem
    assert problem is not None and "differ by 1e-07" in problem


def test_samples_of_the_last_rollout_are_shown(tmp_path: Path) -> None:
    rows = [
        {"step": step, "prompt": f"{step}?", "completion": "4", "reward": 1.0} for step in (1, 2, 2)
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert demo_grpo.samples(path) == [("2?", "4\n\nreward 1")] * 2
    assert demo_grpo.samples(tmp_path / "none.jsonl") == []


def test_the_runs_of_the_stages_are_configurations_that_load(tmp_path: Path) -> None:
    setting = Setting(root=tmp_path, model="smollm2", seconds=7.0, quick=True, options=None)
    config = grpo.load(None, demo_grpo.overrides(setting, "model", tmp_path / "run"))
    assert config.loop.seconds == 7.0 and config.eval_prompts == 100 and config.group_size == 8
    student = distill.load(None, [*demo_distill.SHAPE, "--model=new", "--teacher=x"])
    assert student.student.width == 256 and student.student.tied and student.method == "full"


def stage(name: str, run: Any) -> Stage:
    return Stage(name=name, title=f"The {name} <part>", run=run, training=1.0, quick=1.0)


def test_a_stage_that_fails_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path | None] = []

    def first(setting: Setting) -> Part:
        (setting.folder("first") / "model").mkdir()
        return Part(record={"x": 1}, facts=[("a", "b")], curves={"c": [("", [(0, 1), (1, 2)])]})

    def second(setting: Setting) -> Part:
        raise KeyError("no such thing")

    def third(setting: Setting) -> Part:
        seen.append(setting.found("second/model", "first/model"))
        return Part(samples=[("<b>?", "1 < 2")], tables=[("t", ["h"], [["<cell>"]])])

    def worse(setting: Setting) -> Part:
        return Part(problem="it fell")

    parts = {"first": first, "second": second, "third": third, "worse": worse}
    monkeypatch.setattr(demo, "STAGES", tuple(stage(n, run) for n, run in parts.items()))
    machine = {"self_test": [], "processor": "p", "cores": 2, "isa": "x", "accelerators": [],
               "memory_bytes": 1e9, "versions": {"torch": "2"}}  # fmt: skip
    monkeypatch.setattr(demo.doctor, "examine", lambda: machine)
    monkeypatch.setattr(demo.doctor, "show", lambda report, short: None)
    assert demo.run(["--out", str(tmp_path), "--parts", "first,second,third"]) == 1
    printed = capsys.readouterr()
    assert "FAILED: KeyError: 'no such thing'" in printed.out and "Traceback" in printed.err
    assert seen == [tmp_path / "first" / "model"]
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["first"]["x"] == 1 and record["first"]["problem"] is None
    assert "no such thing" in record["second"]["problem"]
    page = (tmp_path / "report.html").read_text()
    assert "The third &lt;part&gt;" in page and "1 &lt; 2" in page and "&lt;cell&gt;" in page
    assert page.count("<polyline") == 1 and "failed: KeyError" in page and "<b>?" not in page
    assert demo.run(["--out", str(tmp_path), "--parts", "first,third"]) == 0
    assert demo.run(["--out", str(tmp_path), "--parts", "worse"]) == 1

    (tmp_path / "worse" / "mine.txt").touch()
    assert demo.run(["--out", str(tmp_path), "--parts", "worse"]) == 1  # its own folder is emptied
    assert not (tmp_path / "worse" / "mine.txt").exists()
    other = tmp_path / "other"
    (other / "first").mkdir(parents=True)
    assert demo.run(["--out", str(other), "--parts", "first"]) == 0  # an empty one will do
    (other / "third").mkdir()
    (other / "third" / "mine.txt").touch()
    with pytest.raises(ValueError, match="third is there and the demo has not made it"):
        demo.run(["--out", str(other), "--parts", "first,third"])
    assert (other / "third" / "mine.txt").exists()

    def stopped(setting: Setting) -> Part:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "STAGES", (stage("stopped", stopped),))
    with pytest.raises(KeyboardInterrupt):
        demo.run(["--out", str(tmp_path), "--parts", "stopped"])


def test_the_dialogues_of_the_demo_train_and_hold_out(tmp_path: Path) -> None:
    config = configuration(tmp_path, "smollm2", 5.0)
    train = [c.messages[0]["content"] for c in read_conversations(config.data)]
    held = [c.messages[0]["content"] for c in read_conversations([config.holdout])]
    assert len(train) == 600 and len(held) == 32 and not set(train) & set(held)
    assert config.loop.seconds == 5.0 and config.samples == 32

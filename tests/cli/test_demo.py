"""The demo's own pieces: what it trains on, what it compares with, how it draws."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fastllm.cli import demo, demo_pretrain
from fastllm.cli.demo_sft import configuration, score
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.train.config import save_config
from fastllm.train.data.conversations import read_conversations
from fastllm.train.data.store_writer import Vocabulary, write_store
from fastllm.train.presets import active_parameters, model_config
from fastllm.train.pretrain import load
from fastllm.train.sft import Answer


def test_parts_are_chosen_by_name() -> None:
    assert demo.chosen_parts("answers,speed,pretrain,sft") == list(demo.PARTS)
    assert demo.chosen_parts("sft, answers") == ["answers", "sft"]
    assert demo.chosen_parts("speed,sft", quick=True) == ["sft"]
    with pytest.raises(ValueError, match="--parts names 'train'; there are answers, speed"):
        demo.chosen_parts("answers,train")


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


def test_the_dialogues_of_the_demo_train_and_hold_out(tmp_path: Path) -> None:
    config = configuration(tmp_path, "smollm2", 5.0)
    train = [c.messages[0]["content"] for c in read_conversations(config.data)]
    held = [c.messages[0]["content"] for c in read_conversations([config.holdout])]
    assert len(train) == 600 and len(held) == 32 and not set(train) & set(held)
    assert config.loop.seconds == 5.0 and config.samples == 32

"""Distillation of logits: losses against plain formulas, runs, stored teachers, vocabularies."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllm.cli import distill as cli
from fastllm.errors import CheckpointError, DataError, ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights
from fastllm.quantize.packed import PackedWeight, quantize_weight, unpack
from fastllm.train import distill
from fastllm.train.checkpoint import Checkpoint
from fastllm.train.data.examples import micro_batches
from fastllm.train.data.masks import Example
from fastllm.train.distill import DistillConfig, DistillResult, StoreResult
from fastllm.train.distillation.data import read_store, read_texts
from fastllm.train.distillation.storing import top_k_of
from fastllm.train.distillation.task import DistillTask, LossConfig
from fastllm.train.distillation.teacher import LiveTeacher, TeacherConfig
from fastllm.train.distillation.top_k import TopKStore
from fastllm.train.distillation.vocabulary import narrowed, shared_vocabulary
from fastllm.train.loop import LoopConfig

QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false"]
Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


def model_directory(path: Path, tokenizer: Tokenizer, seed: int, **sizes: Any) -> Path:
    """Two layers of random float32 weights, with peaks in what they predict."""
    wanted: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    config = ModelConfig(
        model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=64,
        dtype=torch.float32, eos_token_ids=(0,), **wanted | sizes,
    )  # fmt: skip
    model = initialize(config, dtype=torch.float32, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    save_pretrained(model, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def pair(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(student, teacher): over one vocabulary of single bytes."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = Tokenizer.from_hf(tiny.tokenizer)
    teacher = model_directory(folder / "teacher", tokenizer, 1, hidden_size=48)
    return model_directory(folder / "student", tokenizer, 2), teacher


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    records = [
        {"prompt": f"{a}+{b}?", "completion": f"{a + b}"} for a in range(4) for b in range(3)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def words(pair: Pair, data: Path, out: Path, *more: str) -> list[str]:
    return [f"--model={pair[0]}", f"--data={data}", f"--teacher={pair[1]}", f"--out={out}",
            "--method=full", "--chat_template=plain", "--seq_len=32", *QUIET, *more]  # fmt: skip


def run(pair: Pair, data: Path, out: Path, *more: str) -> Any:
    config = distill.load(None, words(pair, data, out, *more))
    return distill.main(config, say=lambda line: None)


def task_of(pair: Pair, losses: LossConfig, teacher: Any = None) -> tuple[DistillTask, Any]:
    """A task in float32, and its teacher."""
    source = open_weights(pair[0])
    tokenizer = Tokenizer.from_hf(pair[0])
    teacher = teacher or LiveTeacher(TeacherConfig(model=str(pair[1])), "cpu")
    shared = shared_vocabulary(tokenizer, teacher.tokenizer, source.config.vocab_size, teacher.rows)
    config = DistillConfig(model=str(pair[0]), method="full", loop=LoopConfig(seed=1))
    task = DistillTask(config, source, tokenizer, teacher, losses, shared,
                       lr=1e-3, end_ids=[0], template=None)  # fmt: skip
    return task, teacher


def plain_loss(z: Tensor, q: Tensor, targets: Tensor, losses: LossConfig) -> Tensor:
    """The definition, from whole logits `[R, V]` in float64."""
    logp = torch.log_softmax(z / losses.temperature, 1)
    logq = torch.log_softmax(q / losses.temperature, 1)
    p, q = logp.exp(), logq.exp()
    if losses.divergence == "forward":
        divergence = (q * (logq - logp)).sum()
    elif losses.divergence == "reverse":
        divergence = (p * (logp - logq)).sum()
    else:
        beta = losses.beta
        m = torch.log(beta * q + (1 - beta) * p)
        divergence = beta * (q * (logq - m)).sum() + (1 - beta) * (p * (logp - m)).sum()
    entropy = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    return losses.alpha * losses.temperature**2 * divergence + (1 - losses.alpha) * entropy


@pytest.mark.parametrize(
    "losses",
    [
        LossConfig(),
        LossConfig(divergence="reverse", temperature=2.0, alpha=0.7),
        LossConfig(divergence="js", beta=0.2, temperature=0.5, alpha=0.3),
        LossConfig(alpha=0.0),
    ],
    ids=lambda losses: f"{losses.divergence} {losses.alpha}",
)
def test_loss_and_gradients_are_those_of_the_plain_float64_formula(
    pair: Pair, tiny: Any, losses: LossConfig
) -> None:
    task, teacher = task_of(pair, losses)
    data = read_store(str(tiny.store), task.tokenizer, 32)
    (micro,) = micro_batches(data.train, [0, 1, 2], 200)
    task.set_data(iter(()), data.train, (), 200)  # type: ignore[arg-type]
    loss = task.loss(micro)
    loss.backward()
    parameters = dict(task.decoder.named_parameters())
    ours = {name: p.grad.double() for name, p in parameters.items()}
    task.optimizer.zero_grad(set_to_none=True)
    rows = micro.targets != -100
    head = task.decoder.lm_head.weight
    z = task.decoder.train_hidden(micro.documents)[rows].double() @ head.double().T
    q = teacher.decoder.logits(teacher.hidden(micro)).double()
    expected = plain_loss(z, q, micro.targets[rows], losses)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for name, p in parameters.items():
        assert (ours[name] - p.grad).norm() <= 2e-5 * p.grad.norm() + 1e-6, name


def test_a_student_comes_nearer_to_its_teacher_than_one_that_learns_the_text_alone(
    pair: Pair, tiny: Any, tmp_path: Path
) -> None:
    options = ["--epochs=4", "--batch_size=8", "--lr=1e-2"]
    drawn = run(pair, tiny.store, tmp_path / "drawn", *options)
    alone = run(pair, tiny.store, tmp_path / "alone", *options, "--alpha=0")
    assert drawn.before == alone.before and drawn.run.step == alone.run.step
    assert drawn.after[0] < 0.7 * alone.after[0]
    assert drawn.output == tmp_path / "drawn" / "model"
    load_model(drawn.output)
    lines = [json.loads(x) for x in (tmp_path / "drawn/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_kl"] == pytest.approx(drawn.after[0])
    assert all("divergence" in line for line in lines if "loss" in line)


def test_all_ids_stored_teach_as_the_live_teacher_does(
    pair: Pair, tiny: Any, tmp_path: Path
) -> None:
    options = ["--epochs=1", "--batch_size=8", "--lr=5e-3", "--loop.metrics.every=1"]
    stored = run(pair, tiny.store, tmp_path / "store", "--store_top_k=257")
    assert isinstance(stored, StoreResult)
    live = run(pair, tiny.store, tmp_path / "live", *options)
    from_store = run((pair[0], stored.output), tiny.store, tmp_path / "stored", *options)
    assert from_store.after == pytest.approx(live.after, rel=1e-4)
    few = run((Path("new"), pair[1]), tiny.store, tmp_path / "few", "--store_top_k=16")
    assert not (few.output / "start").exists()
    assert (few.output / "shard-00000.safetensors").stat().st_mode & 0o777 == (
        (few.output / "top_k.json").stat().st_mode & 0o777
    )
    approximated = run((pair[0], few.output), tiny.store, tmp_path / "16", *options)
    assert approximated.after[0] < approximated.before[0]
    made = run((Path("new"), few.output), tiny.store, tmp_path / "new", *options, "--depth=1",
               "--student.width=32", "--student.head_dim=16", "--dtype=float32")  # fmt: skip
    assert made.after[0] < made.before[0]
    assert open_weights(made.output).config.max_position_embeddings == 32


def test_stored_rows_are_the_teachers_likeliest_ids_in_the_order_of_the_examples(
    pair: Pair, tiny: Any, tmp_path: Path
) -> None:
    stored = run(pair, tiny.store, tmp_path / "store", "--store_top_k=5", "--temperature=2")
    store = TopKStore.open(stored.output)
    store.verify()
    teacher = LiveTeacher(TeacherConfig(model=str(pair[1])), "cpu")
    data = read_store(str(tiny.store), teacher.tokenizer, 32)
    examples = [data.train[7], data.held_out[0], data.train[3]]
    ids, logprobs = store.rows(examples)
    at = 0
    for example in examples:
        (micro,) = micro_batches([example], [0], 100)
        logits = teacher.decoder.logits(teacher.hidden(micro)).double() / 2
        expected = torch.log_softmax(logits, 1).topk(5, dim=1)
        rows = len(expected.indices)
        assert (ids[at : at + rows] == expected.indices).float().mean() > 0.99  # ties aside
        torch.testing.assert_close(
            logprobs[at : at + rows].double(), expected.values, rtol=0, atol=1e-5
        )
        at += rows
    assert at == len(ids)


def test_a_store_that_was_interrupted_goes_on_after_its_last_whole_shard(
    pair: Pair, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastllm.train.distillation import storing, top_k

    monkeypatch.setattr(top_k, "SHARD_ROWS", 500)
    whole = run(pair, tiny.store, tmp_path / "whole", "--store_top_k=4")
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return top_k_of(*args)

    monkeypatch.setattr(storing, "top_k_of", failing)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tiny.store, tmp_path / "parts", "--store_top_k=4")
    with pytest.raises(DataError, match="not complete"):
        run((pair[0], tmp_path / "parts"), tiny.store, tmp_path / "none")
    with pytest.raises(DataError, match=r"k: is 4, this run would store 5"):
        run(pair, tiny.store, tmp_path / "parts", "--store_top_k=5")
    calls = 3
    run(pair, tiny.store, tmp_path / "parts", "--store_top_k=4")
    shards = sorted(whole.output.glob("*.safetensors"))
    assert len(shards) > 3 and calls == 3 + len(shards) - 2
    for file in shards:
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((whole.output / "top_k.json").read_text()) == json.loads(
        (tmp_path / "parts/top_k.json").read_text()
    )


def test_damaged_and_foreign_stores_are_refused(pair: Pair, tiny: Any, tmp_path: Path) -> None:
    stored = run(pair, tiny.store, tmp_path / "store", "--store_top_k=4").output
    shard = stored / "shard-00000.safetensors"
    with pytest.raises(DataError, match=r"examples are not in .*--seq-len"):
        run((pair[0], stored), tiny.store, tmp_path / "a", "--seq_len=31")
    with pytest.raises(ValueError, match="temperature 2 is not that of the stored"):
        run((pair[0], stored), tiny.store, tmp_path / "a", "--temperature=2")
    with pytest.raises(ValueError, match=r"takes no teacher\.quant"):
        run((pair[0], stored), tiny.store, tmp_path / "a", "--teacher_quant=nf4")
    with pytest.raises(ValueError, match="is a store already"):
        run((pair[0], stored), tiny.store, tmp_path / "a", "--store_top_k=2")
    for damage, match in [
        (lambda: shard.write_bytes(shard.read_bytes()[:-1]), "torn"),
        (lambda: shard.write_bytes(b"x" * shard.stat().st_size), "not a shard"),
        (shard.unlink, "does not exist"),
        (lambda: (stored / "top_k.json").write_text("{}"), "format: is not"),
        (lambda: (stored / "top_k.json").write_text("nothing"), "not valid JSON"),
    ]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(stored, copy)
        damage()
        with pytest.raises(DataError, match=match):
            TopKStore.open(stored)
        shutil.rmtree(stored)
        shutil.copytree(copy, stored)


def test_a_run_killed_with_9_resumes_with_the_same_bits(
    pair: Pair, tiny: Any, runner: Any, tmp_path: Path
) -> None:
    options = ["--epochs=2", "--batch_size=12", "--lr=1e-3", "--loop.save_every=3", "--alpha=0.5",
               "--loop.metrics.every=1", "--loop.eval_every=4", "--resume=auto"]  # fmt: skip

    def argv(out: Path) -> list[str]:
        return ["distill", *words(pair, tiny.store, out, *options), "--config", str(empty)]

    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert runner.run(argv(tmp_path / "whole")) == 0, runner.log.read_text()
    out = tmp_path / "run"
    status = runner.stop_when(argv(out), out / "metrics.jsonl", lambda text: text.count("\n") > 4)
    assert status in (-signal.SIGKILL, 0)
    assert runner.run(argv(out)) == 0, runner.log.read_text()
    found = [dict(json.loads(x)) for x in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    for record in (*found, *wanted):
        for timed in ("seconds", "tokens_per_second", "mfu"):
            record.pop(timed, None)
    assert found == wanted
    one, other = (d / "model/model.safetensors" for d in (out, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_recomputed_activations_change_no_bit_and_a_saved_configuration_goes_on(
    pair: Pair, tiny: Any, tmp_path: Path
) -> None:
    options = ["--epochs=1", "--batch_size=16", "--lr=1e-3", "--alpha=0.5", "--divergence=js"]
    plain = run(pair, tiny.store, tmp_path / "plain", *options)
    again = run(pair, tiny.store, tmp_path / "again", *options, "--checkpointing")
    one, other = (r.output / "model.safetensors" for r in (plain, again))
    assert one.read_bytes() == other.read_bytes()
    config = distill.load(tmp_path / "plain" / "config.yaml", ["--resume=auto"])
    resumed = distill.main(config, say=lambda line: None)
    assert isinstance(resumed, DistillResult) and resumed.before is None
    assert resumed.after == plain.after


@pytest.mark.full
def test_two_processes_learn_what_one_does(
    pair: Pair, tiny: Any, runner: Any, tmp_path: Path
) -> None:
    options = ["--epochs=1", "--batch_size=8", "--lr=1e-3", "--alpha=0.5", "--loop.save_every=0",
               "--loop.metrics.every=1", "--micro_tokens=64", "--dtype=float32"]  # fmt: skip
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    for count in (1, 2):
        argv = words(pair, tiny.store, tmp_path / str(count), *options)
        status = runner.run(["distill", "--config", str(empty), *argv], processes=count)
        assert status == 0, runner.log.read_text()
    one, two = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("1", "2")
    )
    names = ("loss", "norm", "tokens", "divergence", "cross_entropy", "eval_kl", "eval_loss")
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        assert {n: mine[n] for n in names if n in mine} == pytest.approx(
            {n: theirs[n] for n in names if n in theirs}, rel=1e-4
        )


@pytest.mark.full
def test_a_student_of_a_trained_teacher_is_nearer_to_it_than_by_the_text(
    tiny: Any, tmp_path: Path
) -> None:
    from fastllm.train import pretrain

    words_of_teacher = tiny.words(
        tmp_path / "teacher", "loop.steps=120", "loop.save_every=0", "data.batch_tokens=512",
        "loop.metrics.progress=none",
    )  # fmt: skip
    pretrain.main(pretrain.load(None, words_of_teacher))
    teacher = next((tmp_path / "teacher/checkpoints").glob("step-*"))
    after = {}
    for alpha in ("1", "0"):
        argv = ["--model=new", f"--data={tiny.store}", f"--teacher={teacher}", "--depth=1",
                f"--out={tmp_path / alpha}", "--student.width=32", "--student.head_dim=16",
                f"--alpha={alpha}", "--epochs=4", "--batch_size=8", "--lr=1e-2",
                *QUIET]  # fmt: skip
        result = distill.main(distill.load(None, argv), say=lambda line: None)
        assert isinstance(result, DistillResult) and result.after is not None
        after[alpha] = result.after[0]
    assert after["1"] < 0.7 * after["0"], after


def test_an_adapter_learns_from_a_quantized_teacher_and_conversations(
    pair: Pair, chats: Path, tmp_path: Path
) -> None:
    result = run(
        pair, chats, tmp_path / "run", "--method=lora", "--teacher_quant=nf4", "--lr=1e-2",
        "--divergence=reverse", "--epochs=30", "--loop.metrics.every=1", "--holdout=0.2",
    )  # fmt: skip
    assert isinstance(result, DistillResult) and result.output.name == "adapter"
    assert result.before is not None and result.after is not None
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    divergences = [line["divergence"] for line in lines if "divergence" in line]
    assert divergences[-1] < 0.7 * divergences[0]


def test_texts_teach_a_new_student_of_the_teachers_vocabulary(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    argv = ["new", str(text), "--teacher", str(pair[1]), "--out", str(tmp_path / "run"), *QUIET,
            "--depth=1", "--student.width=32", "--student.head_dim=16", "--steps=4",
            "--seq_len=40", "--dtype=float32"]  # fmt: skip
    assert cli.run(argv) == 0
    assert "finished after 4 steps" in capsys.readouterr().out
    made = open_weights(tmp_path / "run/model").config
    assert (made.vocab_size, made.hidden_size, made.max_position_embeddings) == (257, 32, 64)
    assert Tokenizer.from_hf(tmp_path / "run/model").fingerprint == (
        Tokenizer.from_hf(pair[1]).fingerprint
    )
    assert Checkpoint(sorted((tmp_path / "run/checkpoints").iterdir())[-1]).problem() is None
    begin = (tmp_path / "run/start/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds a run already"):
        cli.run([*argv, "--seed=7"])
    assert (tmp_path / "run/start/model.safetensors").read_bytes() == begin
    with pytest.raises(ValueError, match="a new student needs full"):
        distill.main(replace(distill.load(None, words(pair, text, tmp_path / "b")),
                             model="new", method="lora"))  # fmt: skip


def test_pieces_of_texts_and_of_their_store_are_the_same(tiny: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_hf(tiny.tokenizer)
    store = read_store(str(tiny.store), tokenizer, 16)
    texts = [tokenizer.decode(store.train.store.document(d).tolist()) for d in range(60)]  # type: ignore[attr-defined]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read = read_texts([str(file)], tokenizer, 16, "none", 0)
    assert len(read.train) == len(store.train) > 60
    for mine, theirs in zip(read.train, store.train, strict=True):
        assert mine.ids.tolist() == theirs.ids.tolist() and len(mine.ids) <= 17
        assert mine.trained.tolist() == theirs.trained.tolist()
    held = read_texts([str(file)], tokenizer, 16, "0.1", 0)
    assert len(held.train) + len(held.held_out) == len(read.train) and len(held.held_out) > 5


# vocabularies


def renamed(tokenizer: Tokenizer, changes: dict[str, str]) -> Tokenizer:
    """The same with other spellings of some tokens."""
    import tokenizers

    parts = json.loads(tokenizer.to_json())
    vocabulary = parts["model"]["vocab"]
    parts["model"]["vocab"] = {changes.get(name, name): i for name, i in vocabulary.items()}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)),
                     special_tokens=tokenizer.special_tokens)  # fmt: skip


def test_padded_heads_over_one_tokenizer_share_its_ids(
    pair: Pair, tiny: Any, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_hf(tiny.tokenizer)
    wide = model_directory(tmp_path / "wide", tokenizer, 1, hidden_size=48, vocab_size=300)
    result = run((pair[0], wide), tiny.store, tmp_path / "run", "--epochs=1", "--lr=5e-3")
    assert result.after[0] < result.before[0]
    stored = run((wide, pair[1]), tiny.store, tmp_path / "store", "--store_top_k=8")
    assert TopKStore.open(stored.output).vocab_size == 257
    task, teacher = task_of((pair[0], wide), LossConfig())
    data = read_store(str(tiny.store), tokenizer, 32)
    (micro,) = micro_batches(data.train, [0], 64)
    task.set_data(iter(()), data.train, (), 64)  # type: ignore[arg-type]
    z = task.decoder.logits(task.decoder.train_hidden(micro.documents)).double()
    q = teacher.decoder.logits(teacher.hidden(micro))[:, :257].double()
    expected = plain_loss(z, q, micro.targets, LossConfig())
    torch.testing.assert_close(task.loss(micro).double(), expected, rtol=1e-5, atol=1e-5)


def test_ids_that_mean_other_tokens_are_named(pair: Pair, tiny: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_hf(tiny.tokenizer)
    other = renamed(tokenizer, {"a": "b", "b": "a"})
    with pytest.raises(
        ValueError, match=r"2 of 257 ids mean different tokens.*'a' for the student.*mode sequences"
    ):
        shared_vocabulary(tokenizer, other, 257, 257)
    strange = model_directory(tmp_path / "strange", other, 3)
    with pytest.raises(ValueError, match="different vocabularies"):
        run((pair[0], strange), tiny.store, tmp_path / "run")


def test_added_tokens_of_one_alone_are_noted(tiny: Any) -> None:
    tokenizer = Tokenizer.from_hf(tiny.tokenizer)
    more = Tokenizer.from_hf(tiny.tokenizer)
    more._backend.add_tokens(["<think>"])
    shared = shared_vocabulary(tokenizer, more, 264, 264)
    assert shared.size == 264
    assert shared.notes == (
        "1 ids are a token for one of both alone: 257 is None for the student and '<think>' for "
        "the teacher",
    )
    assert shared_vocabulary(tokenizer, tokenizer, 264, 264).notes == ()


@pytest.mark.parametrize("format", ["bf16", "f32", "q4_0", "q8_0", "q4_k", "nf4", "int8"])
@pytest.mark.parametrize("size", [32, 37])
def test_narrowed_heads_hold_the_first_rows(format: str, size: int) -> None:
    weight = torch.randn(70, 256, generator=torch.Generator().manual_seed(0))
    packed = quantize_weight(weight, format)
    cut = narrowed(packed, size)
    assert isinstance(cut, PackedWeight) and cut.n == size
    assert torch.equal(unpack(cut), unpack(packed)[:size])
    assert narrowed(packed, 70) is packed
    assert torch.equal(narrowed(weight, size), weight[:size])  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["f32", "bf16", "q4_0", "q6_k", "nf4"])
def test_divergences_over_a_narrowed_packed_head_are_those_over_its_rows(format: str) -> None:
    from fastllm.ops.linear_kl import linear_kl

    g = torch.Generator().manual_seed(0)
    weight, student = torch.randn(70, 256, generator=g), torch.randn(37, 64, generator=g)
    x, tx = torch.randn(5, 64, generator=g), torch.randn(5, 256, generator=g)
    if format == "bf16":
        tx = tx.bfloat16()
    mode = "bf16" if format == "bf16" else "fp32"
    packed = quantize_weight(weight, format)
    cut = narrowed(packed, 37)
    found = linear_kl(x, student, tx, cut, teacher_activation=mode)
    p = torch.log_softmax(x.double() @ student.double().T, 1)
    q = torch.log_softmax(tx.double() @ unpack(packed)[:37].double().T, 1)
    torch.testing.assert_close(found.double(), (q.exp() * (q - p)).sum(1), rtol=1e-4, atol=1e-4)


# bad input


def test_what_cannot_be_distilled_is_named_before_it_runs(
    pair: Pair, tiny: Any, chats: Path, tmp_path: Path
) -> None:
    student = str(pair[0])
    with pytest.raises(ValueError, match=r"teacher\.model is not given"):
        distill.main(distill.load(None, [f"--model={student}", f"--data={tiny.store}"]))
    with pytest.raises(ValueError, match="data is empty"):
        distill.main(distill.load(None, [f"--model={student}", f"--teacher={pair[1]}"]))
    with pytest.raises(ValueError, match="data must be of one kind"):
        run(pair, f"{tiny.store},{chats}", tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        run(pair, Path("nowhere.jsonl"), tmp_path / "a")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        run(pair, empty, tmp_path / "a")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records"):
        run(pair, tmp_path / "empty.jsonl", tmp_path / "a")
    for field, value in [("alpha", 1.5), ("temperature", 0), ("beta", 1), ("divergence", "kl")]:
        with pytest.raises(ValueError, match=field):
            run(pair, tiny.store, tmp_path / "a", f"--{field}={value}")
    with pytest.raises(ValueError, match="store_top_k must be from 1 to 257, got 300"):
        run(pair, tiny.store, tmp_path / "a", "--store_top_k=300")
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_a_teacher_without_a_tokenizer_is_refused(pair: Pair, tiny: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pair[1], bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match="A teacher needs its tokenizer"):
        run((pair[0], bare), tiny.store, tmp_path / "run")


def test_a_store_of_tokens_of_another_tokenizer_is_refused(
    pair: Pair, tiny: Any, tmp_path: Path
) -> None:
    tokenizer = renamed(Tokenizer.from_hf(tiny.tokenizer), {"a": "b", "b": "a"})
    student = model_directory(tmp_path / "student", tokenizer, 1)
    with pytest.raises(DataError, match="another tokenizer than the student's"):
        run((student, student), tiny.store, tmp_path / "run")


def test_a_place_without_a_target_has_no_loss_but_a_gradient(pair: Pair) -> None:
    task, _ = task_of(pair, LossConfig())
    example = Example(ids=np.array([1, 2], np.int32), trained=np.zeros(2, bool), place="none")
    task.set_data(iter(()), [example], (), 8)  # type: ignore[arg-type]
    (micro,) = micro_batches([example], [0], 8)
    loss = task.loss(micro)
    loss.backward()
    assert loss.item() == 0.0
    assert all(
        p.grad is not None
        for p in task.decoder.parameters()
        if p is not task.decoder.lm_head.weight
    )

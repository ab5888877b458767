"""Preference optimization: losses against plain formulas and TRL, runs that learn and resume."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllm import LLM
from fastllm.cli import dpo as cli
from fastllm.errors import CheckpointError, DataError
from fastllm.models.config import ModelConfig
from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.train import dpo
from fastllm.train.data.examples import ExampleBatches
from fastllm.train.data.masks import PLAIN, ConversationEncoder
from fastllm.train.data.rankings import parse_ranking
from fastllm.train.dpo import DpoConfig
from fastllm.train.loop import LoopConfig
from fastllm.train.preference.loss import PreferenceConfig, measures, preference_loss
from fastllm.train.preference.pairs import encode_pairs, pair_batches, pair_micro
from fastllm.train.preference.task import REFERENCE, DpoTask

RECORDS = [
    {"prompt": f"Is {a} a {kind}?", "chosen": "Yes, it is.", "rejected": "No."}
    for kind, members in [("color", ("red", "blue", "green")), ("animal", ("cat", "dog", "cow"))]
    for a in members
] + [
    {"prompt": "Greet me twice.", "answers": ["Hello. Hello.", "Hello.", "Go."], "ranks": [1, 2, 2]}
]
QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false"]
KINDS = [
    PreferenceConfig(),
    PreferenceConfig(beta=0.5, label_smoothing=0.2),
    PreferenceConfig(beta=0.3, normalize=True),
    PreferenceConfig(kind="ipo", beta=0.2),
    PreferenceConfig(kind="hinge", beta=0.4),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: two layers of random float32 weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("dpo") / "base"
    texts = [str(value) for record in RECORDS for value in record.values()]
    tokenizer = train_tokenizer(texts * 2, 330, allow_smaller=True)
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=16,
        rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=True,
        dtype=torch.float32, eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
    )  # fmt: skip
    save_pretrained(initialize(config, dtype=torch.float32, seed=1), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return file


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [f"--model={base}", f"--data={data}", f"--out={out}", "--chat_template=plain",
            "--batch_size=4", *QUIET, *more]  # fmt: skip


def run(base: Path, data: Path, out: Path, *more: str) -> dpo.DpoResult:
    config = dpo.load(None, words(base, data, out, *more))
    return dpo.main(config, say=lambda line: None)


def encoder_of(base: Path) -> ConversationEncoder:
    from fastllm.models.tokenizer import Tokenizer

    return ConversationEncoder(Tokenizer.from_hf(base), PLAIN)


def task_of(base: Path, losses: PreferenceConfig, **config: Any) -> DpoTask:
    """A task in float32 whose reference is computed and whose weights have then moved."""
    encoder = encoder_of(base)
    pairs, _ = encode_pairs([parse_ranking(r) for r in RECORDS], encoder, 64)
    tune = DpoConfig(model=str(base), loop=LoopConfig(seed=1), **config)
    task = DpoTask(tune, open_weights(base), encoder, losses, lr=1e-3)
    batches = ExampleBatches(pairs, batch_size=4, micro_tokens=256, cut=pair_batches,
                             hash_of=lambda pairs: "pairs")  # fmt: skip
    task.set_data(batches, pairs, (), 256)
    return task


def moved(task: DpoTask, folder: Path) -> DpoTask:
    """With its reference, and other weights."""
    task.set_reference(folder, lambda line: None, resumed=False)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in task.decoder.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    task.weights_changed()
    return task


def plain_logps(task: DpoTask, examples: Any) -> Tensor:
    """Sums of log-probabilities of each example's learned tokens, from whole float64 logits."""
    sums = []
    for example in examples:
        micro = pair_micro(task._train, [0])
        ids = torch.from_numpy(example.ids)
        documents = type(micro.documents).pack([ids[:-1]])
        head = task.decoder._head()
        assert isinstance(head, Tensor)
        z = task.decoder.train_hidden(documents).double() @ head.double().T
        chosen = torch.log_softmax(z, 1).gather(1, ids[1:, None].long())[:, 0]
        sums.append(chosen[torch.from_numpy(example.trained[1:])].sum())
    return torch.stack(sums)


def formula(delta: Tensor, losses: PreferenceConfig) -> Tensor:
    """Written out another way."""
    if losses.kind == "ipo":
        return (delta - 0.5 / losses.beta) ** 2
    if losses.kind == "hinge":
        return (1 - losses.beta * delta).clamp(min=0)
    s, b = losses.label_smoothing, losses.beta * delta
    return (1 - s) * torch.log1p(torch.exp(-b)) + s * torch.log1p(torch.exp(b))


@pytest.mark.parametrize(
    "losses", KINDS, ids=lambda k: f"{k.kind} {k.label_smoothing} {k.normalize}"
)
def test_losses_are_those_of_the_formula(losses: PreferenceConfig) -> None:
    g = torch.Generator().manual_seed(0)
    logps = (10 * torch.randn(7, 2, generator=g, dtype=torch.float64)).requires_grad_()
    reference = 10 * torch.randn(7, 2, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 9, (7, 2), generator=g).double()
    mean = losses.normalize or losses.kind == "ipo"
    ratios = (logps - reference) / (lengths if mean else 1)
    expected = formula(ratios[:, 0] - ratios[:, 1], losses)
    found = preference_loss(logps, reference, lengths, losses)
    torch.testing.assert_close(found, expected)
    (mine,) = torch.autograd.grad(found.sum(), logps, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), logps)
    torch.testing.assert_close(mine, theirs)


def test_losses_and_gradients_stay_finite_far_from_the_reference() -> None:
    logps = torch.tensor([[0.0, -1e5], [-1e5, 0.0]], dtype=torch.float64, requires_grad=True)
    losses = preference_loss(logps, torch.zeros(2, 2), torch.ones(2, 2), PreferenceConfig())
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.tolist() == [0.0, pytest.approx(1e4)]
    assert torch.isfinite(gradient).all() and gradient[1, 0] == pytest.approx(-0.1)


def test_an_untrained_model_has_log_two_and_rewards_of_zero(base: Path, tmp_path: Path) -> None:
    for method in ("full", "lora"):
        task = task_of(base, PreferenceConfig(), method=method)
        task.set_reference(tmp_path, lambda line: None, resumed=False)
        (micro,) = next(task.batches)
        assert task.loss(micro).item() == pytest.approx(4 * math.log(2), abs=1e-12)
        task.after_update()
        numbers = task.numbers(whole=False)
        assert numbers["rewards/margins"] == numbers["rewards/accuracies"] == 0.0
        assert numbers["logps/chosen"] < -1


@pytest.mark.parametrize("losses", KINDS[::2], ids=lambda k: k.kind)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_has_the_loss_and_gradient_of_whole_logits(
    base: Path, tmp_path: Path, losses: PreferenceConfig, method: str
) -> None:
    task = task_of(base, losses, method=method)
    start = task_of(base, losses, method=method)
    moved(task, tmp_path)
    micro = pair_micro(task._train, [6, 0, 3])
    loss = task.loss(micro)
    loss.backward()
    trained = {n: p for n, p in task.decoder.named_parameters() if p.requires_grad}
    ours = {name: p.grad.double() for name, p in trained.items()}
    task.optimizer.zero_grad(set_to_none=True)
    pairs = [task._train[i] for i in (6, 0, 3)]
    examples = [e for pair in pairs for e in (pair.chosen, pair.rejected)]
    logps = plain_logps(task, examples).reshape(-1, 2)
    with torch.no_grad():
        reference = plain_logps(start, examples).reshape(-1, 2)
    lengths = torch.tensor([pair.lengths for pair in pairs]).double()
    expected = preference_loss(logps, reference, lengths, losses).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, p in trained.items():
        assert (ours[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, name
    task.after_update()
    numbers = task.numbers(whole=False)
    rewards = losses.beta * (logps - reference).detach()
    assert numbers["rewards/chosen"] == pytest.approx(rewards[:, 0].mean().item(), abs=1e-4)
    assert numbers["rewards/margins"] == pytest.approx(
        (rewards[:, 0] - rewards[:, 1]).mean().item(), abs=1e-4
    )
    assert numbers["rewards/accuracies"] == (rewards[:, 0] > rewards[:, 1]).double().mean()


def test_equal_rewards_count_as_wrong() -> None:
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -3.0]])
    found = measures(logps, torch.zeros(2, 2), 0.5)
    assert found["rewards/accuracies"] == 1 and found["rewards/chosen"] == -2.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "sigmoid_norm"])
def test_loss_and_metrics_are_trls(base: Path, tmp_path: Path, kind: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    name = "sigmoid" if kind == "sigmoid_norm" else kind
    losses = PreferenceConfig(kind=name, beta=0.3, normalize=kind == "sigmoid_norm")  # type: ignore[arg-type]
    task = moved(task_of(base, losses, method="full"), tmp_path)
    policy = tmp_path / "policy"
    task.save(policy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, loss_type=[kind], report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=6,
        max_length=64, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (policy, base)
    )
    trainer = trl.DPOTrainer(
        model=model, ref_model=reference, args=arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(RECORDS[:6]),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids"][batch["attention_mask"].bool()]
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch).item()
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    micro = pair_micro(task._train, list(range(6)))
    shared = sum(pair.shared for pair in task._train[:6])  # ours are there once
    assert len(ids) == len(micro.documents.ids) + shared + 12  # and end before the last token
    ours = task.loss(micro).item() / 6
    assert ours == pytest.approx(theirs, abs=1e-4)
    task.after_update()
    for measure, value in task.numbers(whole=False).items():
        assert value == pytest.approx(logged[measure], abs=1e-3), measure


def test_runs_learn_to_prefer_and_leave_what_generates(
    base: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--epochs=30", "--lr=3e-3", f"--holdout={data}", "--loop.metrics.every=1"]
    for method, output in (("full", "model"), ("lora", "adapter")):
        result = run(base, data, tmp_path / method, *options, f"--method={method}")
        assert result.before is not None and result.after is not None
        assert result.before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert result.after["eval_loss"] < 0.2
        assert result.after["eval_rewards/accuracies"] == 1.0
        assert result.output == tmp_path / method / output
    llm = LLM(base, adapter=tmp_path / "lora" / "adapter")
    assert llm.generate("Is red a color?")[0].outputs[0].token_ids
    lines = [json.loads(x) for x in (tmp_path / "lora/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_rewards/margins"] > 1 and "rewards/chosen" in lines[0]


def test_a_quantized_base_is_its_own_reference(base: Path, data: Path, tmp_path: Path) -> None:
    result = run(base, data, tmp_path / "run", "--quant=nf4", "--epochs=8", "--lr=1e-2",
                 f"--holdout={data}")  # fmt: skip
    assert result.before is not None and result.after is not None
    assert result.before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.after["eval_loss"] < 0.5


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.full)])
def test_a_run_killed_with_9_resumes_with_the_same_bits(
    base: Path, data: Path, tmp_path: Path, runner: Any, method: str
) -> None:
    options = ["--epochs=8", "--lr=1e-3", f"--method={method}", "--loop.save_every=2",
               "--lora.dropout=0.1", "--loop.metrics.every=1", "--resume=auto"]  # fmt: skip
    empty = tmp_path / "empty.yaml"
    empty.write_text("")

    def argv(out: Path) -> list[str]:
        return ["dpo", *words(base, data, out, *options), "--config", str(empty)]

    assert runner.run(argv(tmp_path / "whole")) == 0, runner.log.read_text()
    out = tmp_path / "run"
    status = runner.stop_when(argv(out), out / "metrics.jsonl", lambda text: text.count("\n") > 5)
    assert status in (-signal.SIGKILL, 0)
    assert runner.run(argv(out)) == 0, runner.log.read_text()
    found, wanted = (
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "whole")
    )
    for record in (*found, *wanted):
        for timed in ("seconds", "tokens_per_second", "mfu"):
            record.pop(timed, None)
    assert found == wanted
    last = f"checkpoints/step-{found[-1]['step']:06d}"
    for file in sorted((tmp_path / "whole" / last).rglob("*.safetensors")):
        one, other = load_file(file), load_file(out / file.relative_to(tmp_path / "whole"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_recomputed_activations_change_no_bit_and_a_saved_configuration_goes_on(
    base: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--epochs=2", "--lr=1e-3", "--method=full", f"--holdout={data}"]
    plain = run(base, data, tmp_path / "plain", *options)
    again = run(base, data, tmp_path / "again", *options, "--checkpointing")
    one, other = (load_file(r.output / "model.safetensors") for r in (plain, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = dpo.load(tmp_path / "plain" / "config.yaml", ["--resume=auto"])
    resumed = dpo.main(config, say=lambda line: None)
    assert resumed.before is None and resumed.after == plain.after


@pytest.mark.full
def test_two_processes_learn_what_one_does(
    base: Path, data: Path, tmp_path: Path, runner: Any
) -> None:
    options = ["--epochs=2", "--lr=1e-3", "--method=full", "--loop.metrics.every=1",
               f"--holdout={data}", "--micro_tokens=40"]  # fmt: skip
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    for count in (1, 2):
        argv = ["dpo", "--config", str(empty), *words(base, data, tmp_path / str(count), *options)]
        assert runner.run(argv, processes=count) == 0, runner.log.read_text()
    one, two = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("1", "2")
    )
    for mine, theirs in zip(one, two, strict=True):
        for timed in ("seconds", "tokens_per_second", "mfu"):
            mine.pop(timed, None), theirs.pop(timed, None)
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_resumed_run_reads_its_reference_and_none_of_other_data(
    base: Path, data: Path, tmp_path: Path
) -> None:
    task = task_of(base, PreferenceConfig())
    said: list[str] = []
    task.set_reference(tmp_path, said.append, resumed=False)
    file = tmp_path / "reference.safetensors"
    values = load_file(file)
    assert values["train"].shape == (len(task._train), 2)
    task.set_reference(tmp_path, said.append, resumed=True)
    assert len(said) == 1
    save_file(values, file, metadata={"data": "other"})
    task.set_reference(tmp_path, said.append, resumed=True)
    file.write_bytes(file.read_bytes()[:50])
    task.set_reference(tmp_path, said.append, resumed=True)
    assert len(said) == 3 and torch.equal(load_file(file)["train"], values["train"])


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_computed(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(base, data, tmp_path / "run", "--steps=1")
    before = (tmp_path / "run" / REFERENCE).read_bytes()
    monkeypatch.delattr(DpoTask, "answer_logps")
    with pytest.raises(CheckpointError, match="holds a run already"):
        run(base, data, tmp_path / "run", "--seed=2")
    assert (tmp_path / "run" / REFERENCE).read_bytes() == before


def test_packing_and_micro_batches_change_no_loss(base: Path, tmp_path: Path) -> None:
    task = moved(task_of(base, PreferenceConfig(), method="full"), tmp_path)
    chosen = list(range(len(task._train)))
    whole = task.loss(pair_micro(task._train, chosen)).item()
    parts = [task.loss(m).item() for m in pair_batches(task._train, chosen, 40)]
    assert len(parts) > 2 and sum(parts) == pytest.approx(whole, rel=1e-9)
    idle = list(pair_batches(task._train, [0], 64, rank=1, world=2))
    assert len(idle) == 1 and idle[0].tokens == 0
    loss = task.loss(idle[0])
    loss.backward()
    assert loss.item() == 0.0


# data


def test_what_a_pair_begins_with_is_read_once_with_the_same_bits(base: Path) -> None:
    task = task_of(base, PreferenceConfig(), method="full")
    tokenizer = task.tokenizer
    pairs = [pair for pair in task._train if pair.chosen.ids[0] == pair.rejected.ids[0]]
    for pair in pairs:
        prompt = tokenizer.decode(pair.chosen.ids[: pair.shared].tolist())
        assert prompt.endswith(("?", ".")) and pair.rejected.trained[pair.shared :].all()
    micro = pair_micro(pairs, range(len(pairs)))
    whole = sum(len(e.ids) - 1 for pair in pairs for e in (pair.chosen, pair.rejected))
    assert len(micro.documents.ids) == sum(pair.places for pair in pairs) < 0.8 * whole
    with torch.no_grad():
        found = task._logps(micro)
        for row, pair in zip(found, pairs, strict=True):
            for sum_, example in zip(row, (pair.chosen, pair.rejected), strict=True):
                targets = torch.from_numpy(example.targets()[:-1])
                alone = Documents.pack([torch.from_numpy(example.ids[:-1])])
                logp, _ = task.decoder.log_probs(alone, targets)
                assert logp[pair.shared - 1 :].double().sum() == sum_


def test_every_two_answers_of_different_rank_are_a_pair(base: Path) -> None:
    pairs, counts = encode_pairs([parse_ranking(r) for r in RECORDS], encoder_of(base), 64)
    assert len(pairs) == counts.kept == 8
    tokenizer = encoder_of(base).tokenizer
    said = [tokenizer.decode(p.chosen.ids[p.chosen.trained].tolist()) for p in pairs]
    assert said == ["Yes, it is."] * 6 + ["Hello. Hello."] * 2
    assert all(pair.chosen.trained[-1] and pair.lengths[0] > 1 for pair in pairs)


def test_the_end_of_an_answer_that_was_cut_is_not_learned(base: Path) -> None:
    record = {"prompt": "Go.", "answers": ["Yes, it is", "No."], "ranks": [1, 2]}
    cut = {**record, "truncated": [True, False]}
    ((whole,), _), ((short,), _) = (
        encode_pairs([parse_ranking(each)], encoder_of(base), 64) for each in (record, cut)
    )
    assert short.chosen.ids.tolist() == whole.chosen.ids[:-1].tolist()
    assert short.lengths == (whole.lengths[0] - 1, whole.lengths[1])
    assert short.rejected.ids.tolist() == whole.rejected.ids.tolist()
    nothing = {**cut, "answers": ["", "No."]}
    with pytest.raises(DataError, match=r"answers\[0\].*is empty and was cut"):
        encode_pairs([parse_ranking(nothing)], encoder_of(base), 64)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected: is missing|rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"no pair is left \(0 rankings are tied"),
        ({"prompt": "a", "answers": ["b", "c"], "ranks": [1, 1]}, "1 rankings are tied"),
        ({"prompt": "a" * 300, "chosen": "b", "rejected": "c"}, "1 too long for 64 tokens"),
        ({"text": "a"}, "that is no ranking"),
    ],
)
def test_data_without_pairs_is_named(
    base: Path, tmp_path: Path, record: dict[str, Any], match: str
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=match):
        run(base, file, tmp_path / "run")


def test_options_that_do_not_fit_are_named(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data is empty"):
        dpo.main(dpo.load(None, [f"--model={base}"]))
    for option, match in [
        ("--beta=0", r"loss\.beta must be above 0"),
        ("--label_smoothing=0.5", r"label_smoothing must be from 0 to below 0\.5"),
        ("--seq_len=1", "seq_len must be at least 2"),
        ("--seq_len=100", "beyond the model's context of 64"),
        ("--loss.kind=dpo", r"loss\.kind must be one of"),
        ("--holdout=some", "holdout must be"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(base, data, tmp_path / "run", option)
    with pytest.raises(ValueError, match="label_smoothing is for kind sigmoid"):
        run(base, data, tmp_path / "run", "--loss.kind=ipo", "--label_smoothing=0.1")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records"):
        run(base, tmp_path / "none.jsonl", tmp_path / "run")


def test_the_command_trains_and_says_how_held_out_pairs_are_ordered(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(base), str(data), *words(base, data, tmp_path / "run", "--steps=2")[2:]]
    assert cli.run([*argv, f"--holdout={data}"]) == 0
    out = capsys.readouterr().out
    assert "rewards/accuracies" in out and "finished after 2 steps" in out
    assert cli.run(["--help"]) == 0
    assert "--loss.label_smoothing" in capsys.readouterr().out

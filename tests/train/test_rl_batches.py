"""Rollouts, buffers and the policy's task: what they give does not depend on how they are cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import LLM
from fastllm.engine.sequence import Request
from fastllm.models.loader import read_tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.testing.quantized_models import directory
from fastllm.testing.small_models import model_of
from fastllm.train.data.prompts import EncodedPrompt, PromptRecord
from fastllm.train.rl.algorithms import PRESETS, Algorithm
from fastllm.train.rl.batches import RlBatches, Sample, micro_batches, stretches
from fastllm.train.rl.groups import GroupCollector
from fastllm.train.rl.metrics import RlMetrics, SampleFile
from fastllm.train.rl.policy_task import PolicyTask, log_probs
from fastllm.train.rl.rollout import PromptStream, Rollouts, Trajectory
from fastllm.train.task import NothingToLearn, StepAbandoned
from fastllm.train.tune_config import TuneConfig


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


def made_up(groups: list[list[int]], seed: int = 0) -> list[Sample]:
    """Samples of random tokens: for each group the lengths of its completions."""
    g = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 90, (count,), generator=g).tolist()

    samples = []
    for number, lengths in enumerate(groups):
        prompt = ids(3 + 2 * number)
        for length in lengths:
            samples.append(
                Sample(
                    prompt_ids=prompt,
                    completion_ids=ids(length),
                    old=(-4 * torch.rand(length, generator=g)).tolist(),
                    advantages=[float(torch.randn((), generator=g))] * length,
                    group=number,
                    extra={"reference": (-4 * torch.rand(length, generator=g)).tolist()},
                )
            )
    return samples


SAMPLES = made_up([[4, 1, 6], [2, 2], [9], [3, 5, 1, 1]])


# rollouts


def prompts_of(*lengths: int) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(tuple(range(n)), PromptRecord(prompt=f"{n} ids", columns={"answer": str(n)}))
        for n in lengths
    ]


def rollouts_of(**options: Any) -> Rollouts:
    llm = LLM.from_model(model_of("llama", torch.bfloat16), max_model_len=96, **options)
    return Rollouts(llm, group_size=3, temperature=0.8, max_completion=7, seed=5)


@pytest.fixture
def textless(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models have no tokenizer."""
    from fastllm.train.rl import rollout

    monkeypatch.setattr(
        rollout,
        "SamplingParams",
        lambda **fields: rollout_params(**fields | {"detokenize": False, "ignore_eos": True}),
    )


def rollout_params(**fields: Any) -> Any:
    from fastllm.engine.request import SamplingParams

    return SamplingParams(**fields)


@pytest.mark.usefixtures("textless")
def test_completions_do_not_depend_on_what_is_sampled_with_them() -> None:
    prompts = prompts_of(4, 70, 9, 66)
    together = rollouts_of(max_num_seqs=12)(prompts, [0, 1, 2, 3])
    assert [t.group for t in together] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(t.completion_ids) for t in together}) == 12
    alone = rollouts_of(max_num_seqs=2, num_pages=4)
    for number in (3, 0, 2, 1):
        for mine, theirs in zip(
            alone([prompts[number]], [number]), together[3 * number :], strict=False
        ):
            assert mine.completion_ids == theirs.completion_ids
            assert mine.sampled_logprobs == theirs.sampled_logprobs
    assert {t.text for t in together} == {""}
    opened = [replace(prompt, opens_thoughts=True) for prompt in prompts]
    assert {t.text for t in rollouts_of()(opened, [0, 1, 2, 3])} == {"<think>\n"}
    other = rollouts_of(max_num_seqs=12)(prompts, [4, 5, 6, 7])
    assert [t.completion_ids for t in other] != [t.completion_ids for t in together]


@pytest.mark.usefixtures("textless")
def test_a_rollout_that_is_asked_to_stop_ends_between_two_tokens() -> None:
    rollouts = rollouts_of()
    asked = iter([False, False, True])
    rollouts.stopping = lambda: next(asked)
    with pytest.raises(StepAbandoned):
        rollouts(prompts_of(4, 9), [0, 1])
    rollouts.stopping = lambda: False
    assert [t.sampled_logprobs for t in rollouts(prompts_of(4, 9), [0, 1])] == [
        t.sampled_logprobs for t in rollouts_of()(prompts_of(4, 9), [0, 1])
    ]


@pytest.mark.usefixtures("textless")
def test_a_rollout_makes_each_output_once_not_at_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    original = Request.output

    def counted(self: Request) -> Any:
        made.append(self.request_id)
        return original(self)

    monkeypatch.setattr(Request, "output", counted)
    rollouts = rollouts_of()
    rollouts.stopping = lambda: False
    assert len(rollouts(prompts_of(4, 9), [0, 1])) == 6
    assert len(made) == len(set(made)) == 2


def test_a_stream_takes_every_prompt_once_an_epoch_in_another_order() -> None:
    prompts = prompts_of(*range(1, 8))
    stream = PromptStream(prompts, seed=3)
    epochs = [[len(stream[7 * e + i].ids) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(stream[3].ids) == epochs[0][3]  # back again
    with pytest.raises(ValueError, match="no prompt"):
        PromptStream([], 0)


def test_greedy_completions_are_no_policy() -> None:
    llm = LLM.from_model(model_of("llama", torch.bfloat16), max_model_len=32)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Rollouts(llm, group_size=2, temperature=0.0, max_completion=3)


class Sampled:
    """Rollouts that are there already."""

    seed = 0

    def __init__(self, trajectories: list[Trajectory]) -> None:
        self.trajectories = trajectories
        self.group_size = len(trajectories)

    def __call__(self, *args: Any) -> list[Trajectory]:
        return self.trajectories


def collector_of(
    rewards: Tensor, finish_reason: str = "stop", **fields: Any
) -> tuple[GroupCollector, list[str]]:
    """A collector whose rollouts are one group with these rewards [N, F], and what it says."""
    said: list[str] = []
    trajectories = [
        Trajectory(
            prompt_ids=[1], completion_ids=[2, 3], sampled_logprobs=[-1.0, -2.0], text="",
            finish_reason=finish_reason, group=0, record=PromptRecord(prompt="one"),
        )
    ] * len(rewards)  # fmt: skip
    options: dict[str, Any] = {
        "names": [f"reward {i}" for i in range(rewards.shape[1])],
        "weights": [1.0] * rewards.shape[1],
        "algorithm": Algorithm(scale="none"),
        "metrics": RlMetrics(),
    }
    collector = GroupCollector(
        PromptStream(prompts_of(1), 0),
        Sampled(trajectories),  # type: ignore[arg-type]
        lambda found: rewards,
        prompts=1,
        reference=None,
        say=said.append,
        **options | fields,
    )
    return collector, said


def test_a_group_of_equal_rewards_is_equal_whatever_they_are_weighed_with() -> None:
    """A product of a matrix of five columns rounds its rows differently."""
    g = torch.Generator().manual_seed(0)
    for count in (2, 7, 13, 64):
        rewards = torch.rand(5, generator=g).repeat(count, 1)
        collector, _ = collector_of(rewards, weights=torch.rand(5, generator=g).tolist())
        samples = collector(1)
        assert collector.metrics.numbers()["frac_reward_zero_std"] == 1
        assert all(sample.advantages == [0.0, 0.0] for sample in samples)


def test_completions_without_an_end_are_warned_of_once_unless_they_train_nothing() -> None:
    rewards = torch.tensor([[0.0], [1.0]])
    collector, said = collector_of(rewards, "length")
    for step in (1, 2):
        collector(step)
    assert len(said) == 1 and "100% of a rollout's completions were cut" in said[0]
    assert "mask_truncated" in said[0]
    collector, said = collector_of(rewards)
    collector(1)
    assert not said
    masked = Algorithm(mask_truncated=True)
    collector, said = collector_of(rewards, "length", algorithm=masked)
    with pytest.raises(NothingToLearn):
        collector(1)
    assert not any("were cut" in line for line in said)


# the buffer


class Rollout:
    """A collector that counts."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, step: int) -> list[Sample]:
        self.made += 1
        return made_up([[4, 1, 6], [2, 2], [9], [3, 5, 1, 1]], seed=self.made)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def batches_of(**options: Any) -> RlBatches:
    fields = {"mini_batches": 3, "epochs": 2, "micro_tokens": 16, "aggregation": "sequence"}
    return RlBatches(Rollout(), longest=9, seed=1, **fields | options)


def seen(step: list[Any]) -> list[tuple[Any, ...]]:
    """What a step trains on."""
    parts = []
    for m in step:
        for ids, old, weights in zip(
            m.targets.split(m.lengths.tolist()), m.old.split(m.lengths.tolist()),
            m.weights.split(m.lengths.tolist()), strict=True,
        ):  # fmt: skip
            parts.append((ids.tolist(), old.tolist(), weights.tolist(), m.fresh))
    return sorted(parts)


def test_every_epoch_trains_on_every_sample_once_and_only_the_first_step_is_fresh() -> None:
    batches = batches_of()
    everything = sorted(
        s.completion_ids for s in made_up([[4, 1, 6], [2, 2], [9], [3, 5, 1, 1]], 1)
    )
    steps = [next(batches) for _ in range(6)]
    orders = []
    for epoch in (steps[:3], steps[3:]):
        found = [part[0] for step in epoch for part in seen(step)]
        assert sorted(found) == everything
        orders.append(found)
    assert orders[0] != orders[1]
    assert [{m.fresh for m in step} for step in steps] == [{True}] + [{False}] * 5
    next(batches)
    assert batches.collect.made == 2


def test_a_state_taken_after_any_step_goes_on_the_same() -> None:
    straight = batches_of()
    wanted = [seen(next(straight)) for _ in range(14)]
    for stop in range(13):
        first = batches_of()
        for _ in range(stop):
            next(first)
        second = batches_of()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [seen(next(second)) for _ in range(14 - stop)] == wanted[stop:]


def test_fewer_samples_than_mini_batches_make_fewer_steps() -> None:
    batches = batches_of(mini_batches=99, epochs=1)
    for _ in range(10):
        assert sum(len(m.lengths) for m in next(batches)) == 1
    next(batches)
    assert batches.collect.made == 2


@pytest.mark.parametrize("micro_tokens", [1, 9, 16, 1000])
def test_micro_batches_hold_every_token_once_and_prompts_once_where_they_fit(
    micro_tokens: int,
) -> None:
    micros = micro_batches(SAMPLES, micro_tokens, aggregation="token", longest=9, fresh=True)
    found = sorted(ids for m in micros for ids, *_ in seen([m]))
    assert found == sorted(s.completion_ids for s in SAMPLES)
    for m in micros:
        assert m.tokens == len(m.targets) == int(m.lengths.sum()) == len(m.extra["reference"])
        assert len(m.documents.ids) <= max(micro_tokens, 3 + 2 * 3 + 9)
    rows = sum(len(m.documents.ids) for m in micros)
    whole = sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in SAMPLES)
    shared = whole - sum(n * k for n, k in ((3, 2), (5, 1), (9, 3)))
    assert shared <= rows <= whole
    if micro_tokens >= 16:
        assert rows == shared


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_samples_without_advantage_are_left_out_and_change_nothing(aggregation: str) -> None:
    samples = [
        replace(s, advantages=[0.0] * len(s.advantages)) if s.group in (0, 2) else s
        for s in SAMPLES
    ]

    def loss(skip: bool) -> float:
        """As the loop makes it, of -A old."""
        micros = micro_batches(
            samples, 16, aggregation=aggregation, longest=9, fresh=False, skip=skip
        )
        total = sum(float((m.weights.double() * -m.advantages * m.old).sum()) for m in micros)
        return total / sum(m.tokens for m in micros)

    assert loss(True) == pytest.approx(loss(False), rel=1e-6)
    flat = [replace(s, advantages=[0.0] * len(s.advantages)) for s in SAMPLES]
    micros = micro_batches(flat, 16, aggregation=aggregation, longest=9, fresh=False, skip=True)
    assert sum(m.tokens for m in micros) == sum(len(s.completion_ids) for s in SAMPLES)


def test_stretches_keep_the_order() -> None:
    for most in (1, 9, 30, 1000):
        parts = list(stretches(SAMPLES, most))
        assert [s for part in parts for s in part] == SAMPLES
    assert len(parts) == 1


# the task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(["one two three"] * 2, 290, allow_smaller=True)
    folder = tmp_path_factory.mktemp("model")
    return directory("llama", folder / "m", tokenizer, vocab_size=tokenizer.vocab_size)


def task_of(model: Path, algorithm: Algorithm, **fields: Any) -> PolicyTask:
    source = open_weights(model)
    config = TuneConfig(model=str(model), **{"method": "full", "dtype": "float32"} | fields)
    return PolicyTask(
        config, source, read_tokenizer(source), algorithm, temperature=0.7, lr=1e-3, end_ids=[],
        template=None,
    )  # fmt: skip


def plain_step(task: PolicyTask, samples: list[Sample]) -> Tensor:
    """The papers' objective, sample by sample, each a document of its own, for autograd."""
    algorithm, parts, tokens = task.algorithm, [], 0
    for s in samples:
        ids = [*s.prompt_ids, *s.completion_ids]
        x = task.decoder.train_hidden(Documents.pack([ids[:-1]]))[len(s.prompt_ids) - 1 :]
        logits = (x.float() @ task.decoder.lm_head.weight.float().T).double() / task.temperature
        chosen = torch.tensor(s.completion_ids)
        logp = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        old, reference = (torch.tensor(v).double() for v in (s.old, s.extra["reference"]))
        a = s.advantages[0]
        delta = logp - old
        r = delta.exp() if algorithm.ratio == "token" else delta.mean().exp().expand(len(delta))
        low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
        loss = -torch.minimum(r * a, r.clamp(low, high) * a)
        loss = loss + algorithm.beta * ((reference - logp).exp() - (reference - logp) - 1)
        parts.append({"sequence": loss.mean(), "token": loss.sum(), "constant": loss.sum() / 9}[
            algorithm.aggregation
        ])  # fmt: skip
        tokens += len(delta)
    total = torch.stack(parts)
    return total.sum() / tokens if algorithm.aggregation == "token" else total.mean()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_a_steps_gradient_is_autograds_of_the_plain_objective_however_it_is_cut(
    name: str, model: Path
) -> None:
    algorithm = PRESETS[name]
    if name == "gspo":
        algorithm = replace(algorithm, clip_low=0.05, clip_high=0.1)
    algorithm = replace(algorithm, beta=0.1)
    task = task_of(model, algorithm)
    old = log_probs(task.decoder, SAMPLES, 0.7, 1000)
    g = torch.Generator().manual_seed(7)
    samples = [
        replace(s, old=(torch.tensor(o) + 0.3 * torch.randn(len(o), generator=g)).tolist())
        for s, o in zip(SAMPLES, old, strict=True)
    ]
    parameters = dict(task.decoder.named_parameters())
    plain_step(task, samples).backward()
    wanted = {n: p.grad.clone() for n, p in parameters.items()}
    for micro_tokens in (8, 1000):
        task.decoder.zero_grad()
        micros = micro_batches(
            samples, micro_tokens, aggregation=algorithm.aggregation, longest=9, fresh=False
        )
        tokens = sum(m.tokens for m in micros)
        for micro in micros:
            (task.loss(micro) / tokens).backward()
        for n, p in parameters.items():
            scale = float(wanted[n].abs().max())
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-3, atol=2e-5 * scale)
    numbers = task.numbers(whole=False)
    assert numbers["clip_ratio/region_mean"] > 0 and numbers["kl"] > 0


def test_the_reference_is_the_first_policy_with_an_adapter_or_without(model: Path) -> None:
    full = task_of(model, PRESETS["grpo"], dtype="bfloat16")
    lora = task_of(model, PRESETS["grpo"], dtype="bfloat16", method="lora")
    first = log_probs(full.decoder, SAMPLES, 0.7, 20)
    assert full.reference_log_probs(SAMPLES) == first == lora.reference_log_probs(SAMPLES)
    for task in (full, lora):
        for micro in micro_batches(SAMPLES, 99, aggregation="token", longest=9, fresh=False):
            task.loss(micro).backward()
        task.optimizer.step(grad_scale=torch.tensor(1.0))
        task.weights_changed()
        assert log_probs(task.decoder, SAMPLES, 0.7, 1000) != first
        assert task.reference_log_probs(SAMPLES) == first


# numbers


def test_numbers_are_means_ends_and_seconds_of_the_steps_since_the_last_line() -> None:
    metrics = RlMetrics()
    for value, weight in ((1.0, 1.0), (torch.tensor(4.0), 3.0)):
        metrics.mean("a", value, weight)
        metrics.smallest("low", value)
        metrics.largest("high", value)
    with metrics.phase("rollout"):
        pass
    for _ in range(2):
        metrics.update_begins()
        metrics.update_ends()
    numbers = metrics.numbers()
    assert (numbers["a"], numbers["low"], numbers["high"]) == (3.25, 1.0, 4.0)
    assert numbers["seconds/rollout"] > 0 and numbers["seconds/update"] > 0
    assert "a" not in metrics.numbers()
    metrics.largest("high", torch.tensor(1.0))
    metrics.largest("high", torch.tensor(float("nan")))
    metrics.largest("high", torch.tensor(2.0))
    assert metrics.numbers()["high"] != metrics.numbers().get("high")


def test_the_error_of_the_mean_reward_counts_prompts_not_their_samples() -> None:
    metrics = RlMetrics()
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0])
    metrics.rewards(rewards[:, None], ["one"], rewards, [True, True, False])
    numbers = metrics.numbers()
    assert numbers["reward"] == 0.5
    assert numbers["reward_stderr"] == pytest.approx(0.5 / 3**0.5)
    metrics.rewards(rewards[:4, None], ["one"], rewards[:4], [True])
    assert metrics.numbers()["reward_stderr"] == 0


def test_a_sample_file_forgets_what_a_lost_course_has_left(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        SampleFile(tmp_path / "s.jsonl").write(step, [{"text": f"{step}"}])
    again = SampleFile(tmp_path / "s.jsonl")
    again.write(2, [{"text": "2 again"}])
    again.write(3, [{"text": "3 again"}])
    texts = [json.loads(line)["text"] for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert texts == ["1", "2 again", "3 again"]

"""PPO's formulas: GAE, whitening, value loss and KL control against plain Python in doubles."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllm.models.scorer import Scorer
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters
from fastllm.testing.quantized_models import directory
from fastllm.testing.small_models import model_of, random_documents
from fastllm.train.rl.critic import share_base, value_loss
from fastllm.train.rl.gae import gae, whiten
from fastllm.train.rl.kl_control import KlControl

LENGTHS = (5, 1, 9, 2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


def numbers(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float, last: float
) -> list[float]:
    """The definition: the weighted sum of all later temporal differences, term by term."""
    following = [*values[1:], last]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    count = len(deltas)
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_is_its_definition(gamma: float, lam: float, bootstrap: bool) -> None:
    total = sum(LENGTHS)
    rewards, values, last = numbers(total, 1), numbers(total, 2), numbers(len(LENGTHS), 3)
    advantages, returns = gae(
        rewards, values, torch.tensor(LENGTHS), gamma, lam, last if bootstrap else None
    )
    expected: list[float] = []
    for r, v, end in zip(rewards.split(LENGTHS), values.split(LENGTHS), last, strict=True):
        behind = float(end) if bootstrap else 0.0
        expected += plain_gae(r.tolist(), v.tolist(), gamma, lam, behind)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, wanted.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(returns, (wanted + values).float(), rtol=1e-6, atol=1e-7)


def test_with_lambda_1_the_return_is_the_discounted_sum_of_rewards() -> None:
    rewards, values = numbers(6, 1), numbers(6, 2)
    _, returns = gae(rewards, values, torch.tensor([6]), 0.9, 1.0)
    expected = [sum(0.9 ** (k - t) * float(rewards[k]) for k in range(t, 6)) for t in range(6)]
    torch.testing.assert_close(returns, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_samples_do_not_see_each_other() -> None:
    rewards, values = numbers(8, 1), numbers(8, 2)
    together, _ = gae(rewards, values, torch.tensor([3, 5]))
    alone = [gae(r, v, torch.tensor([len(r)]))[0] for r, v in zip(
        rewards.split([3, 5]), values.split([3, 5]), strict=True)]  # fmt: skip
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.1}, "gamma must be from 0 to 1"),
        ({"lam": -0.1}, "lam must be from 0 to 1"),
        ({"lengths": torch.tensor([3, 0])}, "lengths"),
        ({"lengths": torch.tensor([2])}, r"rewards must be \[2\]"),
        ({"values": torch.zeros(2)}, r"values must be \[3\]"),
    ],
)
def test_wrong_arguments_of_gae_are_named(change: dict[str, object], message: str) -> None:
    right = {"rewards": torch.zeros(3), "values": torch.zeros(3), "lengths": torch.tensor([3])}
    with pytest.raises(ValueError, match=message):
        gae(**{**right, **change})  # type: ignore[arg-type]


def test_whitening_is_its_formula() -> None:
    x = numbers(11, 4) * 3 + 5
    mean = sum(x.tolist()) / 11
    variance = sum((v - mean) ** 2 for v in x.tolist()) / 10
    expected = [(v - mean) / math.sqrt(variance + 1e-8) for v in x.tolist()]
    torch.testing.assert_close(whiten(x), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        whiten(x, shift=False), torch.tensor([v + mean for v in expected]), rtol=1e-6, atol=1e-6
    )
    assert whiten(torch.tensor([7.0])).tolist() == [0.0]
    assert whiten(torch.full((4,), 2.0)).tolist() == [0.0] * 4


@pytest.mark.parametrize("clip", [0.2, 1.0, None])
def test_the_value_loss_is_its_formula_and_so_is_its_gradient(clip: float | None) -> None:
    values, old, returns = (numbers(12, seed) for seed in (1, 2, 3))
    expected, cut = [], []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        expected.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
        cut.append((near - r) ** 2 > (v - r) ** 2)
    loss, clipped = value_loss(values, old, returns, clip)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    assert clipped.tolist() == cut and (clip != 0.2 or any(cut))
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, clip)[0], (values,))


def test_the_kl_coefficient_follows_its_target_and_a_fixed_one_stays() -> None:
    control = KlControl(0.1, target=6.0, horizon=100)
    control.update(6.6, 10)  # 10% too much: 0.1 * 10 / 100 of it more
    assert control.coefficient == pytest.approx(0.1 * 1.01)
    control.update(60.0, 10)  # 900% too much counts as 20%
    assert control.coefficient == pytest.approx(0.1 * 1.01 * 1.02)
    control.update(0.0, 50)
    assert control.coefficient == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)
    again = KlControl(0.1, target=6.0, horizon=100)
    again.load_state_dict(control.state_dict())
    assert again.coefficient == control.coefficient
    fixed = KlControl(0.05)
    fixed.update(100.0, 1000)
    assert fixed.coefficient == 0.05
    fixed.load_state_dict({"coefficient": 3.0})
    assert fixed.coefficient == 0.05  # a resumed run may choose another one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), "coefficient must be a number from 0"),
        ((0.1, 0.0), "target must be above 0"),
        ((0.1, 6.0, 0.0), "horizon must be above 0"),
        ((0.0, 6.0), "cannot be adapted"),
    ],
)
def test_wrong_arguments_of_the_control_are_named(arguments: tuple[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KlControl(*arguments)


def test_a_critic_on_the_policys_base_shares_its_tensors_and_nothing_of_its_adapter() -> None:
    actor = model_of("qwen3 tied", torch.bfloat16)
    config = LoraConfig(r=4, target_modules="all-linear")
    add_lora(actor, config)
    documents = Documents.pack(random_documents([7, 12], seed=1))
    with torch.no_grad():
        before = actor.train_hidden(documents)
    decoder = share_base(actor)
    add_lora(decoder, config, seed=1)
    base = {n: p for n, p in actor.named_parameters() if ".lora_" not in n}
    mine = dict(decoder.named_parameters())
    assert all(mine[name] is p for name, p in base.items())
    own = {n: p for n, p in mine.items() if n not in base}
    assert set(own) == {*lora_parameters(decoder), "score.weight"}
    assert all(p.requires_grad for p in own.values())
    assert {id(p) for p in own.values()}.isdisjoint(map(id, actor.parameters()))
    critic = Scorer(decoder)
    with torch.no_grad():
        assert torch.equal(critic.scores(documents), torch.zeros(19))  # a new head
        for p in own.values():
            p.normal_(0, 0.1)
        assert critic.scores(documents).std() > 0
        assert torch.equal(actor.train_hidden(documents), before)
        assert not torch.equal(decoder.train_hidden(documents), before)
    critic.scores(documents).sum().backward()
    assert all(p.grad is None for p in actor.parameters())
    assert all(p.grad is not None for p in own.values())


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_a_critic_on_a_quantized_base_shares_the_packs(case: str, tmp_path: Path) -> None:
    source = open_weights(directory(case, tmp_path / case))
    actor = load_trainable(source, quantization="q8_0")
    add_lora(actor, LoraConfig(r=4, target_modules="all-linear"))
    decoder = share_base(actor)
    shared = {t.data_ptr() for t in actor.served_tensors()}
    extra = [t for t in decoder.served_tensors() if t.data_ptr() not in shared]
    assert [tuple(t.shape) for t in extra] == [(1, actor.config.hidden_size)]
    documents = Documents.pack(random_documents([7, 12], seed=1))
    with torch.no_grad():
        assert torch.equal(decoder.train_hidden(documents), actor.train_hidden(documents))

"""Advantages, policy losses, KL estimators and weights against their formulas in float64."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.train.rl.advantages import EPS, equal_groups, group_advantages, kept
from fastllm.train.rl.algorithms import PRESETS, Algorithm
from fastllm.train.rl.objective import (
    kl_estimate,
    log_ratios,
    policy_loss,
    token_weights,
)

LENGTHS = [3, 1, 5, 2]
REWARDS = [1.0, 0.0, 0.5, 1.0, 0.25, 0.25, 0.25, 2.0, -1.0, 0.0]
GROUPS = [7, 7, 7, 7, 3, 3, 3, 9, 9, 9]


def tokens(seed: int = 0, spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, old, advantages) of LENGTHS' tokens, float64; ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    old = -3 * torch.rand(count, generator=g, dtype=torch.float64)
    logp = old + spread * torch.randn(count, generator=g, dtype=torch.float64)
    advantages = torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)
    return logp, old, advantages.repeat_interleave(torch.tensor(LENGTHS))


def plain_advantages(scale: str, leave_one_out: bool) -> list[float]:
    """By Python's own arithmetic, sample by sample."""

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    found = []
    for i, (reward, group) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        mine = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        others = [
            r for j, (r, g) in enumerate(zip(REWARDS, GROUPS, strict=True)) if g == group and j != i
        ]
        base = sum(others) / len(others) if leave_one_out else sum(mine) / len(mine)
        divisor = {"none": 1.0, "group": deviation(mine) + EPS, "batch": deviation(REWARDS) + EPS}
        found.append((reward - base) / divisor[scale])
    return found


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_their_formula(scale: str, leave_one_out: bool) -> None:
    got = group_advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), scale, leave_one_out)
    wanted = torch.tensor(plain_advantages(scale, leave_one_out), dtype=torch.float64)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_advantage_0_exactly(scale: str) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    rewards, groups = torch.tensor([0.1, 0.1, 0.1, 5.0, 6.0]), torch.tensor([0, 0, 0, 1, 1])
    assert group_advantages(rewards, groups, scale)[:3].tolist() == [0.0, 0.0, 0.0]
    assert equal_groups(rewards, groups).tolist() == [True, True, True, False, False]
    same = group_advantages(torch.full((4,), 0.3), torch.tensor([0, 0, 1, 1]), scale)
    assert same.tolist() == [0.0] * 4


def test_a_group_of_one_has_advantage_0_and_a_warning() -> None:
    rewards, groups = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([5, 6, 6])
    for leave_one_out in (False, True):
        with pytest.warns(UserWarning, match="groups of one sample"):
            got = group_advantages(rewards, groups, leave_one_out=leave_one_out)
        assert got[0] == 0.0 and got[1] == -got[2] > 0


def test_rewards_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        group_advantages(torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="must be \\[N\\]"):
        group_advantages(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="scale must be"):
        group_advantages(torch.zeros(2), torch.zeros(2), "std")


def test_kept_are_the_samples_from_the_threshold_on() -> None:
    assert kept(torch.tensor([0.0, 0.5, 1.0, 2.0]), 0.5).tolist() == [0.0, 1.0, 1.0, 1.0]


@given(
    rewards=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12),
    shift=st.floats(-10, 10, width=32),
)
@settings(max_examples=50, deadline=None)
def test_advantages_sum_to_0_and_do_not_see_a_shift(rewards: list[float], shift: float) -> None:
    values, groups = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards))
    for scale in ("group", "none"):
        got = group_advantages(values, groups, scale)
        size = float(values.abs().max()) + abs(shift) + 1
        torch.testing.assert_close(got.sum(), torch.tensor(0.0), atol=1e-4 * size, rtol=0)
        moved = group_advantages(values + shift, groups, scale)
        if float(values.max() - values.min()) > 1e-3:
            torch.testing.assert_close(got, moved, atol=1e-4, rtol=1e-4)


def plain_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, ratio: str, low: float, high: float
) -> Tensor:
    """Token by token, as the papers write it."""
    parts = []
    for lp, ol, a in zip(
        logp.split(LENGTHS), old.split(LENGTHS), advantages.split(LENGTHS), strict=True
    ):
        if ratio == "none":
            parts.append(-a * lp)
            continue
        r = {
            "token": lambda lp=lp, ol=ol: torch.exp(lp - ol),
            "sequence": lambda lp=lp, ol=ol: torch.exp((lp - ol).sum() / len(lp)).expand(len(lp)),
            "product": lambda lp=lp, ol=ol: (torch.exp(lp).prod() / torch.exp(ol).prod()).expand(
                len(lp)
            ),
        }[ratio]()
        cut = torch.where(r < 1 - low, 1 - low, torch.where(r > 1 + high, 1 + high, r))
        parts.append(-torch.where(r * a < cut * a, r * a, cut * a))
    return torch.cat(parts)


@pytest.mark.parametrize("ratio", ["token", "sequence", "product", "none"])
@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_loss_and_gradient_are_those_of_the_plain_formula(ratio: str, spread: float) -> None:
    logp, old, advantages = tokens(1, spread)
    low, high = 0.2, 0.28
    mine, plain = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    got = policy_loss(
        mine, old, advantages, torch.tensor(LENGTHS), ratio=ratio, clip_low=low, clip_high=high
    )
    wanted = plain_loss(plain, old, advantages, ratio, low, high)
    torch.testing.assert_close(got.loss, wanted, rtol=1e-12, atol=1e-14)
    weights = torch.randn(len(logp), dtype=torch.float64)
    (got.loss * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-11, atol=1e-14)
    if ratio == "token" and spread > 0.1:
        assert got.low.any() and got.high.any()
        assert (mine.grad[got.low | got.high] == 0).all()


def test_the_clip_counts_where_it_cut_and_none_means_no_clip() -> None:
    old = torch.zeros(4)
    logp = torch.log(torch.tensor([0.5, 0.5, 2.0, 2.0])).requires_grad_()
    advantages, ones = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, dtype=torch.int64)
    both = policy_loss(logp, old, advantages, ones)
    assert both.low.tolist() == [False, True, False, False]
    assert both.high.tolist() == [False, False, True, False]
    torch.testing.assert_close(both.loss, torch.tensor([-0.5, 0.8, -1.2, 2.0]))
    free = policy_loss(logp, old, advantages, ones, clip_low=None, clip_high=None)
    torch.testing.assert_close(free.loss, torch.tensor([-0.5, 0.5, -2.0, 2.0]))
    upper = policy_loss(logp, old, advantages, ones, clip_low=None, clip_high=0.2)
    torch.testing.assert_close(upper.loss, torch.tensor([-0.5, 0.5, -1.2, 2.0]))


def test_on_policy_every_level_gives_the_policy_gradient() -> None:
    _, old, advantages = tokens()
    lengths = torch.tensor(LENGTHS)
    per_token = 1 / lengths.double().repeat_interleave(lengths)
    for ratio, size in (("token", 1.0), ("none", 1.0), ("sequence", 1.0), ("product", None)):
        logp = old.clone().requires_grad_()
        loss = policy_loss(logp, old, advantages, lengths, ratio=ratio).loss
        (loss * per_token).sum().backward()
        # The whole sample as one action: a token's gradient does not shrink with its length.
        wanted = -advantages * (per_token if size else 1.0)
        torch.testing.assert_close(logp.grad, wanted, rtol=1e-12, atol=1e-14)


def test_ratios_that_would_overflow_stay_finite() -> None:
    logp = torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([-200.0, 200.0])
    advantages = torch.tensor([0.0, 1.0])
    got = policy_loss(logp, old, advantages, torch.tensor([1, 1]))
    got.loss.sum().backward()
    assert got.loss.isfinite().all() and logp.grad.isfinite().all()
    assert kl_estimate(torch.tensor([-200.0]), torch.tensor([0.0])).isfinite().all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_are_their_formula_and_k1_k3_are_unbiased(kind: str) -> None:
    logp, reference, _ = tokens(2)
    mine = logp.clone().requires_grad_()
    got = kl_estimate(mine, reference, kind)
    ratio = torch.exp(reference) / torch.exp(logp)
    wanted = {"k1": -ratio.log(), "k2": ratio.log() ** 2 / 2, "k3": ratio - 1 - ratio.log()}[kind]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    got.sum().backward()
    slope = {"k1": torch.ones_like(logp), "k2": logp - reference, "k3": 1 - ratio}[kind]
    torch.testing.assert_close(mine.grad, slope, rtol=1e-9, atol=1e-12)
    if kind != "k1":
        assert (got >= 0).all()
    if kind == "k2":
        return
    p, q = (torch.randn(40, dtype=torch.float64).log_softmax(0) for _ in range(2))
    expected = (p.exp() * kl_estimate(p, q, kind)).sum()
    torch.testing.assert_close(expected, (p.exp() * (p - q)).sum(), rtol=1e-9, atol=1e-12)


def test_weights_make_the_loops_division_each_aggregation() -> None:
    lengths = torch.tensor(LENGTHS)
    losses, longest = torch.randn(sum(LENGTHS), dtype=torch.float64), 8
    parts = losses.split(LENGTHS)
    wanted = {
        "token": losses.mean(),
        "sequence": torch.stack([p.mean() for p in parts]).mean(),
        "constant": torch.stack([p.sum() / longest for p in parts]).mean(),
    }
    for aggregation, value in wanted.items():
        weights = token_weights(lengths, aggregation, longest).repeat_interleave(lengths)
        torch.testing.assert_close((weights * losses).sum() / len(losses), value)
    with pytest.raises(ValueError, match="aggregation must be"):
        token_weights(lengths, "mean", longest)


def test_levels_and_estimators_that_do_not_exist_are_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="level must be"):
        log_ratios(one, one, torch.tensor([1]), "word")
    with pytest.raises(ValueError, match="kind must be"):
        kl_estimate(one, one, "k4")


def test_presets_hold_their_papers_values() -> None:
    grpo, dapo, gspo = PRESETS["grpo"], PRESETS["dapo"], PRESETS["gspo"]
    assert (grpo.scale, grpo.aggregation, grpo.beta, grpo.kl) == ("group", "sequence", 0.04, "k3")
    assert (dapo.clip_low, dapo.clip_high, dapo.beta) == (0.2, 0.28, 0.0)
    assert dapo.mask_truncated and dapo.dynamic_sampling and dapo.aggregation == "token"
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)
    assert (PRESETS["dr_grpo"].scale, PRESETS["dr_grpo"].aggregation) == ("none", "constant")
    rloo = PRESETS["rloo"]
    assert (rloo.advantage, rloo.ratio, rloo.kl, rloo.kl_in) == (
        "leave_one_out", "product", "k1", "reward",
    )  # fmt: skip
    assert PRESETS["rejection"].least_group == 1 and grpo.least_group == 2


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="kl k1 has no gradient"):
        replace(PRESETS["grpo"], kl="k1")
    with pytest.raises(ValueError, match="clip_low must be"):
        Algorithm(clip_low=-0.1)
    with pytest.raises(ValueError, match="beta must be"):
        Algorithm(beta=math.inf)
    with pytest.raises(ValueError, match="scale must be none"):
        replace(PRESETS["rejection"], scale="group")


def test_groups_of_equal_rewards_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_advantages(torch.ones(4), torch.tensor([0, 0, 1, 1]))

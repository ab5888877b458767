"""sampling, log_probs, top_log_probs: distributions, independence, truncation, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm import _C
from fastllm.ops import log_probs, sampling, top_log_probs
from fastllm.ops.log_probs import top_log_probs_ref
from fastllm.ops.sampling import gumbel, philox, sampling_ref
from fastllm.testing.infos.sampling import row_parameters
from fastllm.testing.opinfo import generator

COUNTS, SEED, POSITION = 10, 7, 8  # indices in row_parameters


def draw(logits: Tensor, seed: int = 0, first: int = 0, **how: Any) -> Tensor:
    """Ids drawn from every row of logits at positions first, first + 1, ..."""
    rows, vocab = logits.shape
    params = row_parameters(generator(), rows, vocab, **how)
    params[SEED].fill_(seed)
    params[POSITION] = torch.arange(first, first + rows, dtype=torch.int32)
    return sampling(logits, *params)[0]


@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [((0, 0), 0, 0x6627E8D5), ((1, 2), 0, None), ((0xFFFFFFFF, 7), -1, None)],
)
def test_philox_matches_an_integer_definition(
    counter: tuple[int, int], key: int, word: int | None
) -> None:
    mask = 0xFFFFFFFF
    c, k = [*counter, 0, 0], [key & mask, (key >> 32) & mask]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    if word is not None:
        assert c[0] == word  # the published test vector for zeros
    got = philox(torch.tensor([key]), (torch.tensor([counter[0]]), torch.tensor([counter[1]])))
    assert got.item() == c[0]


def test_noise_has_the_mean_and_variance_of_a_gumbel_distribution() -> None:
    noise = gumbel(torch.tensor([3]), torch.tensor([9]), 200_000)
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.03


@pytest.mark.parametrize("isa", _C.isas())
def test_draws_follow_softmax(isa: str) -> None:
    _C.set_isa(isa)
    logits = torch.tensor([0.3, -1.0, 2.0, 1.2, 0.0, -2.0, 1.9, 0.7])
    n = 20_000
    ids = draw(logits.expand(n, -1), seed=11)
    expected = n * torch.softmax(logits.double(), 0)
    chi2 = ((torch.bincount(ids, minlength=8) - expected).square() / expected).sum().item()
    assert chi2 < 24.3  # 7 degrees of freedom: exceeded once in 1,000 seeds


def test_successive_positions_are_not_correlated() -> None:
    ids = draw(torch.zeros(20_000, 4), seed=5).long()
    pairs = torch.bincount(ids[:-1] * 4 + ids[1:], minlength=16).double()
    expected = (len(ids) - 1) / 16
    assert ((pairs - expected).square() / expected).sum().item() < 37.7  # 15 degrees, 1 in 1,000


def test_a_draw_depends_on_its_row_alone() -> None:
    g = generator(1)
    logits = 3 * torch.randn(9, 2000, generator=g)
    how = {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "penalized": True, "banned": 3}
    params = row_parameters(g, 9, 2000, **how)
    for isa in _C.isas():
        _C.set_isa(isa)
        torch.set_num_threads(2)
        together = sampling(logits, *[p.clone() for p in params])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for s in range(9):
                row = [p[s : s + 1].clone() for p in params]
                alone = sampling(logits[s : s + 1], *row)
                for a, b in zip(alone, together, strict=True):
                    assert torch.equal(a, b[s : s + 1])


def test_a_mix_of_greedy_and_drawing_rows_equals_each_by_itself() -> None:
    logits = 2 * torch.randn(4, 1100, generator=generator(2))
    params = row_parameters(generator(3), 4, 1100)
    params[0] = torch.tensor([0.0, 1.0, 0.0, 0.5])
    params[1] = torch.tensor([0, 3, 4, 0], dtype=torch.int32)
    for got, want in zip(sampling(logits, *params), sampling_ref(logits, *params), strict=True):
        torch.testing.assert_close(got, want, atol=4e-6, rtol=0)


def test_two_seeds_and_two_positions_differ() -> None:
    logits = torch.zeros(64, 1000)
    ids = draw(logits, seed=1)
    assert not torch.equal(ids, draw(logits, seed=2))
    assert not torch.equal(ids, draw(logits, seed=1 + 2**32))  # the high half of the key counts
    assert torch.equal(ids[1:], draw(logits[1:], seed=1, first=1))


@pytest.mark.parametrize("isa", _C.isas())
def test_temperature_zero_is_argmax_with_ties_to_the_lower_id(isa: str) -> None:
    _C.set_isa(isa)
    logits = torch.randint(-3, 4, (8, 1300), generator=generator(4)).float()
    ids, logprob, logprob_t = sampling(
        logits, *row_parameters(generator(), 8, 1300, temperature=0.0, top_k=2, top_p=0.1)
    )
    assert torch.equal(ids.long(), logits.argmax(1))
    assert torch.equal(logprob, logprob_t)


def test_a_cold_draw_is_greedy_and_finite() -> None:
    logits = 30 * torch.randn(3, 600, generator=generator(5))
    ids, _, logprob_t = sampling(logits, *row_parameters(generator(), 3, 600, temperature=1e-5))
    assert torch.equal(ids.long(), logits.argmax(1))
    assert torch.equal(logprob_t, torch.zeros(3))


def survivors(z: Tensor, k: int, p: float, m: float) -> set[int]:
    """Ids that min_p, top_k and top_p leave of one row, by sorting in float64."""
    probabilities = torch.softmax(z.double(), 0)
    keep = probabilities >= m * probabilities.max() if m > 0 else torch.ones(len(z), dtype=bool)
    if 0 < k < len(z):
        keep &= z >= z.sort(descending=True).values[k - 1]
    if p < 1:
        left = torch.where(keep, probabilities, 0.0)
        values, order = left.sort(descending=True)
        reached = values.cumsum(0) >= p * left.sum()
        last = order[int(reached.to(torch.uint8).argmax())]
        keep &= z >= z[last]
    return set(torch.nonzero(keep)[:, 0].tolist())


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-12, 12), min_size=1, max_size=40),
    k=st.integers(0, 12),
    # Off the quarter grid of the logits, so that no sum of probabilities equals a limit by design.
    p=st.sampled_from([0.0, 0.137, 0.511, 0.873, 0.991, 1.0]),
    m=st.sampled_from([0.0, 0.0171, 0.313, 0.87]),
    isa=st.sampled_from(_C.isas()),
)
def test_truncation_equals_a_sort_even_with_ties(
    values: list[int], k: int, p: float, m: float, isa: str
) -> None:
    _C.set_isa(isa)
    z = torch.tensor(values).float() / 4
    rows = 400
    drawn = draw(z.expand(rows, -1), seed=len(values), top_k=k, top_p=p, min_p=m)
    allowed = survivors(z, k, p, m)
    assert set(drawn.tolist()) <= allowed
    # And the least likely survivor is drawn, where 400 draws cannot well miss it.
    worst = min(allowed, key=lambda i: (z[i].item(), i))
    chance = (z[worst] - torch.logsumexp(z[sorted(allowed)], 0)).exp().item()
    if chance > 0.05:
        assert worst in drawn.tolist(), chance


@pytest.mark.parametrize(("k", "p", "m"), [(50, 1.0, 0.0), (0, 0.9, 0.0), (300, 0.95, 0.01)])
def test_truncation_of_a_large_row_equals_a_sort(k: int, p: float, m: float) -> None:
    z = 2 * torch.randn(20_000, generator=generator(6))
    allowed = survivors(z, k, p, m)
    drawn = set(draw(z.expand(300, -1), top_k=k, top_p=p, min_p=m).tolist())
    assert drawn <= allowed
    assert len(drawn) > min(len(allowed), 300) // 8


def test_penalties_and_bans_follow_the_definition_and_counts_grow() -> None:
    logits = 2 * torch.randn(6, 700, generator=generator(7))
    params = row_parameters(generator(8), 6, 700, temperature=0.0, penalized=True, banned=4)
    params[9][::2] = 0  # half of the rows are not penalized
    expected = [p.clone() for p in params]
    for _ in range(5):
        got, want = sampling(logits, *params), sampling_ref(logits, *expected)
        assert torch.equal(got[0], want[0])
        assert torch.equal(params[COUNTS], expected[COUNTS])
        assert not (got[0][:, None] == params[-1]).any()


def test_rows_without_a_distribution_give_minus_one() -> None:
    logits = torch.randn(5, 900, generator=generator(9))
    logits[0, 800], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    for temperature in (0.0, 1.0):
        params = row_parameters(generator(), 5, 900, temperature=temperature, penalized=True)
        before = params[COUNTS].clone()
        ids, logprob, logprob_t = sampling(logits, *params)
        assert ids[:3].tolist() == [-1] * 3
        assert (ids[3:] >= 0).all()
        assert logprob[:3].isnan().all() and logprob_t[:3].isnan().all()
        assert logprob[3:].isfinite().all()
        assert torch.equal(params[COUNTS][:3], before[:3])
        values, top = top_log_probs(logits, 2)
        assert (top[:3] == -1).all() and values[:3].isnan().all() and values[3:].isfinite().all()
        assert log_probs(logits, torch.zeros(5, 1).long())[:3].isnan().all()


def test_a_row_with_everything_banned_gives_minus_one() -> None:
    params = row_parameters(generator(), 1, 3)
    params[-1] = torch.tensor([[0, 1, 2, -1]], dtype=torch.int32)
    assert sampling(torch.zeros(1, 3), *params)[0].item() == -1


def test_log_probs_of_padding_are_nan_and_others_are_log_softmax() -> None:
    logits = torch.randn(2, 513, generator=generator(10))
    ids = torch.tensor([[512, -1], [513, 0]])
    got = log_probs(logits, ids)
    want = torch.log_softmax(logits.double(), 1)
    assert got.isnan().tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(got[0, 0].double(), want[0, 512], atol=1e-6, rtol=0)


def test_the_sampled_log_probability_equals_log_probs_bit_for_bit() -> None:
    logits = 3 * torch.randn(7, 3000, generator=generator(11))
    for isa in _C.isas():
        _C.set_isa(isa)
        ids, logprob, _ = sampling(logits, *row_parameters(generator(), 7, 3000, top_p=0.9))
        assert torch.equal(logprob, log_probs(logits, ids[:, None])[:, 0])
        values, top = top_log_probs(logits, 3000)
        assert torch.equal(
            values.gather(1, (top == ids[:, None]).long().argmax(1)[:, None])[:, 0], logprob
        )


def test_log_probs_beside_a_large_offset_keep_their_digits() -> None:
    logits = torch.tensor([[1000.0, 1000.0 - 10.0, 1000.0 - 12.0]])
    want = torch.log_softmax(logits.double(), 1)[0, 0].item()
    got = log_probs(logits, torch.zeros(1, 1).long()).item()
    # 1 ulp of the sum near 1; x - (max + log sum) would be off by half an ulp of 1000, 3e-5.
    assert abs(got - want) < 1.2e-7


@pytest.mark.parametrize("k", [1, 2, 97, 2000])
def test_top_log_probs_orders_ties_by_id(k: int) -> None:
    logits = torch.randint(0, 40, (2, 2000), generator=generator(12)).float() / 8
    for isa in _C.isas():
        _C.set_isa(isa)
        assert torch.equal(top_log_probs(logits, k)[1], top_log_probs_ref(logits, k)[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": torch.zeros(2, 5, dtype=torch.bfloat16)}, "logits"),
        ({"logits": torch.zeros(2, 0)}, "logits"),
        ({"temperature": torch.zeros(3)}, "temperature"),
        ({"seed": torch.zeros(2)}, "seed"),
        ({"counts": torch.zeros(2, 4, dtype=torch.int32)}, "counts"),
        ({"in_prompt": torch.zeros(0, 5, dtype=torch.uint8)}, "in_prompt"),
        ({"banned": torch.zeros(2, dtype=torch.int32)}, "banned"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], named: str) -> None:
    names = (
        "logits temperature top_k top_p min_p repetition presence frequency seed position "
        "penalized counts in_prompt banned"
    ).split()
    params = row_parameters(generator(), 2, 5, penalized=True)
    good = dict(zip(names, [torch.zeros(2, 5), *params], strict=True))
    with pytest.raises(ValueError, match=named):
        sampling(**(good | change))


def test_bad_k_and_bad_ids_are_named() -> None:
    with pytest.raises(ValueError, match="k must be in"):
        top_log_probs(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="ids must have shape"):
        log_probs(torch.zeros(2, 4), torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match="ids must be int32 or int64"):
        log_probs(torch.zeros(2, 4), torch.zeros(2, 1))

"""Steps of fine-tuning: every example once an epoch, whole, whatever packs and splits them."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from fastllm.errors import DataError
from fastllm.train.data.batch import NO_LOSS, MicroBatch
from fastllm.train.data.examples import ExampleBatches, check_masks, fit_examples, micro_batches
from fastllm.train.data.masks import Example


def example(length: int, learned: slice = slice(-2, None), first: int = 0) -> Example:
    trained = np.zeros(length, dtype=bool)
    trained[learned] = True
    trained[0] = False
    ids = np.arange(first, first + length, dtype=np.int32)
    return Example(ids=ids, trained=trained, place=f"line {first}")


EXAMPLES = [example(5 + 3 * (i % 6), first=100 * i) for i in range(11)]


def documents(batches: list[MicroBatch]) -> list[tuple[list[int], list[int]]]:
    """ids and targets of every document of a step, sorted."""
    found = []
    for batch in batches:
        edges = batch.documents.cu_seqlens.tolist()
        for low, high in itertools.pairwise(edges):
            assert batch.documents.positions[low:high].tolist() == list(range(high - low))
            ids, targets = batch.documents.ids[low:high], batch.targets[low:high]
            found.append((ids.tolist(), targets.tolist()))
        assert batch.tokens == int((batch.targets != NO_LOSS).sum())
    return sorted(found)


def test_an_epoch_holds_every_example_once_and_the_last_step_ends_with_the_run() -> None:
    batches = ExampleBatches(EXAMPLES, batch_size=4, micro_tokens=40, count=22)
    steps = [documents(next(batches)) for _ in range(6)]
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 2]
    starts = Counter(ids[0] for step in steps for ids, _ in step)
    assert starts == dict.fromkeys(range(0, 1100, 100), 2)
    for ids, targets in itertools.chain.from_iterable(steps):
        source = EXAMPLES[ids[0] // 100]
        assert ids == source.ids[:-1].tolist()
        wanted = np.where(source.trained[1:], source.ids[1:], NO_LOSS)
        assert targets == wanted.tolist()


def test_epochs_differ_and_seeds_differ() -> None:
    def order(seed: int) -> list[int]:
        batches = ExampleBatches(EXAMPLES, batch_size=1, micro_tokens=40, seed=seed)
        return [documents(next(batches))[0][0][0] for _ in range(22)]

    assert order(1) == order(1) != order(2)
    assert order(1)[:11] != order(1)[11:]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_tokens", [19, 64, 1000])
def test_a_step_is_the_same_whatever_packs_and_splits_it(world: int, micro_tokens: int) -> None:
    wanted = documents(next(ExampleBatches(EXAMPLES, batch_size=7, micro_tokens=1000, seed=3)))
    ranks = [
        next(
            ExampleBatches(
                EXAMPLES, batch_size=7, micro_tokens=micro_tokens, seed=3, rank=r, world=world
            )
        )
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for batch in itertools.chain.from_iterable(ranks):
        assert len(batch.targets) <= micro_tokens
    idle = ([0], [NO_LOSS])
    found = [d for batches in ranks for d in documents(batches) if d != idle]
    assert sorted(found) == wanted


def test_a_resumed_run_gets_the_same_steps() -> None:
    whole = ExampleBatches(EXAMPLES, batch_size=4, micro_tokens=40, seed=5)
    for _ in range(4):
        next(whole)
    resumed = ExampleBatches(EXAMPLES, batch_size=4, micro_tokens=64, seed=5)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(4):
        assert documents(next(whole)) == documents(next(resumed))
    for other in (
        ExampleBatches(EXAMPLES, batch_size=4, micro_tokens=40, seed=6),
        ExampleBatches(EXAMPLES[1:], batch_size=4, micro_tokens=40, seed=5),
    ):
        with pytest.raises(ValueError, match="was saved with"):
            other.load_state_dict(whole.state_dict())


def test_long_examples_are_cut_or_dropped_and_counted() -> None:
    long = example(30, slice(5, None))
    late = example(30, slice(20, None))
    short = example(9, slice(2, 4))
    kept, counts = fit_examples([long, late, short], seq_len=10)
    assert [len(e.ids) for e in kept] == [11, 4]  # what follows the last learned token is cut too
    assert (counts.kept, counts.truncated, counts.dropped, counts.emptied) == (2, 1, 0, 1)
    assert (counts.tokens, counts.trained) == (13, 8)
    assert "1 examples longer than 10 tokens were cut at the end" in counts.lines(10)
    assert any("no learned token is in the part that fits" in line for line in counts.lines(10))
    kept, counts = fit_examples([long, late, short], seq_len=10, overlong="drop")
    assert [len(e.ids) for e in kept] == [4]
    assert (counts.dropped, counts.emptied) == (2, 0)
    exact, counts = fit_examples([example(11)], seq_len=10, overlong="drop")
    assert len(exact[0].ids) == 11 and not counts.dropped
    with pytest.raises(DataError, match=r"all 1 examples are too long for 10 tokens.*--seq-len"):
        fit_examples([late], seq_len=10)
    with pytest.raises(ValueError, match="overlong must be one of truncate, drop, got 'cut'"):
        fit_examples([long], seq_len=10, overlong="cut")


def test_masks_that_hold_nothing_back_are_refused() -> None:
    everything = example(6, slice(1, None))
    with pytest.raises(DataError, match="line 0: every token of every example would be learned"):
        check_masks([everything, everything])
    check_masks([everything, example(6)])


def test_an_example_that_fits_no_micro_batch_is_named() -> None:
    with pytest.raises(ValueError, match="19, not from 1 to 10"):
        list(micro_batches([example(20)], [0], 10))

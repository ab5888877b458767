"""The loader's promises: which tokens, in which order, for any number of processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm.train.data import loader as loader_module
from fastllm.train.data.batch import NO_LOSS, MicroBatch
from fastllm.train.data.loader import Loader
from fastllm.train.data.order import permutation
from fastllm.train.data.packing import fill_rows, pack_rows
from fastllm.train.data.store import TokenStore
from fastllm.train.data.store_writer import Vocabulary, write_store

LENGTHS = [3, 1, 40, 7, 7, 2, 19, 5, 1, 11, 64, 8]


VOCABULARY = Vocabulary(vocab_size=1000, start_token_id=998, end_token_id=999)


def small_store(path: Path, *splits: list[int]) -> TokenStore:
    """Documents of given lengths, with tokens that count up as long as there are ids."""
    ids = itertools.cycle(range(990))
    documents = [[[*itertools.islice(ids, n - 1), 999] for n in split] for split in splits]
    names = ("train", "holdout")
    return write_store(path, dict(zip(names, [*documents, []], strict=False)), VOCABULARY)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return small_store(tmp_path / "store", LENGTHS, [4, 30, 1])


def joined(batches: list[MicroBatch]) -> tuple[list[int], list[int], list[int]]:
    """ids, targets and positions of several micro batches."""
    ids = torch.cat([b.documents.ids for b in batches]).tolist()
    targets = torch.cat([b.targets for b in batches]).tolist()
    return ids, targets, torch.cat([b.documents.positions for b in batches]).tolist()


def pairs(batches: list[MicroBatch]) -> list[tuple[int, int]]:
    ids, targets, _ = joined(batches)
    return list(zip(ids, targets, strict=True))


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=30),
    seq_len=st.sampled_from([1, 2, 7, 16, 64]),
    rows=st.sampled_from([6, 12]),
    seed=st.integers(0, 3),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_steps_hold_the_same_whatever_the_processes_and_micro_batches(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, rows: int, seed: int
) -> None:
    store = small_store(tmp_path_factory.mktemp("data") / "store", lengths)
    whole = Loader(store, seq_len=seq_len, rows_per_step=rows, seed=seed)
    wanted = [joined(step) for step in itertools.islice(whole, 3)]
    for world, micro_rows in itertools.product((1, 2, 3), (1, 2, 4)):
        ranks = [
            Loader(
                store,
                seq_len=seq_len,
                rows_per_step=rows,
                seed=seed,
                rank=rank,
                world=world,
                micro_rows=micro_rows,
            )
            for rank in range(world)
        ]
        for expected in wanted:
            shares = [next(loader) for loader in ranks]
            assert len({len(share) for share in shares}) == 1
            assert joined([batch for share in shares for batch in share]) == expected


@pytest.mark.parametrize("seq_len", [1, 8, 16, 1000])
def test_an_epoch_holds_every_stored_token_once_as_a_target(
    store: TokenStore, seq_len: int
) -> None:
    loader = Loader(store, seq_len=seq_len, rows_per_step=1, seed=5)
    for _ in range(3):
        found: Counter[int] = Counter()
        for step in itertools.islice(loader, loader.rows_per_epoch):
            for batch in step:
                assert batch.tokens == int((batch.targets != NO_LOSS).sum()) <= seq_len
                found.update(batch.targets.tolist())
        assert found == Counter(store.tokens[: sum(LENGTHS)].tolist())
    assert loader.epoch == 3.0


def test_every_place_reads_the_token_before_its_target(store: TokenStore) -> None:
    # The stored tokens are distinct but for the last of each document.
    before = {}
    for number in range(store.split("train").documents):
        tokens = [store.start_token_id, *store.document(number).tolist()]
        before.update({(number, i): pair for i, pair in enumerate(itertools.pairwise(tokens))})
    loader = Loader(store, seq_len=16, rows_per_step=3, seed=1)
    for step in itertools.islice(loader, 8):
        for batch in step:
            found = pairs([batch])
            places = [
                (document, start + i)
                for document, start, length in batch.sources.tolist()
                for i in range(length)
            ]
            assert found == [before[place] for place in places]
            lengths = torch.diff(batch.documents.cu_seqlens).tolist()
            assert lengths == batch.sources[:, 2].tolist()
            assert batch.documents.max_seqlen == max(lengths) <= 16
            assert joined([batch])[2] == [i for n in lengths for i in range(n)]


def test_rows_are_full_and_documents_whole_where_they_can_be(tmp_path: Path) -> None:
    lengths = [1 + n % 59 for n in permutation(400, 0).tolist()]
    store = small_store(tmp_path / "store", lengths)
    loader = Loader(store, seq_len=64, rows_per_step=1)
    (batches,) = zip(*itertools.islice(loader, loader.rows_per_epoch), strict=True)
    rows, rest = divmod(sum(lengths), 64)
    assert sorted(batch.tokens for batch in batches) == sorted([64] * rows + [rest] * (rest > 0))
    # Cut blindly, nearly every row would begin inside a document: 180 of 184.
    cut = sum(start > 0 for batch in batches for _, start, _ in batch.sources.tolist())
    assert rows > 180 and cut <= 10


@given(at=st.integers(0, 40), rows=st.sampled_from([2, 4]))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_resumed_loader_goes_on_with_the_same_batches(
    store: TokenStore, at: int, rows: int
) -> None:
    loader = Loader(store, seq_len=8, rows_per_step=rows, seed=2)
    for _ in range(at):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    wanted = [joined(next(loader)) for _ in range(12)]
    resumed = Loader(store, seq_len=8, rows_per_step=rows, seed=2, micro_rows=1)
    resumed.load_state_dict(state)
    assert [joined(next(resumed)) for _ in range(12)] == wanted


@pytest.mark.parametrize("change", [{"seed": 3}, {"seq_len": 9}, {"split": "holdout"}])
def test_a_resume_with_other_rows_says_what_differs(
    store: TokenStore, change: dict[str, int | str]
) -> None:
    options = {"seq_len": 8, "rows_per_step": 2, "seed": 2}
    state = Loader(store, **options).state_dict()
    with pytest.raises(ValueError, match=f"saved with {next(iter(change))}"):
        Loader(store, **{**options, **change}).load_state_dict(state)


def test_a_resume_on_other_data_is_refused(store: TokenStore, tmp_path: Path) -> None:
    other = small_store(tmp_path / "other", [*LENGTHS[:-1], 9])
    state = Loader(store, seq_len=8, rows_per_step=2).state_dict()
    with pytest.raises(ValueError, match="saved with data"):
        Loader(other, seq_len=8, rows_per_step=2).load_state_dict(state)


def test_epochs_and_seeds_give_other_orders(store: TokenStore) -> None:
    first = Loader(store, seq_len=8, rows_per_step=21, seed=0)
    assert first.rows_per_epoch == 21
    orders = [joined(next(first)) for _ in range(2)]
    orders.append(joined(next(Loader(store, seq_len=8, rows_per_step=21, seed=1))))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("world", "micro_rows"), [(1, 1), (2, 1), (3, 2), (2, 8)])
def test_evaluation_covers_a_split_once_with_equal_turns(
    store: TokenStore, world: int, micro_rows: int
) -> None:
    wanted = pairs(list(Loader(store, seq_len=8, rows_per_step=6).evaluation()))
    assert Counter(t for _, t in wanted) == Counter(store.tokens[sum(LENGTHS) :].tolist())
    options = {"seq_len": 8, "rows_per_step": 6, "seed": 9, "world": world}
    shares = [
        list(Loader(store, rank=r, micro_rows=micro_rows, **options).evaluation())
        for r in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    found = [pair for share in shares for pair in pairs(share) if pair[1] != NO_LOSS]
    assert Counter(found) == Counter(wanted)
    assert sum(batch.tokens for share in shares for batch in share) == len(wanted)


def test_evaluation_of_some_rows_takes_the_first(store: TokenStore) -> None:
    loader = Loader(store, seq_len=8, rows_per_step=2)
    some = pairs(list(loader.evaluation("train", max_rows=3)))
    assert some == pairs(list(loader.evaluation("train")))[: len(some)]
    assert len(some) == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"world": 2, "rows_per_step": 3}, "rows_per_step must be a multiple"),
        ({"rank": 1}, "rank must be from 0 to 0"),
        ({"micro_rows": 0}, "micro_rows must be at least 1"),
        ({"split": "test"}, "no split 'test', only train, holdout"),
    ],
)
def test_wrong_arguments_are_named(store: TokenStore, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loader(store, **{"seq_len": 8, "rows_per_step": 2, **options})


def test_a_split_without_tokens_is_an_error(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store", [5])
    with pytest.raises(ValueError, match=r"'holdout' of .* holds no tokens"):
        next(Loader(store, seq_len=4, rows_per_step=1).evaluation())


def test_batches_do_not_depend_on_the_size_of_a_window_alone(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many windows in an epoch: each still covers its tokens exactly."""
    monkeypatch.setattr(loader_module, "WINDOW_ROWS", 2)
    loader = Loader(store, seq_len=8, rows_per_step=21, seed=3)
    found = Counter(batch_target for _, batch_target in pairs(next(loader)))
    assert found == Counter(store.tokens[: sum(LENGTHS)].tolist())


def test_a_batch_moves_as_a_whole(store: TokenStore) -> None:
    (batch,) = next(Loader(store, seq_len=8, rows_per_step=2))
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.targets, moved.documents.cu_seqlens)} == {"meta"}
    assert dataclasses.replace(moved, targets=batch.targets).tokens == batch.tokens


def test_rows_are_fixed_as_long_as_the_order_s_version_is(store: TokenStore) -> None:
    """Other rows for the same seed need another `loader.ORDER`, or old runs resume elsewhere."""
    (batch,) = next(Loader(store, seq_len=16, rows_per_step=4, seed=1))
    assert (loader_module.ORDER, batch.sources.tolist()) == (1, ROWS)


def test_permutations_are_fixed_for_all_time() -> None:
    assert permutation(8, 1, 2).tolist() == PERMUTATION
    assert sorted(permutation(1000, 7).tolist()) == list(range(1000))


def test_fill_rows_cuts_the_longest_piece_into_the_gap() -> None:
    assert fill_rows([(0, 0, 7), (1, 0, 6)], 8) == [[(0, 0, 7), (1, 0, 1)], [(1, 1, 5)]]
    assert fill_rows([(4, 2, 9)], 4) == [[(4, 6, 4)], [(4, 2, 4)], [(4, 10, 1)]]


def test_pack_rows_cuts_nothing() -> None:
    rows = pack_rows([5, 3, 4, 8, 2], 8)
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3, 4]
    assert rows == [[3], [0, 1], [2, 4]]
    with pytest.raises(ValueError, match=r"lengths\[1\] is 9"):
        pack_rows([1, 9], 8)


PERMUTATION = [7, 5, 2, 0, 3, 6, 1, 4]
ROWS = [[2, 16, 16], [10, 32, 16], [10, 48, 16], [6, 16, 3], [0, 0, 3], [8, 0, 1], [1, 0, 1]]

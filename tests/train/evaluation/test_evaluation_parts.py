"""Statistics against hand-made numbers, templates, and the journal that survives kills."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from fastllm.errors import DataError
from fastllm.train.evaluation.journal import Journal, files_state, keys_of
from fastllm.train.evaluation.statistics import Share, pass_at_k, wilson
from fastllm.train.evaluation.template import PromptTemplate


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample() -> None:
    for samples in (1, 4, 6):
        for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            draws = list(itertools.combinations([i < right for i in range(samples)], k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError, match="must be from"):
            pass_at_k(*wrong)


def test_intervals_are_wilsons() -> None:
    low, high = wilson(0.5, 10)  # by hand: (0.5 + 0.19207) / 1.38415 +- 0.26340
    assert low == pytest.approx(0.23659, abs=1e-5) and high == pytest.approx(0.76341, abs=1e-5)
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson(1.0, 10)[1] == pytest.approx(1.0) and wilson(0.5, 0) == (0.0, 1.0)


def test_a_share_has_the_standard_error_of_its_problems() -> None:
    share = Share.of([1.0, 0.0, 0.5, 0.5])
    assert share.value == 0.5
    assert share.error == pytest.approx(math.sqrt(0.5 / 3) / 2)
    assert (share.low, share.high) == wilson(0.5, 4)
    assert Share.of([1.0]).error == 0.0
    assert str(share).startswith("50.0% ± 20.4 (95%: 15.0% to 85.0%)")
    with pytest.raises(ValueError, match="no problems"):
        Share.of([])


def test_templates_fill_in_fields_and_know_braces(tmp_path: Path) -> None:
    template = PromptTemplate.named(r"Q: {question}\nSet {{1, 2}}. {n}{n}\nA:")
    assert template.fields == ("question", "n")
    assert template.render({"question": "Why {n}?", "n": 7}) == "Q: Why {n}?\nSet {1, 2}. 77\nA:"
    file = tmp_path / "prompt.txt"
    file.write_text("{question}\\n\n")
    assert PromptTemplate.named(str(file)).render({"question": "?"}) == "?\\n\n"


def test_a_field_that_the_data_lacks_is_named() -> None:
    template = PromptTemplate("{question} {choices}")
    with pytest.raises(DataError, match=r"f\.jsonl: line 3: choices: .*has question, choice \(did"):
        template.render({"question": "?", "choice": 1, "choices": None}, "f.jsonl", "line 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt.txt", "names no field of the data.*no file of that name"),
        ("{question", "single brace"),
        ("question}", "single brace"),
        ("{question.__class__}", "not a name alone"),
        ("{0}", "not a name alone"),
        ("{}", "not a name alone"),
        ("{question!r}", "not a name alone"),
        ("{question:>10}", "not a name alone"),
    ],
)
def test_other_braces_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTemplate(text)


def test_a_journal_goes_on_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "done.jsonl"
    journal = Journal(path)
    with journal.writing():
        journal.add({"key": "a", "text": "ü\n中\ud800"})
        journal.add({"key": "b"})
    whole = path.read_bytes()
    for cut in range(1, 12):
        path.write_bytes(whole[:-cut])
        again = Journal(path)
        assert set(again.done) == {"a"} and again.done["a"]["text"].startswith("ü\n中")
        with again.writing():
            again.add({"key": "c"})
        assert set(Journal(path).done) == {"a", "c"}
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="line 1: is not what an evaluation has written"):
        Journal(path)
    nothing = Journal(None)
    with nothing.writing():
        nothing.add({"key": "a"})
    assert nothing.done == {"a": {"key": "a"}}


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "done.jsonl"
    first, second = Journal(path), Journal(path)
    with first.writing():
        first.add({"key": "a"})
        with pytest.raises(BlockingIOError, match="another evaluation"), second.writing():
            second.add({"key": "b"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"key": "a"}]


def test_keys_tell_settings_and_repeated_problems_apart() -> None:
    keys = keys_of({"t": 0}, ["x", "y", "x"])
    assert len(set(keys)) == 3
    assert keys_of({"t": 0}, ["y", "x"]) == [keys[1], keys[0]]
    assert not set(keys) & set(keys_of({"t": 1}, ["x", "y", "x"]))


def test_the_state_of_files_changes_with_them(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("one")
    before = files_state(file)
    assert json.loads(json.dumps(files_state(tmp_path)))[1][:2] == ["model.gguf", 3]
    file.write_text("other")
    assert files_state(file) != before and files_state(None) == []

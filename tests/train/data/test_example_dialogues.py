"""Dialogues made from rules: right answers, one style, nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

from fastllm.train.data.conversations import read_conversations
from fastllm.train.data.example_dialogues import (
    has_style,
    make_dialogues,
    same_result,
    write_dialogues,
)


def test_dialogues_are_conversations_that_the_seed_decides(tmp_path: Path) -> None:
    dialogues = make_dialogues(200, seed=3)
    assert dialogues == make_dialogues(200, seed=3) != make_dialogues(200, seed=4)
    read = list(read_conversations([write_dialogues(tmp_path / "x" / "d.jsonl", dialogues)]))
    assert [c.messages for c in read] == [d.record()["messages"] for d in dialogues]
    assert {len(c.messages) for c in read} == {2, 4}


def test_what_is_held_out_is_never_asked_in_training() -> None:
    def asked(holdout: bool) -> set[int]:
        dialogues = make_dialogues(400, holdout=holdout)
        return {q.number for d in dialogues for q in d.questions}

    assert len(asked(True)) > 50 and not asked(True) & asked(False)


def test_answers_are_right_and_their_style_and_result_can_be_checked() -> None:
    questions = [q for d in make_dialogues(500) for q in d.questions]
    for question in questions:
        assert has_style(question.reply) and same_result(question.reply, question.reply)
        assert not same_result(question.reply + "0", question.reply)
        assert same_result(f"Surely:\n{question.answer}.", question.reply)
        if "=" in question.work:
            left, _, right = question.work.replace("x", "*").partition("=")
            assert eval(left) == int(right) == int(question.answer.split()[0])
    assert not same_result(" ", "Work: 1\nAnswer: 1")
    assert not has_style("It is 36 inches.") and not has_style("Work: 1\nAnswer: 1\nmore")

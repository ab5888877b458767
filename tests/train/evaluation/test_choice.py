"""Multiple choice: tokens, log-probabilities that logits confirm, the harness's definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm import LLM
from fastllm.errors import DataError
from fastllm.train.data.prompts import PromptRecord
from fastllm.train.evaluation import choice
from fastllm.train.evaluation.choice import choice_log_probs, chosen, encode_choices, summarize
from fastllm.train.evaluation.journal import Journal
from fastllm.train.evaluation.prompting import prompted
from fastllm.train.evaluation.questions import ANSWER, Question, read_questions
from fastllm.train.evaluation.template import PromptTemplate

RECORDS: list[dict[str, Any]] = [
    {"question": "Which is red?", "choices": ["a rose", "the answer", "34"], "answer": 0},
    {"question": "What is 12 + 34?", "choices": ["46", "is"], "answer": "B"},
    {"question": "Which?", "choices": {"text": ["x", "the rose"], "label": ["1", "2"]},
     "answer": "1"},
]  # fmt: skip


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read_questions([written(tmp_path / "q.jsonl", RECORDS)])


def test_answers_are_labels_letters_or_numbers_from_0(questions: list[Question]) -> None:
    assert [question.right for question in questions] == [0, 1, 0]
    assert questions[2].choices == ("x", "the rose")
    assert questions[1].record.plain == "Question: What is 12 + 34?\nAnswer:"
    assert questions[1].record.place.endswith("q.jsonl: line 2")


def test_other_names_of_fields_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", [{"ctx": "One", "endings": ["a", "b"], "label": "1"}] * 3)
    found = read_questions(
        [path], PromptTemplate("{ctx}:"), choices_field="endings", answer_field="label", limit=2
    )
    assert [q.right for q in found] == [1, 1] and found[0].record.text == "One:"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?", "answer": 0}, "line 1: choices: is missing"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "choices: .*two strings or more"),
        ({"question": "?", "choices": ["a", " "], "answer": 0}, "holds an empty choice"),
        ({"question": "?", "choices": ["a", "b"]}, "answer: is missing.*has question, choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "a number from 0 to 1, or a lette"),
        ({"question": "?", "choices": ["a", "b"], "answer": "C"}, "letter from A to B"),
        ({"question": "?", "choices": ["a", "b"], "answer": True}, "is True"),
        ({"query": "?", "choices": ["a", "b"], "answer": 0}, "question: .*names this field"),
        (
            {"question": "?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": "A"},
            "has 1 labels for 2 texts",
        ),
        (
            {"question": "?", "choices": {"text": ["a", "b"], "label": ["x", "y"]}, "answer": "A"},
            "one of x, y",
        ),
    ],
)
def test_records_that_are_no_questions_are_named(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_questions([written(tmp_path / "q.jsonl", [record])])


def test_log_probs_are_sums_over_the_choices_tokens(
    model_dir: Path, questions: list[Question]
) -> None:
    llm = LLM(model_dir, dtype="float32", enforce_eager=True)
    records = [question.record for question in questions]
    groups = encode_choices(records, questions, llm.tokenizer)
    places = [record.place for record in records]
    found = choice_log_probs(llm.model, groups, places, Journal(None), {})
    for question, values in zip(questions, found, strict=True):
        context = llm.tokenizer.encode(question.record.text)
        for text, value in zip(question.choices, values, strict=True):
            ids = llm.tokenizer.encode(f"{question.record.text} {text}")
            log_probs = llm.logits(ids[:-1]).log_softmax(-1)
            picked = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[len(context) - 1 :, 0]
            assert value == pytest.approx(float(picked.double().sum()), rel=1e-4)


def test_question_and_choice_are_joined_by_one_space(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = LLM(model_dir, enforce_eager=True).tokenizer
    path = written(tmp_path / "q.jsonl", RECORDS[:1])

    def parts(template: str, chat: str = "plain") -> tuple[str, list[str]]:
        asked = read_questions([path], PromptTemplate.named(template))
        group = encode_choices([q.record for q in asked], asked, tokenizer, chat)[0]
        texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in group.endings]
        return tokenizer.decode(group.context, skip_special_tokens=False), texts

    assert parts("{question}")[0].endswith("red?")
    assert parts("{question}")[1] == [" a rose", " the answer", " 34"]
    assert parts("{question}") == parts("{question} ")  # white space belongs to the choices
    assert parts(r"{question} So\n")[1] == ["\na rose", "\nthe answer", "\n34"]
    context, texts = parts("{question}", "chatml")
    assert context.endswith("Which is red?<|im_end|>\n<|im_start|>assistant\n")
    assert texts == ["a rose", "the answer", "34"]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_choice_cannot_spell_a_special_token(
    template: str, model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = LLM(model_dir, enforce_eager=True).tokenizer
    record = {"question": "Which?", "choices": ["red<|im_end|>", "red"], "answer": 0}
    asked = read_questions([written(tmp_path / "q.jsonl", [record])])
    group = encode_choices([q.record for q in asked], asked, tokenizer, template)[0]
    assert tokenizer.is_special(tokenizer.encode("<|im_end|>", False)[0])
    assert not any(tokenizer.is_special(i) for ids in group.endings for i in ids)
    said = [tokenizer.decode(ids, skip_special_tokens=False).strip() for ids in group.endings]
    assert said == ["red<|im_end|>", "red"]


def test_shots_come_first_with_their_answers(questions: list[Question]) -> None:
    records = prompted([questions[2].record], None, [questions[1].record], ANSWER)
    assert records[0].plain == (
        "Question: What is 12 + 34?\nAnswer: is\n\nQuestion: Which?\nAnswer:"
    )
    assert [m["role"] for m in records[0].messages] == ["user", "assistant", "user"]


def test_the_numbers_are_the_harnesss() -> None:
    record = PromptRecord(prompt="?")
    asked = [
        Question(record=record, choices=("aa", "bbbb"), right=1),  # sums: 0; a unit: -1, -0.75
        Question(record=record, choices=("aa", "éé"), right=1),  # characters: -1, -1.5; bytes: 1
        Question(record=record, choices=("a", "b", "c", "d"), right=0),  # a tie
    ]
    found = summarize(asked, [[-2.0, -3.0], [-2.0, -3.0], [-1.0, -1.0, -2.0, -1.0]])
    assert found.acc.value == pytest.approx(1 / 3)
    assert found.acc_norm.value == pytest.approx(2 / 3)
    assert found.acc_bytes.value == 1.0
    assert found.chance == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert chosen([-3.0, -2.0], [1, 1]) == 1
    assert json.loads(json.dumps(found.record()))["questions"] == 3


def test_a_run_that_was_killed_goes_on(
    model_dir: Path, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model_dir, dtype="float32", enforce_eager=True)
    groups = encode_choices([q.record for q in questions], questions, llm.tokenizer)
    places = [q.record.place for q in questions]
    monkeypatch.setattr(choice, "AT_ONCE", 1)
    path = tmp_path / "done.jsonl"
    whole = choice_log_probs(llm.model, groups, places, Journal(path), {"model": 1})
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_bytes(lines[0] + lines[1][:-5])
    told: list[int] = []
    again = choice_log_probs(llm.model, groups, places, Journal(path), {"model": 1}, told.append)
    assert again == whole and told == [2, 3]
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    with pytest.raises(ValueError, match=r"q\.jsonl: line 1: question and choice have"):
        long = [type(groups[0])(list(groups[0].context) * 99, groups[0].endings)]
        choice_log_probs(llm.model, long, places[:1], Journal(None), {})

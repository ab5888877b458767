"""Accuracy: prompts and shots, samples that depend on nothing but the seed, numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm import LLM, SamplingParams
from fastllm.errors import DataError, RewardError
from fastllm.train.data.prompts import EncodedPrompt, PromptRecord, encode_prompts
from fastllm.train.evaluation import answers as answers_module
from fastllm.train.evaluation.accuracy import grade, summarize
from fastllm.train.evaluation.answers import Answers, sample_answers
from fastllm.train.evaluation.journal import Journal
from fastllm.train.evaluation.prompting import prompted
from fastllm.train.evaluation.template import PromptTemplate
from fastllm.train.rewards import resolve

RECORDS = [
    PromptRecord(prompt=f"What is {n} + 34?", columns={"answer": str(n + 34), "n": n},
                 place=f"line {n}")
    for n in range(1, 8)
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(model_dir, dtype="float32", enforce_eager=True, max_num_seqs=4)


def encoded(llm: LLM, records: list[PromptRecord] = RECORDS) -> list[EncodedPrompt]:
    return encode_prompts(records, llm.tokenizer, "plain")


def sampled(
    llm: LLM, problems: list[EncodedPrompt], samples: int = 3, path: Path | None = None,
    temperature: float = 20.0, seed: int = 5,
) -> list[Answers]:  # fmt: skip
    params = SamplingParams(temperature=temperature, max_tokens=12, seed=seed)
    return sample_answers(llm, problems, params, samples, Journal(path), {"model": "m"})


def test_templates_and_shots_make_conversations_and_text() -> None:
    shot = PromptRecord(prompt="1 + 1?", columns={"answer": "2", "solution": "It is\nAnswer: 2"})
    (found,) = prompted(RECORDS[:1], PromptTemplate("{n}: {question}"), [shot.__class__(
        prompt="1 + 1?", columns={**shot.columns, "n": 0})])  # fmt: skip
    assert found.plain == "0: 1 + 1? It is\nAnswer: 2\n\n1: What is 1 + 34?"
    assert found.messages == [
        {"role": "user", "content": "0: 1 + 1?"},
        {"role": "assistant", "content": "It is\nAnswer: 2"},
        {"role": "user", "content": "1: What is 1 + 34?"},
    ]
    (found,) = prompted(RECORDS[:1], None, [shot], "answer")
    assert found.plain == "1 + 1? 2\n\nWhat is 1 + 34?"
    system = PromptRecord(prompt=[{"role": "system", "content": "Be short."}, *shot.messages])
    roles = [m["role"] for m in prompted([system], None, [shot])[0].messages]
    assert roles == ["system", "user", "assistant", "user"]
    with pytest.raises(DataError, match="none in solution, completion, answer"):
        prompted(RECORDS, None, [PromptRecord(prompt="?")])


def test_samples_are_the_engines_and_depend_on_the_seed_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = encoded(llm)
    whole = sampled(llm, problems)
    assert all(len(found.texts) == 3 and len(set(found.texts)) > 1 for found in whole)
    assert sampled(llm, problems[::-1]) == whole[::-1]
    monkeypatch.setattr(answers_module, "QUEUED", 2)
    monkeypatch.setattr(answers_module, "MAX_SAMPLES", 2)
    parts = sampled(llm, problems[2:4])
    assert [found.texts[:2] for found in parts] == [found.texts[:2] for found in whole[2:4]]
    assert sampled(llm, problems, seed=6) != whole
    greedy = sampled(llm, problems, 1, temperature=0.0)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    outputs = llm.generate([list(problem.ids) for problem in problems], params)
    assert [found.texts[0] for found in greedy] == [o.outputs[0].text for o in outputs]
    assert [found.lengths[0] for found in greedy] == [len(o.outputs[0].token_ids) for o in outputs]
    cut = [found.truncated[0] for found in greedy]
    assert cut == [o.outputs[0].finish_reason == "length" for o in outputs]


def test_a_run_that_was_killed_ends_as_one_that_was_not(llm: LLM, tmp_path: Path) -> None:
    problems = encoded(llm)
    path = tmp_path / "done.jsonl"
    whole = sampled(llm, problems, path=path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(problems)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert sampled(llm, problems, path=path) == whole
    again = path.read_bytes().splitlines(keepends=True)
    assert again[:3] == lines[:3] and sorted(again) == sorted(lines)


def test_prompts_that_leave_no_room_are_named_before_anything_runs(
    llm: LLM, tmp_path: Path
) -> None:
    long = EncodedPrompt((5,) * 256, RECORDS[2])
    path = tmp_path / "done.jsonl"
    with pytest.raises(ValueError, match="line 3: the prompt has 256 tokens"):
        sampled(llm, [*encoded(llm), long], path=path)
    assert not path.exists()


def test_the_numbers_are_those_made_by_hand() -> None:
    def answers(*texts: str, cut: int = 0) -> Answers:
        lengths = list(range(1, len(texts) + 1))
        return Answers(texts=list(texts), lengths=lengths, truncated=[i < cut for i in lengths])

    records = RECORDS[:3]  # 35, 36, 37
    found = [
        answers("It is 35.", "35", "36", "no"),
        answers(*["0"] * 4, cut=2),
        answers(*["37"] * 4),
    ]
    rewards = grade(resolve(["exact_match"])[0], records, found)
    assert rewards == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    numbers = summarize(rewards, found, [1, 2, 4])
    assert numbers.accuracy.value == pytest.approx(0.5)
    assert numbers.accuracy.error == pytest.approx(0.5 / 3**0.5)
    assert numbers.pass_at[1].value == pytest.approx(0.5)
    assert numbers.pass_at[2].value == pytest.approx((1 - 1 / 6 + 0 + 1) / 3)
    assert numbers.pass_at[4].value == pytest.approx(2 / 3)
    assert numbers.truncated == pytest.approx(1 / 12) and numbers.length == 2.5
    assert numbers.record()["pass_at"]["2"]["value"] == numbers.pass_at[2].value
    with pytest.raises(ValueError, match="no problems"):
        summarize([], [])


def test_rewards_get_the_questions_as_they_were_read(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "def judge(prompts, completions, n, **columns):\n"
        "    assert prompts == [f'What is {k} + 34?' for k in n]\n"
        "    return [float(k % 2) for k in n]\n"
        "def broken(prompts, completions, **columns):\n"
        "    return [0.0 if 'a' in c else float('nan') for c in completions]\n"
    )
    found = [Answers(texts=["a", "b"], lengths=[1, 1], truncated=[False] * 2) for _ in RECORDS]
    rewards = grade(resolve([f"{file}:judge"])[0], RECORDS, found)
    assert rewards == [[n % 2] * 2 for n in range(1, 8)]
    with pytest.raises(RewardError, match="broken"):
        grade(resolve([f"{file}:broken"])[0], RECORDS, found)

"""Problems of tasks as records to learn from: a prompt, and an answer to imitate."""

from __future__ import annotations

from collections.abc import Iterator

from fastllm.train.tasks.making import make

COMPLETIONS = ("answer", "solution", "think")


def examples(
    name: str,
    count: int,
    seed: int = 0,
    split: str = "train",
    *,
    completion: str = "answer",
    plain: bool = False,
) -> Iterator[dict[str, str]]:
    """Records with prompt, completion, answer and task, as `fastllm sft` and `read_prompts` read.

    Args:
        name: see `make`; so are count, seed and split.
        completion: "answer" ("72"), "solution" (worked, then "Answer: 72"), or "think" (worked
            between <think> and </think>, then the answer).
        plain: for models without a chat template: "Question: ...\\nAnswer:" and " 72".

    Raises ValueError naming what no task has, or an unknown completion.
    """
    if completion not in COMPLETIONS:
        raise ValueError(f"completion must be one of {', '.join(COMPLETIONS)}, got {completion!r}")
    records = make(name, count, seed, split)
    for record in records:
        answer, solution = record.columns["answer"], record.columns["solution"]
        text = {"answer": answer, "solution": solution, "think": _thought(answer, solution)}
        prompt = record.plain if plain and record.plain is not None else record.text
        yield {
            "prompt": prompt,
            "completion": (" " if plain else "") + text[completion],
            "answer": answer,
            "task": record.columns["task"],
        }


def _thought(answer: str, solution: str) -> str:
    steps = solution.rpartition("\n")[0]
    return f"<think>\n{steps}\n</think>\n{answer}"

"""The demo's reward model: four answers to a question, ranked by a rule, and held-out rankings.

The rule is known, so it is known how many pairs are in the right order: a right answer that shows
its work is better than the bare result, which is better than an answer to another question, which
is better than none.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .demo_pretrain import rate, sparkline
from .demo_sft import losses
from .demo_stage import Part, Setting, read_lines

RANKINGS, HELD_OUT = 400, 60
LEAST = 0.85  # share of held-out pairs in the right order
NO_ANSWER = ("I do not know.", "That is hard to say.", "Let me think about that some other time.")


def reward(setting: Setting) -> Part:
    """Rankings, a reward model on the given model, and how it orders held-out ones.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..train import reward as stage

    out = setting.folder("reward")
    train = write_rankings(out / "rankings.jsonl", rankings(RANKINGS))
    held = rankings(HELD_OUT, holdout=True)
    result = stage.main(
        stage.load(
            None,
            [
                f"--model={setting.model}",
                f"--data={train}",
                f"--holdout={write_rankings(out / 'held-out.jsonl', held)}",
                f"--out={out / 'run'}",
                f"--loop.seconds={setting.seconds}",
                "--loop.eval_every=1000000",
                "--loop.save_every=1000000",
                "--loop.metrics.every=2",
            ],
        )
    )
    if result.run.status != "finished":
        raise KeyboardInterrupt
    assert result.before is not None and result.after is not None, "held-out rankings are there"
    records = read_lines(out / "run" / "metrics.jsonl")
    before, after = result.before.accuracy, result.after.accuracy
    curve = losses(records)
    return Part(
        record={
            "model": str(result.output),
            "accuracy": [before, after],
            "margin": result.after.margin,
            "calibration_error": result.after.ece,
            "tokens_per_second": rate(records),
        },
        facts=[
            ("loss", sparkline([loss for _, loss in curve])),
            ("held-out pairs", f"{before:.0%} in the right order before, {after:.0%} after"),
            ("calibration", f"confidence is off by {result.after.ece:.1%}"),
            ("reward model", str(result.output.resolve())),
        ],
        curves={"loss of pairs, over steps": [("", curve)]},
        tables=[judged(result.output, held[:3])],
        problem=None if after >= LEAST else f"{after:.0%} of the pairs are right, not {LEAST:.0%}",
    )


def rankings(count: int, *, holdout: bool = False) -> list[dict[str, Any]]:
    """Records of `fastllm reward`, four answers each in an order of chance."""
    from ..train.data.example_dialogues import make_dialogues

    asked = [d.questions[0] for d in make_dialogues(count, seed=1, holdout=holdout)]
    generator = random.Random(count)
    found = []
    for number, question in enumerate(asked):
        other = asked[(number + count // 2) % count]
        answers = [
            (question.reply, 1),
            (question.answer, 2),
            (other.reply, 3 if other.answer != question.answer else 1),
            (generator.choice(NO_ANSWER), 4),
        ]
        generator.shuffle(answers)
        texts, ranks = zip(*answers, strict=True)
        found.append({"prompt": question.text, "answers": texts, "ranks": ranks})
    return found


def write_rankings(path: Path, records: list[dict[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def judged(model: Path, records: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """A table of the scores of some held-out answers."""
    from ..train.reward_model import RewardModel

    judge = RewardModel(model)
    rows = []
    for record in records:
        scores = judge([record["prompt"]] * len(record["answers"]), record["answers"])
        order = sorted(zip(record["ranks"], record["answers"], scores, strict=True))
        for rank, answer, score in order:
            rows.append([record["prompt"], str(rank), answer, f"{score:+.2f}"])
    return "held-out answers", ["question", "rank", "answer", "score"], rows

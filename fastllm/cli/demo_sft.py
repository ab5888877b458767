"""The demo's fine-tuning: an adapter on the packed GGUF model learns a style from made dialogues.

Each answer is to show its work on one line and the result on the next. Held-out questions ask what
no training question did, so both the style and the answers are checked by a program.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import facts, heading
from .demo_pretrain import rate, sparkline

if TYPE_CHECKING:
    from ..train.sft import Answer, SftConfig

DIALOGUES = 600
HELD_OUT = 32
SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What came of it. Right and style are shares of the held-out questions, before and after."""

    adapter: Path
    loss: tuple[float, float]
    right: tuple[float, float]
    style: tuple[float, float]
    tokens_per_second: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "adapter": str(self.adapter),
            "loss": list(self.loss),
            "right": list(self.right),
            "style": list(self.style),
            "tokens_per_second": self.tokens_per_second,
        }


def sft_demo(out: Path, model: str, seconds: float) -> Tuned:
    """Dialogues, adapter, answers; everything below `out`.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..train import sft

    heading(f"An adapter on {model}, in {seconds:.0f} seconds")
    config = configuration(out, model, seconds)
    result = sft.main(config)
    if result.run.status != "finished":
        raise KeyboardInterrupt
    assert result.loss_before is not None and result.loss_after is not None, (
        "held-out data is there"
    )
    lines = (out / "run" / "metrics.jsonl").open(encoding="utf-8")
    records = [json.loads(line) for line in lines]
    before = score([answer.before for answer in result.answers], result.answers)
    after = score([answer.after for answer in result.answers], result.answers)
    done = Tuned(
        adapter=result.output,
        loss=(result.loss_before, result.loss_after),
        right=(before[0], after[0]),
        style=(before[1], after[1]),
        tokens_per_second=rate(records),
    )
    show(done, records, result.answers)
    return done


def configuration(out: Path, model: str, seconds: float) -> SftConfig:
    """The run, with its data made."""
    from ..train import sft
    from ..train.data.example_dialogues import make_dialogues, write_dialogues

    shutil.rmtree(out / "run", ignore_errors=True)
    train = write_dialogues(out / "dialogues.jsonl", make_dialogues(DIALOGUES))
    held = write_dialogues(out / "held-out.jsonl", make_dialogues(HELD_OUT, holdout=True))
    return sft.load(
        None,
        [
            f"--model={model}",
            f"--data={train}",
            f"--holdout={held}",
            f"--samples={HELD_OUT}",
            f"--out={out / 'run'}",
            f"--loop.seconds={seconds}",
            "--loop.eval_every=1000000",
            "--loop.save_every=1000000",
            "--loop.metrics.every=5",
        ],
    )


def score(texts: list[str], answers: list[Answer]) -> tuple[float, float]:
    """Shares of the texts whose last line is the result, and that have the style."""
    from ..train.data.example_dialogues import has_style, same_result

    right = sum(same_result(text, a.expected) for text, a in zip(texts, answers, strict=True))
    return right / len(texts), sum(map(has_style, texts)) / len(texts)


def show(done: Tuned, records: list[dict[str, Any]], answers: list[Answer]) -> None:
    """Numbers, curve, and some answers before and after."""
    for answer in answers[:SHOWN]:
        print(f"\n> {answer.prompt}")
        print(f"  before  {_inline(answer.before)}")
        print(f"  after   {_inline(answer.after)}")
    print()
    facts(
        [
            ("loss", sparkline([r["loss"] for r in records if "loss" in r])),
            ("held-out loss", f"{done.loss[0]:.3f} before, {done.loss[1]:.3f} after"),
            ("right answers", f"{done.right[0]:.0%} before, {done.right[1]:.0%} after"),
            ("in the style", f"{done.style[0]:.0%} before, {done.style[1]:.0%} after"),
            ("trained", f"{done.tokens_per_second:,.0f} learned tokens a second"),
            ("adapter", str(done.adapter.resolve())),
        ]
    )


def _inline(text: str, length: int = 160) -> str:
    text = " | ".join(line for line in text.splitlines() if line.strip())
    return text if len(text) <= length else text[: length - 3] + "..."

"""The demo's fine-tuning: an adapter on the packed GGUF model learns a style from made dialogues.

Each answer is to show its work on one line and the result on the next. Held-out questions ask what
no training question did, so both the style and the answers are checked by a program. The adapter is
merged at the end: the stages after this one go on with that model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_pretrain import rate, sparkline
from .demo_stage import Part, Points, Setting, read_lines, shortened

if TYPE_CHECKING:
    from ..train.sft import Answer, SftConfig

DIALOGUES = 600
HELD_OUT = 32
SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What came of it. Right and style are shares of the held-out questions, before and after."""

    adapter: Path
    model: Path  # the adapter merged, a Hugging Face directory
    loss: tuple[float, float]
    right: tuple[float, float]
    style: tuple[float, float]
    tokens_per_second: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "adapter": str(self.adapter),
            "model": str(self.model),
            "loss": list(self.loss),
            "right": list(self.right),
            "style": list(self.style),
            "tokens_per_second": self.tokens_per_second,
        }


def sft(setting: Setting) -> Part:
    """Dialogues, adapter, answers, the merged model.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..train import sft as stage

    out = setting.folder("sft")
    result = stage.main(configuration(out, setting.model, setting.seconds))
    if result.run.status != "finished":
        raise KeyboardInterrupt
    assert result.loss_before is not None and result.loss_after is not None, (
        "held-out data is there"
    )
    records = read_lines(out / "run" / "metrics.jsonl")
    before = score([answer.before for answer in result.answers], result.answers)
    after = score([answer.after for answer in result.answers], result.answers)
    done = Tuned(
        adapter=result.output,
        model=merge(setting.model, result.output, out / "model"),
        loss=(result.loss_before, result.loss_after),
        right=(before[0], after[0]),
        style=(before[1], after[1]),
        tokens_per_second=rate(records),
    )
    return shown(done, records, result.answers)


def configuration(out: Path, model: str, seconds: float) -> SftConfig:
    """The run, with its data made."""
    from ..train import sft as stage

    train, held = dialogues(out)
    return stage.load(
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


def dialogues(out: Path, count: int = DIALOGUES) -> tuple[Path, Path]:
    """Files of dialogues to learn from, and of such whose questions are not among them."""
    from ..train.data.example_dialogues import make_dialogues, write_dialogues

    train = write_dialogues(out / "dialogues.jsonl", make_dialogues(count))
    return train, write_dialogues(out / "held-out.jsonl", make_dialogues(HELD_OUT, holdout=True))


def merge(model: str | Path, adapter: Path, out: Path) -> Path:
    """Write a model with its adapter merged, in bfloat16."""
    from ..models.adapters import read_adapter
    from ..models.gguf_export import export_hf, weights_of
    from ..models.loader import read_tokenizer
    from ..models.names import resolve
    from ..models.weights import open_weights

    source = open_weights(resolve(model))
    weights = weights_of(source, read_adapter(adapter))
    export_hf(weights, out, "bf16", read_tokenizer(source), overwrite=True)
    return out


def score(texts: list[str], answers: list[Answer]) -> tuple[float, float]:
    """Shares of the texts whose last line is the result, and that have the style."""
    from ..train.data.example_dialogues import has_style, same_result

    right = sum(same_result(text, a.expected) for text, a in zip(texts, answers, strict=True))
    return right / len(texts), sum(map(has_style, texts)) / len(texts)


def losses(records: list[dict[str, Any]], name: str = "loss") -> Points:
    """(step, value) of the lines of metrics that have it."""
    return [(r["step"], r[name]) for r in records if name in r]


def shown(done: Tuned, records: list[dict[str, Any]], answers: list[Answer]) -> Part:
    """Numbers, curve, and some answers before and after."""
    for answer in answers[:SHOWN]:
        print(f"\n> {answer.prompt}")
        print(f"  before  {shortened(answer.before)}")
        print(f"  after   {shortened(answer.after)}")
    curve = losses(records)
    return Part(
        record=done.record(),
        facts=[
            ("loss", sparkline([loss for _, loss in curve])),
            ("held-out loss", f"{done.loss[0]:.3f} before, {done.loss[1]:.3f} after"),
            ("right answers", f"{done.right[0]:.0%} before, {done.right[1]:.0%} after"),
            ("in the style", f"{done.style[0]:.0%} before, {done.style[1]:.0%} after"),
            ("trained", f"{done.tokens_per_second:,.0f} learned tokens a second"),
            ("adapter", str(done.adapter.resolve())),
            ("merged", str(done.model.resolve())),
        ],
        curves={"training loss, nats a token, over steps": [("", curve)]},
        samples=[
            (answer.prompt, f"before: {answer.before}\n\nafter: {answer.after}")
            for answer in answers[:SHOWN]
        ],
    )

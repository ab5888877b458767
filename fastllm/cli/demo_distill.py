"""The demo's distillation: the fine-tuned model's probabilities, learned by a small new model.

Logits are compared id by id, so the student has the teacher's vocabulary, and is a model of its
own: the pretrained ones have a small vocabulary of this Python's texts. The teacher reads the
dialogues once, and its likeliest ids are stored. Then two students begin with the same random
weights and take the same steps: one learns the teacher's probabilities, the other the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .demo_pretrain import rate, sparkline
from .demo_sft import dialogues, losses
from .demo_stage import Part, Setting, read_lines

if TYPE_CHECKING:
    from ..train.distill import DistillResult

DIALOGUES, QUICK_DIALOGUES = 600, 200
TOP_K = 64  # of the teacher's probabilities at each token
SHAPE = ("--student.layers=4", "--student.width=256", "--student.tied=true")
PROMPTS = ("How many inches are 7 feet?", "What day of the week comes 3 days after Friday?")


def distill(setting: Setting) -> Part:
    """The teacher's answers, two students, and how near each has come.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..train import distill as stage

    out = setting.folder("distill")
    tuned = setting.found("sft/model")
    teacher = setting.model if tuned is None else str(tuned)
    train, held = dialogues(out, QUICK_DIALOGUES if setting.quick else DIALOGUES)
    data = [f"--data={train}", f"--holdout={held}", "--seq_len=256", "--samples=0"]
    stored = out / "teacher"
    stage.main(
        stage.load(
            None,
            ["--model=new", *data, f"--teacher={teacher}", f"--store_top_k={TOP_K}",
             f"--out={stored}"],
        )
    )  # fmt: skip
    # A constant rate: of the first run the seconds are given, of the second the steps, and both
    # are to have the same rate at every step.
    words = ["--model=new", *SHAPE, "--method=full", *data, f"--teacher={stored}",
             "--epochs=1000", "--batch_size=8", "--lr=1e-3", "--loop.schedule.kind=constant",
             "--loop.schedule.warmup=10", "--loop.save_every=1000000", "--loop.eval_every=20",
             "--loop.metrics.every=5"]  # fmt: skip
    taught = _student(words, out / "taught", [f"--loop.seconds={setting.seconds / 2}"])
    steps = f"--loop.steps={taught.run.step}"
    alone = _student(words, out / "text-alone", ["--alpha=0", steps])
    return shown(out, taught, alone)


def _student(words: Sequence[str], out: Path, more: Sequence[str]) -> DistillResult:
    from ..train import distill as stage

    result = stage.main(stage.load(None, [*words, f"--out={out}", *more]))
    assert isinstance(result, stage.DistillResult), "a student was trained"
    if result.run.status != "finished":
        raise KeyboardInterrupt
    return result


def shown(out: Path, taught: DistillResult, alone: DistillResult) -> Part:
    """Numbers, curves and answers; a problem if the teacher was of no use."""
    assert taught.before and taught.after and alone.after, "held-out dialogues are there"
    lines = {name: read_lines(out / name / "metrics.jsonl") for name in ("taught", "text-alone")}
    divergence = {"before": taught.before[0], "taught": taught.after[0], "text": alone.after[0]}
    saved = 1 - divergence["taught"] / divergence["text"]
    problem = None
    if saved <= 0:
        problem = "the student that was taught is no nearer to its teacher than the other"
    return Part(
        record={
            "model": str(taught.output),
            "kl": divergence,
            "below_text_alone": saved,
            "steps": taught.run.step,
            "tokens_per_second": rate(lines["taught"]),
        },
        facts=[
            ("divergence", sparkline([v for _, v in losses(lines["taught"], "eval_kl")])
             + " nats from the teacher, held out"),
            ("beside text alone", f"{divergence['taught']:.3f} and {divergence['text']:.3f} after "
                                  f"{taught.run.step} steps each: {saved:.0%} less"),
            ("trained", f"{rate(lines['taught']):,.0f} learned tokens a second"),
            ("student", str(taught.output.resolve())),
        ],
        curves={
            "KL divergence from the teacher, nats a held-out token, over steps": [
                ("taught", losses(lines["taught"], "eval_kl")),
                ("text alone", losses(lines["text-alone"], "eval_kl")),
            ],
        },
        samples=answers(taught.output),
        problem=problem,
    )  # fmt: skip


def answers(model: Path) -> list[tuple[str, str]]:
    """What the student says."""
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams

    llm = LLM(model)
    params = SamplingParams(temperature=0.0, max_tokens=48)
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [output.outputs[0].text for output in llm.chat(talks, params)]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        print(f"\n> {prompt}\n{text}")
    return list(zip(PROMPTS, texts, strict=True))

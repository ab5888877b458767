"""The demo's reinforcement learning: sums and differences of two digits, rewarded where right.

The policy begins as the fine-tuned model, which shows its work, and is told nothing but whether its
result is right. Its greedy answers to held-out problems are counted before, on the way and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .demo_pretrain import rate, sparkline
from .demo_sft import losses, merge
from .demo_stage import Part, Setting, read_lines

TASK = "arithmetic:2"
EVALUATED, QUICK_EVALUATED = 200, 100  # held-out problems
GROUP, PROMPTS = 8, 16  # samples of a problem, problems of a step
LONGEST = 40  # tokens of an answer
TEMPERATURE = 1.2  # fine-tuning has left little to chance, and equal samples teach nothing


def grpo(setting: Setting) -> Part:
    """Train, and merge the adapter.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..train import grpo as stage

    out = setting.folder("grpo")
    start = setting.found("sft/model")
    model = setting.model if start is None else str(start)
    result = stage.main(stage.load(None, overrides(setting, model, out / "run")))
    if result.run.status != "finished":
        raise KeyboardInterrupt
    merge(model, result.output, out / "model")
    return shown(out, read_lines(out / "run" / "metrics.jsonl"))


def overrides(setting: Setting, model: str, run: Path) -> list[str]:
    """The run, as `fastllm grpo` takes it."""
    return [
        f"--model={model}",
        f"--data={TASK}",
        "--rewards=exact_match",
        "--algorithm=dr_grpo",  # no reference model: its pass would be a third of a step
        f"--temperature={TEMPERATURE}",
        "--lr=3e-4",
        f"--group_size={GROUP}",
        f"--prompts_per_rollout={PROMPTS}",
        f"--max_completion={LONGEST}",
        f"--eval_prompts={QUICK_EVALUATED if setting.quick else EVALUATED}",
        f"--out={run}",
        f"--loop.seconds={setting.seconds}",
        "--loop.steps=1000000",  # the seconds end it
        "--loop.schedule.warmup=2",
        "--loop.eval_every=8",
        "--loop.save_every=1000000",
    ]


def shown(out: Path, records: list[dict[str, Any]]) -> Part:
    """Numbers, curves and samples of the last step. A problem if neither held-out accuracy nor the
    samples' reward has risen (of 100 problems accuracy is known to 5 points, which a quick run may
    not gain), or if rollouts and training differ in a single bit."""
    accuracy = losses(records, "eval_exact_match")
    rewards = losses(records, "reward")
    before, after = accuracy[0][1], accuracy[-1][1]
    difference = max(r.get("logprob_difference", 0.0) for r in records)
    phases = phase_seconds(records)
    problem = None
    if after <= before and not _rose([value for _, value in rewards]):
        problem = f"accuracy did not rise: {before:.0%} before, {after:.0%} after"
    if difference != 0:
        problem = f"log-probabilities of rollout and training differ by {difference:g}"
    return Part(
        record={
            "model": str(out / "model"),
            "accuracy": [before, after],
            "curve": [list(point) for point in accuracy],
            "steps": records[-1]["step"],
            "logprob_difference": difference,
            "seconds_per_step": phases,
            "tokens_per_second": rate(records),
        },
        facts=[
            ("accuracy", sparkline([100 * value for _, value in accuracy]) + " %, held out"),
            ("reward", sparkline([value for _, value in rewards])),
            ("steps", f"{records[-1]['step']} of {PROMPTS} problems, {GROUP} answers each"),
            ("a step", ", ".join(f"{name} {s:.2f} s" for name, s in phases.items())),
            ("rollout and training", f"largest difference of log-probabilities: {difference:g}"),
            ("model", str((out / "model").resolve())),
        ],
        curves={
            "share of right answers, over steps": [("held out", accuracy), ("rollouts", rewards)],
            "tokens of an answer, over steps": [("", losses(records, "completions/mean_length"))],
        },
        samples=samples(out / "run" / "samples.jsonl"),
        problem=problem,
    )


def phase_seconds(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of each phase of a step."""
    found = {}
    for name in ("rollout", "reward", "update"):
        values = [value for _, value in losses(records, f"seconds/{name}")]
        found[name] = sum(values) / max(len(values), 1)
    return found


def samples(path: Path, count: int = 3) -> list[tuple[str, str]]:
    """The last rollout's first answers."""
    rows = read_lines(path) if path.exists() else []
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return [(_text(row["prompt"]), f"{row['completion']}\n\nreward {row['reward']:g}")
            for row in last[:count]]  # fmt: skip


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _rose(values: list[float]) -> bool:
    """Whether the last quarter's mean is above the first's."""
    part = max(len(values) // 4, 1)
    return sum(values[-part:]) > sum(values[:part])

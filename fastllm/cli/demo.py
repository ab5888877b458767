"""`fastllm demo`: the machine, three answers, speeds, models from nothing, a model fine-tuned."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench, doctor
from .answering import load, print_stream, sampling_params
from .console import console, heading, note
from .parsing import add_model_options, add_sampling_options, command_parser

if TYPE_CHECKING:
    from ..testing.suite import BenchCase, Row, Work

DESCRIPTION = """
Shows what the machine offers and that every op is right on it, then, one part after the other:

  answers   streams the answers to three prompts
  speed     measures generation, reading of prompts and training beside transformers (in whichever
            of bfloat16 and float32 is faster) and llama.cpp, if they are installed, on the same
            model
  pretrain  trains a tokenizer and two small models, a mixture of experts and a dense one of equal
            active size, on the documentation and the sources of this Python, for two minutes in
            all, and compares them with gzip -9 on files that they never saw
  sft       fine-tunes the model with an adapter on dialogues made here, for 90 seconds, and asks
            it held-out questions before and after

Writes demo.json (speeds), demo.png, training.json, and the runs with their reports.
"""

EXAMPLES = """
fastllm demo
fastllm demo --quick
fastllm demo --parts pretrain,sft --out results
fastllm demo --model ./model.gguf --parts answers,speed
"""

PARTS = ("answers", "speed", "pretrain", "sft")
SECONDS = {"pretrain": 120.0, "sft": 90.0}
QUICK_SECONDS = 20.0
# Training steps to measure: models of the shapes that the trainings have, and batches like theirs.
STEPS = {"pretrain": ("3M", "full", 7, 512), "sft": ("135M", "lora", 2, 128)}
PROMPTS = (
    "What is photosynthesis? Answer in one sentence.",
    "Name three primary colors.",
    "Explain gravity to a child in one sentence.",
)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("demo", DESCRIPTION, EXAMPLES)
    parser.add_argument("--model", default="smollm2", help="default: smollm2")
    parser.add_argument("--out", default="out", metavar="FOLDER", help="default: out")
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="PARTS", help=f"default: {','.join(PARTS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="trainings of 20 seconds, and no speeds"
    )
    add_sampling_options(parser, temperature=0.0, max_tokens=96)
    add_model_options(parser)
    options = parser.parse_args(list(argv))
    parts = chosen_parts(options.parts, quick=options.quick)
    report = doctor.examine()
    doctor.show(report, short=True)
    out = Path(options.out)
    if "answers" in parts:
        _answer(options)
    if "speed" in parts:
        _measure(options.model, options.device or "cpu", out, parts)
    _train(parts, options, out)
    return 1 if any(outcome["problem"] for outcome in report["self_test"]) else 0


def chosen_parts(names: str, *, quick: bool = False) -> list[str]:
    """The parts that `names` lists, in their order. Raises ValueError naming one that is none."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in PARTS:
            raise ValueError(f"--parts names {name!r}; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in asked and not (quick and part == "speed")]


def _answer(options: Any) -> None:
    heading("Three prompts")
    llm = load(options)
    params = sampling_params(options)
    for prompt in PROMPTS:
        console().print(f"\n> {prompt}", style="bold", markup=False)
        _, speed = print_stream(
            llm.chat([{"role": "user", "content": prompt}], params, stream=True)
        )
        note(f"[{speed}]")


def _train(parts: Sequence[str], options: Any, out: Path) -> None:
    """The trainings among the parts, and their numbers in training.json."""
    records: dict[str, Any] = {}
    for part in ("pretrain", "sft"):
        if part not in parts:
            continue
        seconds = QUICK_SECONDS if options.quick else SECONDS[part]
        start = time.perf_counter()
        if part == "pretrain":
            from .demo_pretrain import pretrain_demo

            records[part] = pretrain_demo(out / part, seconds).record()
        else:
            from .demo_sft import sft_demo

            records[part] = sft_demo(out / part, options.model, seconds).record()
        records[part]["seconds"] = round(time.perf_counter() - start, 1)
    if records:
        text = json.dumps(records, indent=2) + "\n"
        (out / "training.json").write_text(text, encoding="utf-8")


def _measure(model: str, device: str, folder: Path, parts: Sequence[str]) -> None:
    from ..bench.bench_train import step_case
    from ..testing.suite import Settings, run_cases

    heading("Speed beside its peers, measured in turn on the same model")
    settings = Settings(quick=True, model=model, device=device)
    suites = bench.find_suites()
    firsts = (itertools.islice(suites[name].cases(settings), 1) for name in ("prefill", "decode"))
    steps = (step_case(settings, *STEPS[part]) for part in STEPS if part in parts)
    notes: dict[str, None] = {}

    def report(case: BenchCase, row: Row, work: Work) -> None:
        note(f"  {case}: {row.value:g} {row.unit}")
        notes.update(dict.fromkeys(work.notes))

    rows = run_cases(itertools.chain(*firsts, steps), report)
    bench.show(rows)
    for line in notes:
        print(f"  {line}")
    bench.write_rows(folder / "demo.json", rows)
    print(f"rows: {(folder / 'demo.json').resolve()}")
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there is no picture (pip install matplotlib)")
        return
    print(f"picture: {draw(rows, folder / 'demo.png').resolve()}")


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Bars of ours and the peers, one panel a row, with the machine's bound as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(rows), 1, figsize=(8, 0.9 + 1.5 * len(rows)), layout="constrained", squeeze=False
    )
    for axes, row in zip(panels[:, 0], rows, strict=True):
        _panel(axes, row)
    figure.suptitle(f"{rows[0].device}", fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _panel(axes: Any, row: Row) -> None:
    values = {"fastllm": row.value, **row.peers}
    names = sorted(values, key=lambda name: values[name])
    colors = ["#1f6feb" if name == "fastllm" else "#b8c0cc" for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colors, height=0.62)
    labels = [
        f"{values[name]:,.0f}"
        + (f"  (fastllm {row.ratio[name]:.2f}x)" if name in row.ratio else "")
        for name in names
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set_title(f"{row.suite}: {row.case}, {row.unit}", loc="left", fontsize=10)
    widest = max(values.values())
    if row.bound is not None and row.bound < 2.5 * widest:
        axes.axvline(row.bound, color="#d1242f", linestyle="--", linewidth=1)
        axes.annotate(
            "machine's bound", (row.bound, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", va="bottom",
            fontsize=8, color="#d1242f",
        )  # fmt: skip
        widest = max(widest, row.bound)
    axes.set_xlim(0, 1.25 * widest)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)

"""`fastllm demo`: the whole life of a language model on this machine, one stage after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from . import doctor
from .console import heading, human_bytes, table
from .demo_stage import Outcome, Part, Setting, Stage, check_folder, run_stage
from .parsing import add_model_options, add_sampling_options, command_parser

DESCRIPTION = """
Shows what the machine offers and that every op is right on it, then a model's whole life:

{stages}

That takes some {full:.0f} minutes on two cores, with --quick {quick:.0f}. A stage uses what those
before it have left in the folder --out, and the given model where they have left nothing, so each
can be run alone (--parts). One that fails says so, the others are run all the same, and the exit
status is 1.

Writes report.html, with curves, samples, speeds and peers of all stages, demo.json, and a folder
for each stage, with its runs and models.
"""

EXAMPLES = """
fastllm demo
fastllm demo --quick
fastllm demo --parts pretrain,sft --out results
fastllm demo --model ./model.gguf --parts answers,speed
"""


def _later(module: str, function: str) -> Any:
    """A stage's function, imported when it runs: the help of the command loads nothing."""

    def run(setting: Setting) -> Part:
        part = getattr(import_module(f"{__package__}.{module}"), function)(setting)
        assert isinstance(part, Part), "stages return what they show"
        return part

    return run


STAGES = (
    Stage(name="answers", title="Three prompts", run=_later("demo_answers", "answers")),
    Stage(
        name="speed",
        title="Speed beside its peers, measured in turn on the same model",
        run=_later("demo_speed", "speed"),
        in_quick=False,
    ),
    Stage(
        name="pretrain",
        title="A tokenizer and two models of your own Python's texts, from nothing",
        run=_later("demo_pretrain", "pretrain"),
        training=120,
        quick=25,
    ),
    Stage(
        name="sft",
        title="Fine-tuning: an adapter learns a style from dialogues",
        run=_later("demo_sft", "sft"),
        training=90,
        quick=40,
    ),
    Stage(
        name="reward",
        title="A reward model of ranked answers",
        run=_later("demo_reward", "reward"),
        training=60,
        quick=25,
    ),
    Stage(
        name="grpo",
        title="GRPO: arithmetic by trial and error",
        run=_later("demo_grpo", "grpo"),
        training=300,
        quick=100,
    ),
    Stage(
        name="distill",
        title="Distillation of the fine-tuned model into a small one",
        run=_later("demo_distill", "distill"),
        training=120,
        quick=40,
    ),
    Stage(
        name="quantize",
        title="The result in fewer bits",
        run=_later("demo_quantize", "quantize"),
    ),
    Stage(name="chat", title="A talk with the result", run=_later("demo_answers", "chat")),
)
WHAT = {
    "answers": "the answers of the model as it comes, to three prompts",
    "speed": "generation, reading of prompts and training beside transformers and llama.cpp",
    "pretrain": "a mixture of experts and a dense model of equal active size, beside gzip -9",
    "sft": "an adapter on made dialogues; held-out questions before and after",
    "reward": "which of four answers is the better one; held-out rankings",
    "grpo": "two-digit sums, rewarded where they are right; accuracy before, during and after",
    "distill": "a new small model learns the fine-tuned one's probabilities, another the text",
    "quantize": "sizes, perplexity and accuracy in 16, 8 and 4 bits",
    "chat": "a talk with the model in 4 bits",
}
MINUTES, QUICK_MINUTES = 20.0, 8.0  # in all, on two quiet cores


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("demo", _description(), EXAMPLES)
    parser.add_argument("--model", default="smollm2", help="default: smollm2")
    parser.add_argument("--out", default="out", metavar="FOLDER", help="default: out")
    names = ",".join(stage.name for stage in STAGES)
    parser.add_argument("--parts", default=names, metavar="PARTS", help=f"default: {names}")
    parser.add_argument("--quick", action="store_true", help="shorter trainings, and no speeds")
    add_sampling_options(parser, temperature=0.0, max_tokens=96)
    add_model_options(parser)
    options = parser.parse_args(list(argv))
    stages = chosen_stages(options.parts, quick=options.quick)
    out = Path(options.out)
    for stage in stages:
        check_folder(out / stage.name)
    out.mkdir(parents=True, exist_ok=True)
    report = doctor.examine()
    doctor.show(report, short=True)
    outcomes: list[Outcome] = []
    for stage in stages:
        outcomes.append(run_stage(stage, _setting(stage, options, out)))
        _write(out, outcomes, report)  # whatever happens to the next ones
    _summary(out, outcomes)
    wrong = any(outcome["problem"] for outcome in report["self_test"])
    return 1 if wrong or any(outcome.failed for outcome in outcomes) else 0


def chosen_stages(names: str, *, quick: bool = False) -> list[Stage]:
    """The stages that `names` lists, in their order. Raises ValueError naming one that is none."""
    known = [stage.name for stage in STAGES]
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise ValueError(f"--parts names {name!r}; there are {', '.join(known)}")
    return [s for s in STAGES if s.name in asked and (s.in_quick or not quick)]


def _description() -> str:
    width = max(len(name) for name in WHAT)
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in WHAT.items())
    return DESCRIPTION.format(stages=lines, full=MINUTES, quick=QUICK_MINUTES)


def _setting(stage: Stage, options: Any, out: Path) -> Setting:
    return Setting(
        root=out,
        model=options.model,
        seconds=stage.quick if options.quick else stage.training,
        quick=options.quick,
        options=options,
    )


def _write(out: Path, outcomes: Sequence[Outcome], machine: Any) -> None:
    """demo.json and report.html, of the stages so far."""
    from .demo_report import write_report

    records = {
        outcome.stage.name: {
            **outcome.part.record,
            "seconds": round(outcome.seconds, 1),
            "cpu_seconds": round(outcome.cpu_seconds, 1),
            "problem": outcome.part.problem,
        }
        for outcome in outcomes
    }
    text = json.dumps(records, indent=2) + "\n"
    (out / "demo.json").write_text(text, encoding="utf-8")
    write_report(out / "report.html", outcomes, _machine(machine))


def _machine(report: Any) -> dict[str, str]:
    """What the report says of the machine."""
    from .. import __version__

    kinds = ", ".join(report["accelerators"]) or "none"
    return {
        "fastllm": __version__,
        "processor": f"{report['processor']}, {report['cores']} cores, {report['isa']}",
        "GPU": kinds,
        "memory": human_bytes(report["memory_bytes"]),
        "versions": ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
    }


def _summary(out: Path, outcomes: Sequence[Outcome]) -> None:
    heading("All of it")
    rows = [[o.stage.name, f"{o.seconds:.0f} s", "FAILED" if o.failed else "ok"] for o in outcomes]
    table(["stage", "time", "result"], rows, right=["time"])
    print(f"{sum(outcome.seconds for outcome in outcomes) / 60:.1f} minutes in all")
    print(f"report: {(out / 'report.html').resolve()}")

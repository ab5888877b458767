"""Run transformers' own model tests with fastllm and without, and tell every difference.

Usage: python -P tools/transformers_tests.py CHECKOUT [--models llama,qwen3] [--whole] [--json FILE]

CHECKOUT is a checkout of transformers at the tag of the installed version: its tests/ folder judges
the transformers that is installed. The attention, generation, training and batching tests of each
model run once as they are and once with fastllm registered in place of the default attention and
experts; --whole runs them a third time with every model patched, norms, rotary embedding, MLP and
loss included. Tests that need a network, a GPU or many minutes are not selected.

The exit status is 0 if no test that passes without fastllm fails with it, unless for a reason that
is written down here, 1 otherwise, 2 where there is nothing to run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parent
MODELS = ("llama", "qwen3", "gemma3", "mixtral")
SELECTED = (
    "attention", "sdpa", "batch", "padding", "generate", "decoding", "cache", "training",
    "checkpointing", "checkpoint_", "logits_to_keep", "loss", "rope", "retain_grad", "outputs",
    "hidden_states", "inputs_embeds", "determinism", "mask", "router_logits", "past_key_values",
)  # fmt: skip
# Several processes, other libraries' kernels, files of the network, or no model code of ours.
LEFT_OUT = (
    "flash", "flex", "fsdp", "hsdp", "test_tp_", "pipeline", "parallel", "deepspeed", "offload",
    "features", "from_pretrained_no_checkpoint", "mtp", "peft",
)  # fmt: skip
COMPILED = ("compil",)  # minutes each
# mode -> part of a test's id -> why a failure with fastllm that is none without it is right
REASONS = {
    "whole": {
        "test_attention_outputs": "config.output_attentions may be set only while the attention is "
        'named "eager"; patch(model) names another. The argument of the call works',
        "test_can_set_attention_dynamically": "it asks for the name of the attention that it had "
        "set",
    },
}
NEEDED = ("transformers", "pytest", "parameterized", "httpx")
MODES = {"plain": "unpatched", "registered": "registered", "whole": "whole model"}


@dataclass(frozen=True, slots=True)
class Checkout:
    """A transformers checkout: where, which version its sources declare, which commit it is."""

    path: Path
    version: str
    commit: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A test whose outcome with fastllm is not the one without; `reason` where it is known."""

    id: str
    mode: str
    plain: str
    patched: str
    line: str
    reason: str


class UnusableError(Exception):
    """There is nothing to run; the message tells what is missing and how to get it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests; returns the exit status."""
    options = parse(arguments)
    try:
        checkout = read_checkout(options.checkout)
        check_packages()
        files = test_files(checkout.path, options.models.split(","))
    except UnusableError as error:
        print(error, file=sys.stderr)
        return 2
    warn_of_version(checkout)
    modes = ("plain", "registered", *(("whole",) if options.whole else ()))
    selection = expression(options.k, options.compile)
    runs = {mode: run_tests(checkout.path, files, mode, selection) for mode in modes}
    if not all(runs.values()):
        print("pytest ran no test: see its messages above", file=sys.stderr)
        return 2
    found = [d for mode in modes[1:] for d in differences(runs["plain"], runs[mode], mode)]
    result = {
        "transformers": installed_version(),
        "checkout": checkout.version,
        "commit": options.commit or checkout.commit,
        "date": time.strftime("%Y-%m-%d"),
        "selection": selection,
        "counts": {mode: counts(runs[mode]) for mode in modes},
        "differences": [asdict(d) for d in found],
    }
    print(render(result, found))
    if options.json:
        text = json.dumps(result, indent=1, ensure_ascii=False)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 1 if any(is_worse(d) and not d.reason for d in found) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", nargs="?", help="a checkout of transformers")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument(
        "-k", default="", metavar="EXPR", help="run only tests that pytest's -k takes"
    )
    parser.add_argument("--whole", action="store_true", help="a third run, every model patched")
    parser.add_argument("--compile", action="store_true", help="tests of torch.compile too")
    parser.add_argument("--commit", default="", help="name of the tests, where git does not say it")
    parser.add_argument("--json", default=None, metavar="FILE", help="write counts and differences")
    return parser.parse_args(arguments)


def installed_version() -> str:
    """Of the transformers that is judged."""
    import transformers

    return str(transformers.__version__)


def how_to_get() -> str:
    """The command that makes a checkout of the right version."""
    url = "https://github.com/huggingface/transformers"
    return f"git clone --depth 1 --branch v{installed_version()} {url}"


def read_checkout(path: str | None) -> Checkout:
    """Version and commit of a checkout.

    Raises:
        UnusableError: no path, or no checkout there.
    """
    if path is None:
        raise UnusableError(f"give the path of a transformers checkout: {how_to_get()}")
    root = Path(path).resolve()
    source = root / "src" / "transformers" / "__init__.py"
    if not source.is_file() or not (root / "tests" / "models").is_dir():
        raise UnusableError(
            f"{root} is no transformers checkout: it needs src/transformers/__init__.py and "
            f"tests/models; {how_to_get()}"
        )
    found = re.search(r'^__version__ = "([^"]+)"', source.read_text(encoding="utf-8"), re.M)
    version = found[1] if found else "unknown"
    run = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"],
        capture_output=True, text=True,
    )  # fmt: skip
    lines = run.stdout.split()
    inside = run.returncode == 0 and Path(lines[0]) == root
    return Checkout(root, version, lines[1] if inside else "no git work tree")


def check_packages() -> None:
    """Raises UnusableError naming the packages that the tests import and that are absent."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise UnusableError(f"transformers' tests import {absent}: pip install {' '.join(absent)}")


def warn_of_version(checkout: Checkout) -> None:
    """Say on stderr where tests and sources are of two versions."""
    installed = installed_version()
    if checkout.version != installed:
        print(
            f"warning: the tests are of transformers {checkout.version}, installed is {installed}; "
            f"for the matching ones: {how_to_get()}",
            file=sys.stderr,
        )


def test_files(root: Path, models: Sequence[str]) -> list[str]:
    """The test files of the models, relative to the checkout."""
    files = []
    for name in models:
        path = Path("tests", "models", name, f"test_modeling_{name}.py")
        if not (root / path).is_file():
            raise UnusableError(f"--models: the checkout has no {path}")
        files.append(str(path))
    return files


def expression(narrower: str, compiled: bool) -> str:
    """What pytest's -k gets."""
    out = LEFT_OUT if compiled else (*LEFT_OUT, *COMPILED)
    chosen = SELECTED + (COMPILED if compiled else ())
    text = f"({' or '.join(chosen)}) and not ({' or '.join(out)})"
    return f"({narrower}) and {text}" if narrower else text


def run_tests(root: Path, files: Sequence[str], mode: str, selection: str) -> dict[str, Any]:
    """Run pytest in a process of its own: test id -> its row."""
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch) / "outcomes.jsonl"
        path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ, "PYTHONPATH": path, "FASTLLM_TESTS_MODE": mode,
            "FASTLLM_TESTS_OUTCOMES": str(outcomes), "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }  # fmt: skip
        command = [
            sys.executable, "-m", "pytest", "-p", "transformers_plugin", "-p", "no:cacheprovider",
            "-q", "--tb=line", "-m", "not slow", "-k", selection, *files,
        ]  # fmt: skip
        print(f"{MODES[mode]}: {' '.join(files)}", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
        lines = outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []
    rows: dict[str, Any] = {}
    for line in lines:
        row = json.loads(line)
        if rows.get(row["id"], {}).get("outcome") != "failed":  # a teardown does not mend it
            rows[row["id"]] = row
    return rows


def model_of(test: str) -> str:
    """tests/models/llama/... -> llama."""
    return test.split("/")[2]


def counts(rows: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Model -> passed, failed and skipped tests."""
    table: dict[str, Counter[str]] = {}
    for test, row in rows.items():
        table.setdefault(model_of(test), Counter())[row["outcome"]] += 1
    return {model: dict(counter) for model, counter in table.items()}


def differences(
    plain: Mapping[str, Any], patched: Mapping[str, Any], mode: str
) -> list[Difference]:
    """Tests with two outcomes; one that a run never finished is "absent" in it."""
    absent = {"outcome": "absent", "line": "the run ended before this test did"}
    found = []
    for test in dict.fromkeys((*plain, *patched)):
        before, after = plain.get(test, absent), patched.get(test, absent)
        if before["outcome"] == after["outcome"]:
            continue
        known = REASONS.get(mode, {})
        reason = next((why for part, why in known.items() if part in test), "")
        line = after["line"] or before["line"]
        found.append(Difference(test, mode, before["outcome"], after["outcome"], line, reason))
    return found


def is_worse(difference: Difference) -> bool:
    """Whether it passed without fastllm and does not with it: failed, skipped or never ended."""
    return difference.plain == "passed"


def render(result: Mapping[str, Any], found: Sequence[Difference]) -> str:
    """The table of counts, and the differences below it."""
    lines = [
        f"transformers {result['transformers']}, tests of {result['checkout']} "
        f"({result['commit']}), {result['date']}",
        "",
        f"{'model':10}{'run':14}{'passed':>8}{'failed':>8}{'skipped':>9}",
    ]
    for model in dict.fromkeys(m for table in result["counts"].values() for m in table):
        for mode, table in result["counts"].items():
            row = [table.get(model, {}).get(kind, 0) for kind in ("passed", "failed", "skipped")]
            lines.append(f"{model:10}{MODES[mode]:14}{row[0]:8}{row[1]:8}{row[2]:9}")
    lines.append("")
    lines.append(f"{len(found)} differences" if found else "no difference")
    for d in found:
        lines += [f"  {d.id} [{MODES[d.mode]}]: {d.plain} -> {d.patched}", f"    {d.line}"]
        lines += [f"    known: {d.reason}"] if d.reason else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""`fastllm data tasks`: problems that the project makes, as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .console import note
from .parsing import Parser, add_config, command_parser

DESCRIPTION = """
Writes problems with answers that can be checked, one JSON object a line: prompt, completion, answer
and task. `fastllm sft` learns the completions; rewards and evaluation compare with the answer, and
take the tasks' names in place of a file. The same seed gives the same problems. The splits train
and test share none: a hash of a problem's numbers decides.

  arithmetic:1   3 + 8                          word:1   one gain or loss
  arithmetic:2   72 - 45                        word:2   two of them, or boxes
  arithmetic:3   45 - 72, 27 * 6                word:3   multiples
  arithmetic:4   34 + 27 * 6                    word:4   halving, sharing, comparing
  arithmetic:5   (34 + 21) / 5 - 20             word:5   and numbers that do not matter
  arithmetic:6   ((8 + 13) * 4 - 6) / 3 + 17

A range, arithmetic:1-3, takes its levels in turns.
"""

EXAMPLES = """
fastllm data tasks arithmetic:2 --count 3
fastllm data tasks arithmetic:1-3 word:1-2 --count 1000 --solutions --out sums.jsonl
fastllm data tasks arithmetic:2 --split test --count 200 --out held-out.jsonl
fastllm sft smollm2 sums.jsonl
"""


def tasks(argv: Sequence[str]) -> int:
    """`fastllm data tasks`."""
    parser = command_parser("data tasks", DESCRIPTION, EXAMPLES)
    _add_options(parser)
    options = parser.parse_args(list(argv))
    if options.solutions and options.think:
        parser.error("--solutions and --think exclude each other")
    from ..train.tasks import examples

    form = "solution" if options.solutions else "think" if options.think else "answer"
    lines = [
        json.dumps(record, ensure_ascii=False)
        for name in options.tasks
        for record in examples(
            name, options.count, options.seed, options.split, completion=form, plain=options.plain
        )
    ]
    if options.out is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return 0
    _write(Path(options.out), lines, options.overwrite)
    note(f"{options.out}: {len(lines):,} problems")
    return 0


def _add_options(parser: Parser) -> None:
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="such as arithmetic:2 or word:1-3")
    parser.add_argument(
        "--count", type=int, default=1000, metavar="N", help="problems of each (default: 1000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one, other problems (default: 0)"
    )
    parser.add_argument(
        "--split",
        choices=["train", "test"],
        default="train",
        help="which problems (default: train)",
    )
    parser.add_argument(
        "--solutions", action="store_true", help="completions are worked step by step"
    )
    parser.add_argument(
        "--think", action="store_true", help="the same between <think> and </think>"
    )
    parser.add_argument(
        "--plain", action="store_true", help="'Question: ... Answer:' for models without a template"
    )
    parser.add_argument("--out", default=None, metavar="FILE", help="default: standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace a file at --out")
    add_config(parser)


def _write(path: Path, lines: Iterable[str], overwrite: bool) -> None:
    """The file appears when it is whole. Raises FileExistsError."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: give --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(part, path)

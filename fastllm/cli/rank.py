"""`fastllm rank MODEL PROMPTS`: a person ranks a model's answers, for `fastllm reward`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answering import load, sampling_params
from .console import heading, note
from .parsing import Parser, add_config, add_model_options, add_sampling_options, command_parser

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import CompletionOutput, SamplingParams
    from ..train.data.prompts import PromptRecord
    from ..train.data.ranking_file import RankingFile

Answers = dict[str, bool]  # different texts, and whether each was cut

DESCRIPTION = """
Generates several answers to each prompt, shows them in random order, and asks which are better.
PROMPTS are .jsonl, .json or .parquet files of prompts (prompt, question, problem or messages), text
files with a prompt on each line, or tasks that are made here (arithmetic:2).

Answer with the numbers from best to worst, "=" between equal ones:

  2 1 = 4 3     the second is best, the first and the fourth are equal, the third is worst
  s             skip this prompt (it comes again next time)
  q             quit; end of input does too

Each ranking is on the disk before the next prompt is shown. Started again, the command goes on with
the prompts that are not yet in the file. Answers that are letter for letter the same are shown
once; a prompt whose answers are all the same is passed over. An answer that --max-tokens has cut
is shown as such, and marked in the file (truncated): a reward model then sees it without an end.
"""

EXAMPLES = """
fastllm rank smollm2 questions.jsonl --answers 4 --out rankings.jsonl
fastllm rank ./my-model questions.txt --answers 3 --temperature 0.7 --max-tokens 120
fastllm reward smollm2 rankings.jsonl
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(list(argv))
    if options.answers < 2:
        raise ValueError(f"--answers must be at least 2, got {options.answers}")
    if options.ahead < 1:
        raise ValueError(f"--ahead must be at least 1, got {options.ahead}")
    if options.temperature == 0:
        raise ValueError("--temperature 0 gives the same answer every time: give one above 0")
    from ..train.data.ranking_file import RankingFile

    file = RankingFile(Path(options.out))
    records = read(options.prompts)
    waiting = [record for record in records if not file.done(record.prompt)]
    note(f"{len(records)} prompts, {len(records) - len(waiting)} of them ranked in {file.path}")
    if not waiting:
        return 0
    llm = load(options)
    params = sampling_params(options, n=options.answers)
    try:
        for record, answers in generated(llm, waiting, params, options.ahead):
            if not ask(file, record, answers, str(options.model), options.seed or 0):
                break
    except KeyboardInterrupt:
        print()
    note(f"{file.count} rankings in {file.path}; fastllm reward {options.model} {file.path}")
    return 0


def _parser() -> Parser:
    parser = command_parser("rank", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("prompts", nargs="+", metavar="PROMPTS", help="files, or tasks")
    parser.add_argument(
        "--answers", type=int, default=4, metavar="K", help="answers to each prompt (default: 4)"
    )
    parser.add_argument(
        "--out", default="rankings.jsonl", metavar="FILE", help="grows (default: rankings.jsonl)"
    )
    parser.add_argument(
        "--ahead", type=int, default=4, metavar="N",
        help="prompts that are answered together (default: 4)",
    )  # fmt: skip
    add_sampling_options(parser, temperature=1.0, max_tokens=256)
    add_model_options(parser)
    add_config(parser)
    return parser


def read(names: Sequence[str]) -> list[PromptRecord]:
    """The prompts that files and tasks hold, each once. Raises DataError, FileNotFoundError."""
    from ..errors import DataError
    from ..train.data.prompts import PromptRecord, read_prompts

    records: list[PromptRecord] = []
    for name in names:
        if not name.endswith(".txt"):
            records += read_prompts([name])
            continue
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        found = [
            PromptRecord(prompt=line.strip(), place=f"{name}: line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        if not found:
            raise DataError(name, "", "", "holds no prompt", "Expected one on each line")
        records += found
    return list({str(record.prompt): record for record in records}.values())


def generated(
    llm: LLM, records: Sequence[PromptRecord], params: SamplingParams, ahead: int
) -> Iterator[tuple[PromptRecord, Answers]]:
    """Each prompt with its different answers, some prompts at a time."""
    from ..train.data.prompts import encode_prompts

    for first in range(0, len(records), ahead):
        part = records[first : first + ahead]
        prompts: list[Any] = [list(p.ids) for p in encode_prompts(part, llm.tokenizer)]
        outputs = llm.generate(prompts, params)
        for record, output in zip(part, outputs, strict=True):
            yield record, different(output.outputs)


def different(outputs: Sequence[CompletionOutput]) -> Answers:
    """The texts, each once. Nothing that was cut is no answer; what one sample has ended as another
    was cut is whole."""
    found: Answers = {}
    for output in outputs:
        text, cut = output.text.strip(), output.finish_reason == "length"
        if text or not cut:
            found[text] = cut and found.get(text, True)
    return found


def ask(
    file: RankingFile, record: PromptRecord, answers: Mapping[str, bool], model: str, seed: int
) -> bool:
    """Show a prompt's answers and keep what a person says; returns whether to go on."""
    from ..train.data.ranking_file import parse_order

    if len(answers) < 2:
        note(f"passed over, there are no two different answers: {record.text!r:.70}")
        return True
    shown = list(answers)
    random.Random(f"{seed} {record.text}").shuffle(shown)
    heading(f"> {record.text}")
    for number, answer in enumerate(shown, 1):
        heading(f"[{number}]")
        print((answer or "(nothing)") + ("  [cut here]" if answers[answer] else ""))
    while True:
        try:
            said = input("\nbest to worst (s: skip, q: quit): ").strip().lower()
        except EOFError:
            print()
            return False
        if said in ("q", "quit"):
            return False
        if said in ("s", "skip"):
            return True
        try:
            ranks = parse_order(said, len(shown))
        except ValueError as error:
            print(f"{error}; such as {' '.join(map(str, range(1, len(shown) + 1)))}")
            continue
        cut = [answers[answer] for answer in shown]
        file.add(record.prompt, shown, ranks, truncated=cut, model=model)
        return True

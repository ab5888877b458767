"""The demo's quantization: the tuned model in 16, 8 and 4 bits, and what that costs it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import human_bytes, note, table
from .demo_sft import dialogues
from .demo_stage import Part, Setting

if TYPE_CHECKING:
    from ..engine.continuations import Continued
    from ..engine.llm import LLM
    from ..models.tokenizer import Tokenizer
    from ..models.weights import WeightSource

FORMATS = ("bf16", "q8_0", "q4_k_m")  # the last one is talked with
PROBLEMS, QUICK_PROBLEMS = 100, 40
TOKENS = 64  # of the answer whose speed is measured


def quantize(setting: Setting) -> Part:
    """Write each format, measure it, keep the last one as model.gguf."""
    from ..models.loader import read_tokenizer
    from ..models.names import resolve
    from ..models.weights import open_weights

    out = setting.folder("quantize")
    tuned = setting.found("grpo/model", "sft/model")
    source = open_weights(resolve(setting.model) if tuned is None else tuned)
    tokenizer = read_tokenizer(source)
    answers = held_out_answers(out, tokenizer)
    rows = []
    for format in FORMATS:
        path = out / "model.gguf"
        write(source, path, format, tokenizer)
        rows.append(measured(path, format, answers, QUICK_PROBLEMS if setting.quick else PROBLEMS))
        note(f"{format}: perplexity {rows[-1]['perplexity']:.3f}")
    columns = ["format", "size", "perplexity", "right sums", "decode tok/s"]
    cells = [
        [row["format"], human_bytes(row["bytes"]), f"{row['perplexity']:.3f}",
         f"{row['accuracy']:.0%}", f"{row['decode']:.0f}"]
        for row in rows
    ]  # fmt: skip
    table(columns, cells, right=columns[1:])
    return Part(
        record={"rows": rows, "model": str(path)},
        facts=[("model", str(path.resolve()))],
        tables=[("held-out answers and sums", columns, cells)],
    )


def write(source: WeightSource, path: Path, format: str, tokenizer: Tokenizer) -> None:
    """Write a GGUF file in a format, over what is there."""
    from ..models.gguf_export import export_gguf, weights_of
    from ..models.quantizing.methods import Settings
    from ..models.quantizing.run import quantize_files

    if format == "bf16":
        export_gguf(weights_of(source), path, format, tokenizer, overwrite=True)
    else:
        quantize_files(source, path, Settings(format=format), tokenizer, overwrite=True)


def measured(path: Path, format: str, answers: list[Continued], problems: int) -> Any:
    """Size, perplexity, accuracy and speed of a file."""
    from ..engine.llm import LLM

    llm = LLM(path)
    return {
        "format": format,
        "bytes": path.stat().st_size,
        "perplexity": perplexity(llm, answers),
        "accuracy": accuracy(llm, problems),
        "decode": decode_rate(llm),
    }


def decode_rate(llm: LLM) -> float:
    """Tokens a second of one answer: the best of three."""
    from ..engine.request import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        llm.generate([[llm.config.bos_token_id or 0]], params)
        best = min(best, time.perf_counter() - start)
    return TOKENS / best


def accuracy(llm: LLM, problems: int) -> float:
    """Share of right greedy answers to held-out problems of the task that GRPO trains."""
    from ..engine.request import SamplingParams
    from ..train.data.prompts import encode_prompts, read_prompts
    from ..train.evaluation.accuracy import grade, summarize
    from ..train.evaluation.answers import sample_answers
    from ..train.evaluation.journal import Journal
    from ..train.rewards import resolve
    from .demo_grpo import LONGEST, TASK

    records = read_prompts([TASK], task_count=problems, split="test")
    params = SamplingParams(temperature=0.0, max_tokens=LONGEST)
    asked = encode_prompts(records, llm.tokenizer)
    answers = sample_answers(llm, asked, params, 1, Journal(None), {})
    return summarize(grade(resolve(["exact_match"])[0], records, answers), answers).accuracy.value


def held_out_answers(out: Path, tokenizer: Tokenizer) -> list[Continued]:
    """Questions of held-out dialogues as the chat template asks them, each with its answer."""
    from ..engine.continuations import Continued
    from ..models.chat_template import CHATML, ChatTemplate
    from ..train.data.conversations import read_conversations

    template = ChatTemplate(tokenizer.chat_template or CHATML, tokenizer.special_tokens)
    _, held = dialogues(out, 1)
    found = []
    for conversation in read_conversations([held]):
        question, answer = conversation.messages[:2]
        context = tokenizer.encode(template.render([question]), add_special_tokens=False)
        ending = tokenizer.encode(answer["content"], add_special_tokens=False)
        found.append(Continued(context, [ending]))
    return found


def perplexity(llm: LLM, answers: list[Continued]) -> float:
    """Of the answers' tokens."""
    from ..engine.continuations import continuation_log_probs

    sums = [endings[0].double().sum().item() for endings in
            continuation_log_probs(llm.model, answers)]  # fmt: skip
    return math.exp(-sum(sums) / sum(len(group.endings[0]) for group in answers))

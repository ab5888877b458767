"""The demo's first stage, answers of the model as it comes, and its last, talks with the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answering import load, print_stream, sampling_params
from .console import console, note
from .demo_stage import Part, Setting

if TYPE_CHECKING:
    from ..engine.llm import LLM

PROMPTS = (
    "What is photosynthesis? Answer in one sentence.",
    "Name three primary colors.",
    "Explain gravity to a child in one sentence.",
)
# Turns of one conversation each; the questions are of kinds that the fine-tuning has shown.
TALKS = (
    ("How many inches are 7 feet?", "How many eggs are 5 dozen?"),
    ("What day of the week comes 3 days after Friday?",),
    ("What is 46 + 37?", "What is 81 - 28?"),
)


def answers(setting: Setting) -> Part:
    """Stream the answers to PROMPTS."""
    llm = load(setting.options)
    return talk(llm, [(prompt,) for prompt in PROMPTS], setting.options)


def chat(setting: Setting) -> Part:
    """Stream TALKS with what the stages before have made: quantized, tuned, or the model alone."""
    from ..engine.llm import LLM

    path = newest(setting)
    llm = load(setting.options) if path is None else LLM(path)
    part = talk(llm, TALKS, setting.options)
    name = setting.model if path is None else str(path.resolve())
    part.facts.append(("model", name))
    part.record["model"] = name
    return part


def newest(setting: Setting) -> Path | None:
    """The last model of the life so far; None: no stage has made one."""
    return setting.found("quantize/model.gguf", "grpo/model", "sft/model")


def talk(llm: LLM, talks: Sequence[Sequence[str]], options: Any) -> Part:
    """Hold conversations, printing them; the part has them and how fast they went."""
    params = sampling_params(options)
    samples, tokens, seconds = [], 0, 0.0
    for turns in talks:
        messages: list[dict[str, str]] = []
        for prompt in turns:
            console().print(f"\n> {prompt}", style="bold", markup=False)
            messages.append({"role": "user", "content": prompt})
            text, speed = print_stream(llm.chat(messages, params, stream=True))
            messages.append({"role": "assistant", "content": text})
            note(f"[{speed}]")
            samples.append((prompt, text))
            tokens, seconds = tokens + speed.tokens, seconds + speed.total
    rate = tokens / seconds
    return Part(
        record={"tokens_per_second": rate, "answers": [list(sample) for sample in samples]},
        facts=[("speed", f"{rate:.0f} tokens a second, prompts included")],
        samples=samples,
    )

"""`fastllm generate MODEL PROMPT...`: answers to prompts, several at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .answering import load, print_stream, sampling_params
from .console import note
from .parsing import add_config, add_model_options, add_sampling_options, command_parser

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import RequestOutput, SamplingParams

DESCRIPTION = """
Continues each prompt, or with --chat answers it as a message to the assistant. One prompt is
streamed as it is made; several decode together, which costs little more time than one.
The prompt - is read from standard input.
"""

EXAMPLES = """
fastllm generate smollm2 --chat 'Name three primary colors.'
fastllm generate smollm2 'Once upon a time' --max-tokens 200 --temperature 0.8 --seed 1
fastllm generate smollm2 --chat 'Name a bird.' 'Name a fish.' 'Name a tree.'
fastllm generate smollm2 --chat - < letter.txt
fastllm generate smollm2 'One, two, three,' --json --logprobs 3
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("generate", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text, or - for stdin")
    parser.add_argument("--chat", action="store_true", help="prompts are messages to an assistant")
    parser.add_argument("--system", metavar="TEXT", default=None, help="with --chat: instructions")
    parser.add_argument("--n", type=int, default=1, help="answers to each prompt (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.add_argument(
        "--logprobs", type=int, default=None, metavar="K", help="with --json: K likeliest tokens"
    )
    add_sampling_options(parser, temperature=0.0, max_tokens=256)
    add_model_options(parser)
    add_config(parser)
    options = parser.parse_args(list(argv))
    if options.system is not None and not options.chat:
        parser.error("--system needs --chat")
    params = sampling_params(options, n=options.n, logprobs=options.logprobs)
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in options.prompts]
    llm = load(options)
    inputs: list[Any] = [messages(p, options.system) for p in prompts] if options.chat else prompts
    if len(prompts) == 1 and options.n == 1 and not options.json:
        _, speed = print_stream(_ask(llm, inputs[0], params, options.chat, stream=True))
        note(f"[{speed}]")
        return 0
    start = time.perf_counter()
    results = _ask(llm, inputs, params, options.chat)
    seconds = time.perf_counter() - start
    for prompt, result in zip(prompts, results, strict=True):
        _show(prompt, result, as_json=options.json)
    tokens = sum(len(answer.token_ids) for result in results for answer in result.outputs)
    note(f"[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tok/s]")
    return 0


def messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A conversation of one question."""
    start = [{"role": "system", "content": system}] if system is not None else []
    return [*start, {"role": "user", "content": prompt}]


def _ask(llm: LLM, inputs: Any, params: SamplingParams, chat: bool, **more: Any) -> Any:
    call = llm.chat if chat else llm.generate
    return call(inputs, params, **more)


def _show(prompt: str, result: RequestOutput, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(prompt, result), ensure_ascii=False))
        return
    for answer in result.outputs:
        print(f"> {prompt}\n{answer.text.strip()}\n")


def _plain(prompt: str, result: RequestOutput) -> dict[str, Any]:
    answers = []
    for answer in result.outputs:
        entry: dict[str, Any] = {
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "cumulative_logprob": answer.cumulative_logprob,
        }
        if answer.logprobs is not None:
            entry["logprobs"] = [
                {str(token): [p.decoded_token, p.logprob] for token, p in position.items()}
                for position in answer.logprobs
            ]
        answers.append(entry)
    return {"prompt": prompt, "seed": result.seed, "answers": answers}

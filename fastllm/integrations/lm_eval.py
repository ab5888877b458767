"""EleutherAI's lm-evaluation-harness on our engine: the model "fastllm".

    lm_eval.simple_evaluate(model=FastLM("smollm2"), tasks=["arc_easy"])

Importing this module registers the name, so that `model="fastllm", model_args="pretrained=..."`
works too. Requests are treated as the harness's own "hf" model treats them: tokens of context and
continuation, truncation from the left, rolling windows, stops. Written against lm-eval 0.4.13.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise ImportError(
        "fastllm.integrations.lm_eval needs lm-eval: pip install 'fastllm-engine[eval]'"
    ) from error

from fastllm.engine.continuations import Continued, continuation_log_probs, continuation_scores
from fastllm.engine.llm import LLM
from fastllm.engine.request import MAX_STOP_CHARS, MAX_STOPS, SamplingParams
from fastllm.models.tokenizer import Tokenizer

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
Tokens = list[int]


@register_model("fastllm")
class FastLM(TemplateLM):
    """A model of the engine as the harness sees one.

    Args:
        pretrained: what `fastllm.LLM` takes (a GGUF file, a directory, a name), or an `LLM`.
        max_length: longest context and continuation; default the engine's.
        max_gen_toks: most tokens of an answer, where a task does not say.
        add_bos_token: whether texts begin with the model's begin of sequence; default as its
            tokenizer has it. A text that spells it is left as it is.
        prefix_token_id: what stands before an empty context; default the begin, else the end of
            sequence.
        think_end_token: text that ends a model's thinking, or the token's id: what stands before
            the last one is left out.
        seed: of sampled answers.
        batch_size, max_batch_size: ignored: the engine packs requests by tokens.
        options: further arguments of `fastllm.LLM` (dtype, device, activation, quantization,
            adapter, max_num_seqs, ...).

    Raises:
        ValueError: naming an argument that does not fit.
    """

    backend = "causal"

    def __init__(
        self, pretrained: str | os.PathLike[str] | LLM, *, max_length: int | None = None,
        max_gen_toks: int = 256, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None, think_end_token: str | int | None = None,
        seed: int = 1234, batch_size: int | str | None = None, max_batch_size: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(pretrained, LLM):
            if options:
                raise ValueError(f"{next(iter(options))} is an argument of LLM: give it there")
            self.llm = pretrained
        else:
            self.llm = LLM(pretrained, max_model_len=max_length, **options)
        self.tokenizer: Tokenizer = self.llm.tokenizer
        most = self.llm.max_model_len
        if max_length is not None and not 2 <= max_length <= most:
            raise ValueError(f"max_length must be from 2 to {most}, got {max_length}")
        self.max_length = max_length or most
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        if isinstance(think_end_token, str) and think_end_token.isdigit():
            think_end_token = int(think_end_token)  # as the command line gives it
        self.think_end_token = think_end_token
        self.seed = seed
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        given = next((t for t in (prefix_token_id, begin, end) if t is not None), None)
        if given is None:
            raise ValueError("the tokenizer has neither a begin nor an end: give prefix_token_id")
        self._prefix: int = given
        self._device = self.llm.model.device

    @property
    def eot_token_id(self) -> int:
        """The end of sequence, or the prefix where the tokenizer has none."""
        end = self.tokenizer.eos_token_id
        return self._prefix if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches: changes with the tokenizer."""
        return f"fastllm_{self.tokenizer.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, with begin of sequence where it is wanted and not spelled out."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self._prefix], skip_special_tokens=False)
            spelled = has_bos_prefix(string, prefix or None)
            wanted = True if self.add_bos_token is None else self.add_bos_token
            add_special_tokens = wanted and not spelled
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without a generation prompt the last message goes on."""
        text = self.llm.chat_template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        return text[: text.rindex(last.strip()) + len(last.strip())]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of (anything, context, continuation) in tokens."""
        groups, order = _by_context([self._fitted(c, e) for _, c, e in requests])
        bar = _bar(len(requests), "Running loglikelihood requests", disable_tqdm)
        with bar:
            scores = continuation_scores(
                self.llm.model, groups, lambda done: _advance(bar, groups, done)
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for place, (log_probs, greedy) in zip(order, chain(*scores), strict=True):
            found[place] = float(log_probs.double().sum()), greedy
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts, in windows of `max_length` that do not overlap in
        what they predict."""
        windows: list[tuple[int, Tokens, Tokens]] = []
        for number, request in enumerate(requests):
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self._prefix,
                max_seq_len=self.max_length, context_len=1,
            ):  # fmt: skip
                windows.append((number, *utils.make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        bar = _bar(len(windows), "Running loglikelihood_rolling requests", disable_tqdm)
        groups = [Continued(context, [ending]) for _, context, ending in windows]
        with bar:
            scores = continuation_log_probs(
                self.llm.model, groups, lambda done: _advance(bar, groups, done)
            )
        for (number, _, _), (log_probs,) in zip(windows, scores, strict=True):
            totals[number] += float(log_probs.double().sum())
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, cut at the first of their stops."""
        if not requests:
            return []
        given = enumerate(request.args for request in requests)
        made = [self._asked(context, options, number) for number, (context, options) in given]
        outputs = self.llm.generate([ids for ids, _, _ in made], [params for _, params, _ in made])
        answers = []
        for request, output, (_, _, until) in zip(requests, outputs, made, strict=True):
            answer = self._answer(output.outputs[0].token_ids, until)
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _answer(self, ids: Sequence[int], until: list[str]) -> str:
        """The text of an answer behind its thinking, up to the first of its stops."""
        end = self.think_end_token
        if not isinstance(end, int):
            return str(postprocess_generated_text(self.tokenizer.decode(ids), until, end))
        ends = [place + 1 for place, token in enumerate(ids) if token == end]
        text = self.tokenizer.decode(ids[ends[-1] if ends else 0 :]).lstrip()
        return str(postprocess_generated_text(text, until, None))

    def _asked(
        self, context: str, options: Mapping[str, Any], number: int
    ) -> tuple[Tokens, SamplingParams, list[str]]:
        """Prompt, parameters and stops of a request; the prompt is cut from the left."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=end or None)
        most = kwargs.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"max_gen_toks {most} leaves no room for a prompt in a context of {self.max_length}"
            )
        if kwargs.pop("do_sample", None) is False:
            kwargs["temperature"] = 0.0
        kwargs.setdefault("temperature", 0.0)
        unknown = [n for n in kwargs if n not in _SAMPLING and (n, kwargs[n]) != ("num_beams", 1)]
        if unknown:
            raise ValueError(
                f"the generation option {unknown[0]!r} is none of the engine's: it has "
                f"{', '.join(_SAMPLING)}, do_sample, until and max_gen_toks"
            )
        # Stops beyond what the engine watches for cut the text afterwards all the same.
        watched = [s for s in until if 1 <= len(s) <= MAX_STOP_CHARS and s != end][:MAX_STOPS]
        if self.think_end_token is not None:  # stops count behind the thinking alone
            watched = []
        params = SamplingParams(
            max_tokens=most, stop=watched, seed=self.seed + number,
            **{name: kwargs[name] for name in _SAMPLING if name in kwargs},
        )  # fmt: skip
        return self.tok_encode(context)[-room:], params, until

    def _fitted(self, context: Tokens, ending: Tokens) -> tuple[Tokens, Tokens]:
        """Context and continuation, the context cut from the left to fit."""
        if not context or not ending or len(ending) > self.max_length:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(ending)} tokens: both "
                f"need one, and a continuation has at most {self.max_length}"
            )
        kept = min(len(context), self.max_length + 1 - len(ending))
        return context[len(context) - kept :], ending


def _by_context(
    pairs: Sequence[tuple[Tokens, Tokens]],
) -> tuple[list[Continued], list[int]]:
    """Groups of one context each, and the places in `pairs` of their endings, in order.

    Longest first: what fails for want of memory fails at once.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        places.setdefault(tuple(context), []).append(place)
    contexts = sorted(places, key=len, reverse=True)
    groups = [Continued(list(c), [pairs[p][1] for p in places[c]]) for c in contexts]
    return groups, [place for c in contexts for place in places[c]]


def _bar(total: int, name: str, disable: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=name, disable=disable)


def _advance(bar: Any, groups: Iterable[Continued], done: int) -> None:
    """Show how many endings of the first `done` groups there are."""
    count = sum(len(group.endings) for group, _ in zip(groups, range(done), strict=False))
    bar.update(count - bar.n)

"""One call of somebody else's transformers model, as it is or with one line of ours.

Run as a program, `python -m fastllm.bench.dropin_steps SIDE MODEL WORK DTYPE DEVICE`, it makes the
model, warms up, and then takes calls as `StepProcess` asks for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from fastllm.bench.step_process import StepClock, StepProcess, serve_steps
from fastllm.testing.opinfo import generator
from fastllm.testing.random_model import model_path

OURS = "fastllm"
EAGER = "eager"  # transformers as it comes: SDPA and, with experts, grouped_mm
LOOP = "experts eager"  # one expert after the other
COMPILED = "compiled"
# side -> what QuantConfig is told beside "int4_g64" (rows of 576 are no whole groups of 128)
PACKED: dict[str, dict[str, str]] = {
    "fastllm int4": {},
    "fastllm int4, table q8_0": {"embeddings": "q8_0"},  # which is the head too
}
PREFILL, BACKWARD, STEP, GENERATE = "prefill", "forward+backward", "training step", "generate"
ROWS, LENGTH = 2, 512  # of a training batch; a prefill has one row
TOKENS, PROMPT = 64, 16
WARM_UP = 2
DENSE = "135M"
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
_SHARED = {
    **_HEADS, "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "output_router_logits": False,
}  # fmt: skip
# Mixtures of 100M and 50M parameters, 25M and 50M of the experts' weights active.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "MoE E=64 K=8": (
        "qwen3_moe",
        {**_SHARED, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
         "norm_topk_prob": True},
    ),
    "MoE E=8 K=2": (
        "mixtral",
        {**_SHARED, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}  # fmt: skip


def make_model(side: str, name: str, dtype: torch.dtype, device: str) -> Any:
    """The model as `side` runs it, `torch.compile` aside; equal weights on every side.

    name: DENSE, which is SmolLM2-135M's config, or a key of MIXTURES.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import fastllm

    if name == DENSE:
        chosen = {}
        if side in PACKED:
            chosen["quantization_config"] = fastllm.QuantConfig("int4_g64", **PACKED[side])
        path = model_path("random-135m")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **chosen)
    else:
        kind, fields = MIXTURES[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=dtype)
        if side == LOOP:
            model.set_experts_implementation("eager")
    model = model.to(device)
    if side == OURS or side in PACKED:
        fastllm.patch(model)
    return model


def make_call(
    side: str, name: str, work: str, dtype: torch.dtype, device: str
) -> Callable[[], Any]:
    """One call of `work` on `side`."""
    model = make_model(side, name, dtype, device)
    vocabulary = model.config.vocab_size
    if work == GENERATE:
        return _generate(model.eval(), _ids(1, PROMPT, vocabulary, device))
    model.train(work != PREFILL)
    run = torch.compile(model) if side == COMPILED else model
    if work == PREFILL:
        return _prefill(run, _ids(1, LENGTH, vocabulary, device))
    return _train(model, run, _ids(ROWS, LENGTH, vocabulary, device), work == STEP)


def _ids(rows: int, length: int, vocabulary: int, device: str) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=generator(3)).to(device)


def _prefill(run: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """A prompt with its cache, and the last row of logits."""

    @torch.no_grad()
    def call() -> Any:
        return run(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    return call


def _generate(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Greedy; it does not stop before the count is reached."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    return lambda: model.generate(
        ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def _train(model: Any, run: Any, ids: torch.Tensor, optimize: bool) -> Callable[[], Any]:
    """Forward, loss and backward; with `optimize` also what transformers' Trainer does then."""
    model.config.use_cache = False
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if optimize else None

    def call() -> Any:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        model.zero_grad()
        return loss.detach()

    return call


def call_process(
    side: str, name: str, work: str, dtype: torch.dtype, device: str = "cpu"
) -> StepProcess:
    """A process that makes the calls of `make_call`."""
    kind = str(dtype).removeprefix("torch.")
    return StepProcess("fastllm.bench.dropin_steps", side, name, work, kind, device)


def main(arguments: list[str]) -> None:
    """Make a call for every line of standard input."""
    side, name, work, dtype, device = arguments
    import transformers

    transformers.utils.logging.disable_progress_bar()
    assert transformers.AutoModelForCausalLM is not None, "imported before memory is read"
    model_path("random-135m")  # made, if it is not there, before memory is read
    clock = StepClock(device)
    call = make_call(side, name, work, getattr(torch, dtype), device)
    for _ in range(WARM_UP):
        call()
    serve_steps(call, clock)


if __name__ == "__main__":
    main(sys.argv[1:])

"""One training step of the same model, batch and optimizer in fastllm and in transformers.

Every peer trains in a process of its own, as it does for its users. Run as a program,
`python -m fastllm.bench.training PEER SIZE METHOD ROWS LENGTH DTYPE DEVICE`, it makes the model,
warms up, and then takes steps as `StepProcess` asks for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.bench.step_process import StepClock, StepProcess, serve_steps
from fastllm.models.config import ModelConfig
from fastllm.models.trainable import initialize
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.testing.opinfo import generator
from fastllm.testing.random_model import SIZES as RANDOM_SIZES
from fastllm.testing.random_model import model_config
from fastllm.train.memory import keep_freed_memory
from fastllm.train.optim import AdamW

SIZES = {  # layers, hidden, inner, heads, kv heads, vocabulary; millions of parameters
    "3M": model_config(3, 192, 512, 3, 3, 8192),  # 2.9: what `fastllm demo` pretrains
    "10M": model_config(10, 256, 704, 4, 4, 8192),  # 10.1
    "50M": model_config(12, 512, 1408, 8, 4, 32768),  # 52.2
    "135M": RANDOM_SIZES["random-135m"],  # 134.5
}
LEARNING_RATE = 1e-4
LORA_RANK = 16
WARM_UP = 2  # steps: the first allocates and compiles, the second allocates optimizer states
Step = Callable[[], Any]


def flops(config: ModelConfig, rows: int, length: int, method: str) -> float:
    """Of the products and of causal attention in one step, no recomputation counted.

    With adapters the products of frozen weights have no weight gradient; the adapters' own
    products are left out.
    """
    tied = config.tie_word_embeddings
    matrices = [
        shape
        for name, shape in config.weight_shapes().items()
        if len(shape) == 2 and (tied or name != "model.embed_tokens.weight")
    ]
    products = 2.0 * rows * length * sum(n * k for n, k in matrices)
    width = config.num_attention_heads * config.head_dim
    attention = 2.0 * rows * length * length * width * config.num_hidden_layers
    return (3 if method == "full" else 2) * products + 3 * attention


def batch(config: ModelConfig, rows: int, length: int) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(0, config.vocab_size, (rows, length), generator=generator(3))


def fastllm_step(config: ModelConfig, ids: Tensor, method: str, device: str) -> Step:
    """bfloat16 parameters with float32 masters and float32 gradients."""
    keep_freed_memory()  # as the training loop does
    model = initialize(config, device=device, max_positions=ids.shape[1])
    parameters = list(model.parameters())
    if method == "lora":
        parameters = add_lora(model, LoraConfig(r=LORA_RANK, alpha=2 * LORA_RANK))
    optimizer = AdamW(parameters, lr=LEARNING_RATE)
    documents = Documents.pack(list(ids), device)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten().to(device)

    def step() -> Tensor:
        loss = model.loss(documents, targets, "mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.weights_changed()
        return loss.detach()

    return step


def transformers_step(
    config: ModelConfig, ids: Tensor, method: str, device: str, dtype: torch.dtype,
    compiled: bool = False,
) -> Step:  # fmt: skip
    """SDPA attention, torch's fused AdamW on parameters of `dtype`, without masters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config.to_hf())
    kind = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind.use_cache = False
    model = AutoModelForCausalLM.from_config(kind, dtype=dtype, attn_implementation="sdpa")
    source = initialize(config, dtype=dtype, max_positions=ids.shape[1])
    model.load_state_dict(dict(source.state_dict()), strict=True)
    del source
    model = model.to(device).train()
    if method == "lora":
        import peft

        targets = list(LoraConfig().target_modules)
        adapters = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)
        model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    run = torch.compile(model) if compiled else model
    inputs = ids.to(device)

    def step() -> Tensor:
        loss = run(input_ids=inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def make_step(
    peer: str, config: ModelConfig, ids: Tensor, method: str, device: str, dtype: torch.dtype
) -> Step:
    """The step of "fastllm", "transformers" or "transformers compiled"."""
    if peer == "fastllm":
        return fastllm_step(config, ids, method, device)
    return transformers_step(config, ids, method, device, dtype, peer.endswith("compiled"))


def step_process(
    peer: str, size: str, method: str, rows: int, length: int, dtype: torch.dtype,
    device: str = "cpu",
) -> StepProcess:  # fmt: skip
    """A process that takes the steps of `make_step`."""
    kind = str(dtype).removeprefix("torch.")
    return StepProcess("fastllm.bench.training", peer, size, method, rows, length, kind, device)


def main(arguments: list[str]) -> None:
    """Take a step for every line of standard input."""
    peer, size, method, rows, length, dtype, device = arguments
    if peer != "fastllm":
        import transformers

        assert transformers.AutoModelForCausalLM is not None, "imported before memory is read"
    config = SIZES[size]
    clock = StepClock(device)
    ids = batch(config, int(rows), int(length))
    step = make_step(peer, config, ids, method, device, getattr(torch, dtype))
    for _ in range(WARM_UP):
        step()
    serve_steps(step, clock)


if __name__ == "__main__":
    main(sys.argv[1:])

"""One training step of the same model, batch and optimizer in fastllm and in transformers.

Every peer trains in a process of its own, as it does for its users: what one of them asks of the
memory allocator or leaves in caches does not reach the others. Run as a program,
`python -m fastllm.bench.training PEER SIZE METHOD ROWS LENGTH DTYPE DEVICE`, it makes the model,
warms up, and then answers every line of its input by a step's seconds and the bytes of its
resident set at the peak, beyond what the imports had taken.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
_ANSWER = "step:"
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


class StepProcess:
    """A process that takes steps when it is asked to; it ends with `close`, or with this one."""

    def __init__(
        self, peer: str, size: str, method: str, rows: int, length: int, dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        kind = str(dtype).removeprefix("torch.")
        quiet = ["-W", "ignore::FutureWarning"]  # of libraries about libraries
        command = [sys.executable, *quiet, "-m", "fastllm.bench.training"]
        command += [peer, size, method, str(rows), str(length), kind, device]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._peak = 0.0

    def step(self) -> float:
        """Seconds of one step."""
        seconds, self._peak = self._ask()
        return seconds

    def peak(self) -> float:
        """Bytes of the resident set at the peak of warming up and steps, beyond the imports."""
        if not self._peak:
            self.step()
        return self._peak

    def _ask(self) -> tuple[float, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        while answer := self._process.stdout.readline():
            if answer.startswith(_ANSWER):
                seconds, peak = answer.split()[1:]
                return float(seconds), float(peak)
        raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.communicate()


def main(arguments: list[str]) -> None:
    """Take a step for every line of standard input."""
    peer, size, method, rows, length, dtype, device = arguments
    if peer != "fastllm":
        import transformers

        assert transformers.AutoModelForCausalLM is not None, "imported before memory is read"
    config = SIZES[size]
    before = _resident()
    ids = batch(config, int(rows), int(length))
    step = make_step(peer, config, ids, method, device, getattr(torch, dtype))
    for _ in range(WARM_UP):
        step()
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(_ANSWER, seconds, peak, flush=True)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(sys.argv[1:])

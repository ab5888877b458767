"""Suite `head`: the loss over a vocabulary, forward and backward, beside torch's: time and memory.

Peers: torch's `F.linear_cross_entropy` as it is called by default and with its chunked options, and
the plain way, logits and then `F.cross_entropy`. Memory is the peak above the level before the
call, gradients of x and the weight included, which all of them return.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.testing.memory import peak_extra_bytes
from fastllm.testing.opinfo import generator
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "head"
SECONDS = 150
TITLE = "loss over a vocabulary, forward and backward: time and memory"


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Rows of hidden states and the head that they meet."""

    name: str
    tokens: int
    hidden: int
    vocab: int

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.name} {self.tokens}x{self.hidden}x{self.vocab}"


SHAPES = (
    HeadShape("SmolLM2-135M", 512, 576, 49152),
    HeadShape("SmolLM2-135M", 2048, 576, 49152),
    HeadShape("Llama-3.2-1B", 512, 2048, 128256),
)
GPU_SHAPES = (HeadShape("Llama-3-8B", 8192, 4096, 128256),)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Every shape in time, then in memory; in quick runs the first shape."""
    shapes = SHAPES if settings.device == "cpu" else SHAPES + GPU_SHAPES
    for shape in shapes[:1] if settings.quick else shapes:
        for unit in ("ms", "MB"):
            yield BenchCase(
                suite=SUITE,
                label=f"{shape.label}" + (" memory" if unit == "MB" else ""),
                dtype="bfloat16",
                device=settings.device,
                seconds=2 if settings.quick or unit == "MB" else 8,
                min_rounds=3,
                make=functools.partial(_work, shape, unit, settings),
            )


def _chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # Of its policies the one that is not emulated on a CPU: the others take 100 times as long.
    policy: Literal["accurate", "auto"] = "accurate" if x.device.type == "cpu" else "auto"
    options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
    return F.linear_cross_entropy(x, weight, target, options=options)


def losses(device: str, quick: bool) -> dict[str, Loss]:
    """Ours and the peers that this torch has."""
    found: dict[str, Loss] = {
        OURS: ops.linear_cross_entropy,
        "plain": lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = F.linear_cross_entropy
        if not quick:
            found["torch chunked"] = _chunked
    return found


def _work(shape: HeadShape, unit: str, settings: Settings) -> Work:
    g, device = generator(), settings.device
    x = torch.randn(shape.tokens, shape.hidden, generator=g).bfloat16().to(device)
    weight = (torch.randn(shape.vocab, shape.hidden, generator=g) * 0.04).bfloat16().to(device)
    target = torch.randint(0, shape.vocab, (shape.tokens,), generator=g).to(device)
    x.requires_grad_()
    weight.requires_grad_()

    def step(loss: Loss) -> Any:
        return torch.autograd.grad(loss(x, weight, target), (x, weight))

    functions: dict[str, Callable[[], Any]] = {}
    for name, loss in losses(device, settings.quick).items():
        run = functools.partial(step, loss)
        functions[name] = run if unit == "ms" else functools.partial(peak_extra_bytes, run, device)
    time = unit == "ms"
    return Work(
        functions=functions,
        unit=unit,
        own_clock=not time,
        flops=6.0 * shape.tokens * shape.hidden * shape.vocab if time else 0.0,
        notes=("torch chunked: acc_policy accurate on a CPU, auto on a GPU",),
    )


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_head(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)

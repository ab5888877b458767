"""What the configuration of every stage has that trains a given model further."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from fastllm.models.quantization import check_quantization
from fastllm.nn.lora import LoraConfig
from fastllm.train.loop_config import LoopConfig

# Short names of keys on a command line.
ALIASES = {
    "rank": "lora.rank",
    "out": "loop.out",
    "resume": "loop.resume",
    "seed": "loop.seed",
    "steps": "loop.steps",
    "tensorboard": "loop.metrics.tensorboard",
    "trackio": "loop.metrics.trackio",
    "wandb": "loop.metrics.wandb",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The adapter of method "lora"; PEFT's meanings."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False

    def build(self) -> LoraConfig:
        """As `add_lora` wants it. Raises ValueError naming the field."""
        everything = self.targets == ("all-linear",)
        return LoraConfig(
            r=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules="all-linear" if everything else self.targets,
            rslora=self.rslora,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """The model, what of it learns, and how fast. A stage's configuration inherits from this.

    Raises ValueError naming the field.
    """

    model: str = "smollm2"  # a GGUF file, a Hugging Face directory, a name or an id
    method: Literal["lora", "full"] = "lora"
    quant: str | None = None  # of the frozen weights, as they are loaded: nf4, int4, q4_k, ...
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    lr: float | None = None
    lr_multiplier: float = 1.0  # of the rate that is chosen
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of the steps
    micro_tokens: int | None = None  # that go through the model at once
    checkpointing: bool = False  # recompute activations: less memory, a third more time
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "cpu"
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        self.check_positive("lr", "lr_multiplier", "micro_tokens")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share from 0 to 1, got {self.warmup}")
        if self.quant is not None:
            check_quantization(self.quant)
            if self.method == "full":
                raise ValueError("quant freezes the weights, which method full trains: use lora")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError unless each of the fields is None or above 0 and finite."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")

    def learning_rate(self, hidden: int) -> float:
        """`lr`, or for a model of `hidden` columns 5e-5 (2000 / hidden)^0.78, ten times that for
        adapters, as Schulman et al. fitted it over models ("LoRA without regret", 2025)."""
        if self.lr is not None:
            return self.lr
        rate = 5e-5 * (2000 / hidden) ** 0.78 * (10 if self.method == "lora" else 1)
        return rate * self.lr_multiplier

    def loop_of(self, steps: int) -> LoopConfig:
        """The loop with so many steps, `loop.steps` at most, and the warmup counted in steps."""
        steps, schedule = min(steps, self.loop.steps), self.loop.schedule
        warmup = schedule.warmup or round(self.warmup * steps)
        return replace(self.loop, steps=steps, schedule=replace(schedule, warmup=warmup))

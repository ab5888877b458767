"""Settings of the training loop, the same for every kind of training."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastllm.train.metrics import MetricsConfig
from fastllm.train.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long, how often, where to. Counts are optimizer steps; 0 switches a thing off.

    Raises ValueError for a count below its least value.
    """

    out: str = "runs/latest"  # folder of the run: config, metrics, report, checkpoints
    resume: str = "none"  # none, auto (the newest whole checkpoint of `out`) or a checkpoint's path
    steps: int = 1000
    seconds: float = 0.0  # above 0: as many steps as take about so long, measured at the start
    seed: int = 0
    max_norm: float = 1.0  # the gradient's norm is clipped to this
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: int = 250
    sample_every: int = 0
    save_every: int = 250
    keep: int = 2  # checkpoints; older ones are deleted
    async_save: bool = True  # write while training goes on; costs a copy of the state in memory
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        least = {"steps": 1, "keep": 1, "eval_every": 0, "sample_every": 0, "save_every": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("seconds", "max_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")

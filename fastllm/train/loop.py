"""The training loop: step, accumulation, clipping, schedule, logging, evaluation, checkpoints.

A `Task` says what is trained: model, optimizer, batches, loss. `run` does the rest, and is the same
for every kind of training:

    for micro in batches:  loss(micro).backward()          # sums over tokens, not means
    norm = |sum of gradients| / tokens of the step, all micro batches and processes together
    stop if loss or norm is not finite                     # nothing has been written yet
    optimizer.step(grad_scale=clip coefficient / tokens)   # gradients are not rewritten

So the result does not depend on how a step is cut into micro batches and processes, beyond the
rounding of sums. Evaluating, sampling and saving leave every random state as it was.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastllm.errors import NotFiniteError, NumericalError, RewardError
from fastllm.ops.moe_gate import kept_refusals
from fastllm.train import distributed
from fastllm.train.checkpoint import (
    Checkpoints,
    differences,
    refuse_used,
    step_of,
    take_snapshot,
)
from fastllm.train.config import to_dict
from fastllm.train.loop_config import LoopConfig
from fastllm.train.memory import keep_freed_memory
from fastllm.train.metrics import Metrics, MetricsConfig
from fastllm.train.optim import clip_grad_norm_, set_rates
from fastllm.train.peak import peak_flops
from fastllm.train.schedule import ScheduleConfig, factor
from fastllm.train.signals import StopSignals
from fastllm.train.state import preserved_random_state, seed_all
from fastllm.train.task import NothingToLearn, StepAbandoned, Task

__all__ = ["LoopConfig", "MetricsConfig", "Progress", "Result", "ScheduleConfig", "Task", "run"]

# Steps after which `seconds` decides the number of steps again: a slow start must not end a run.
_PLANNED_AT = frozenset(10 * 2**i for i in range(20))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How a run ended."""

    status: Literal["finished", "stopped"]  # stopped: by a signal, after saving
    step: int  # steps done
    loss: float  # of the last step, per token
    checkpoint: Path | None  # the newest
    metrics: Mapping[str, float]  # of the last evaluation


@dataclass(slots=True)
class Progress:
    """What has been done so far; saved with every checkpoint."""

    step: int = 0
    steps: int = 0  # in all
    tokens: int = 0  # targets that counted
    seconds: float = 0.0  # of everything but saving and loading
    loss_sum: float = 0.0  # since the last line of metrics
    loss_tokens: int = 0


def run(task: Task, config: LoopConfig, *, settings: Mapping[str, Any] | None = None) -> Result:
    """Train `task` to the end, or until a signal.

    settings: the whole resolved configuration as plain values, kept in checkpoints and compared at
    a resume; default `config` alone.
    A first SIGTERM or SIGINT ends the run after the step in hand, with a checkpoint and status
    "stopped". Raises NumericalError, on every process, before the update of a step whose loss or
    gradient is not finite or whose routers refuse, CheckpointError if `config.out` holds another
    run or a checkpoint cannot be resumed, BlockingIOError if another process is running there, and
    OSError if the last checkpoint cannot be written.
    """
    keep_freed_memory()
    seed_all(config.seed + distributed.rank())
    loop = _Loop(task, config, settings or {"loop": to_dict(config)})
    with distributed.only_run_in(Path(config.out)):
        try:
            loop.start()
            with StopSignals() as signals:
                return loop.train(signals)
        finally:
            loop.close()


class _Loop:
    """The state of one call of `run`."""

    def __init__(self, task: Task, config: LoopConfig, settings: Mapping[str, Any]) -> None:
        self.task = task
        self.config = config
        self.settings = settings
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.checkpoints = Checkpoints(
            Path(config.out) / "checkpoints", keep=config.keep, asynchronous=config.async_save
        )
        self.metrics = Metrics(Path(config.out), config.metrics, settings)
        self.progress = Progress(steps=config.steps)
        self.evaluation: dict[str, float] = {}
        self.loss = math.nan
        self.norm = math.nan
        self.flops = 0.0  # since the last line of metrics, of all processes
        self.clock = 0.0  # seconds of steps since the last line

    def start(self) -> None:
        """Resume if asked to, else make sure that no other run is written over."""
        found = None
        refuse_used(self.config.out, self.config.resume)
        if self.config.resume != "none":
            found = self.checkpoints.find(self.config.resume, self.metrics.say)
            if found is None:
                self.metrics.say(f"no checkpoint in {self.checkpoints.directory}: a new run starts")
        if found is not None:
            saved = found.restore(self.task, self.metrics.say)
            for line in differences(saved.settings, self.settings):
                self.metrics.say(f"resume: {line}")
            steps = self.progress.steps
            self.progress = Progress(**saved.progress)
            if not self.config.seconds:
                self.progress.steps = steps
            self.evaluation = dict(saved.evaluation)
            self.checkpoints.set_aside_after(saved.step, self.metrics.say)
            self.task.weights_changed()
        self.metrics.open(step=self.progress.step)
        for line in self.task.describe():
            self.metrics.say(line)
        if found is not None:
            self.metrics.say(f"resumed from {found.path}")

    def train(self, signals: StopSignals) -> Result:
        """Steps until the end or a signal."""
        progress, stop = self.progress, False
        self.task.stopping = lambda: signals.requested
        try:
            if self.task.evaluates_first and not progress.step and self.config.eval_every:
                self.evaluate()
            while progress.step < progress.steps and not stop:
                stop = self.step(signals)
                self.after_step(last=stop or progress.step >= progress.steps)
        except StepAbandoned:
            self.keep()
        except (RewardError, NothingToLearn):  # neither spoils a step that was done
            self.keep()
            if progress.step:
                self.metrics.report()
                self.metrics.say(
                    f"an error: stopped after step {progress.step}, saved; once its cause is "
                    "mended, resume auto (--resume auto) goes on from there"
                )
            raise
        self.metrics.report()
        finished = progress.step >= progress.steps
        if not finished and progress.step:
            self.metrics.say(
                f"{signals.name}: stopped after step {progress.step}, saved; resume auto "
                "(--resume auto) goes on from there"
            )
        elif not finished:
            self.metrics.say(f"{signals.name}: stopped before the first step, nothing was learned")
        return Result(
            status="finished" if finished else "stopped",
            step=progress.step,
            loss=self.loss,
            checkpoint=self.checkpoints.newest(),
            metrics=self.evaluation,
        )

    # one step

    def step(self, signals: StopSignals) -> bool:
        """One optimizer step. Returns whether a signal asks any process to stop."""
        began = time.perf_counter()
        task, progress = self.task, self.progress
        self.set_rates()
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        counts = [0.0, 0.0, 0.0, 0.0]
        with self.refusals(f"step {progress.step + 1}") as refused:
            for micro in next(task.batches):
                loss = task.loss(micro)
                loss.backward()
                total += loss.detach()
                counts[0] += micro.tokens
                counts[2] += task.flops(micro)
        counts[1] = float(signals.requested)  # one that came within the step counts
        counts[3] = len(refused)
        sums = distributed.sum_(torch.cat([total[None], total.new_tensor(counts)]))
        scale = (1 / sums[1]).float()
        norm = clip_grad_norm_(self.parameters, self.config.max_norm or math.inf, scale)
        # The one wait for the device in a step: it lets a run stop before a bad update.
        loss_sum, tokens, stop, flops, refusals, self.norm = torch.cat([
            sums, norm.double()[None]
        ]).tolist()  # fmt: skip
        if refusals:
            self.refuse(f"step {progress.step + 1}", refused)
        self.check(loss_sum, tokens)
        task.optimizer.step(grad_scale=scale)
        task.optimizer.zero_grad(set_to_none=True)
        task.after_update()
        task.weights_changed()
        self.loss = loss_sum / tokens
        self.flops += flops
        progress.step += 1
        progress.tokens += int(tokens)
        progress.loss_sum += loss_sum
        progress.loss_tokens += int(tokens)
        self.clock += time.perf_counter() - began
        progress.seconds += time.perf_counter() - began
        return bool(stop)

    @contextmanager
    def refusals(self, what: str) -> Iterator[list[NotFiniteError]]:
        """Routers refuse to choose by numbers that are none: a process alone raises at once.

        One of several goes on, so that the others need not wait for it, and lists what was refused:
        afterwards all meet in `refuse` if any has something. Raises NumericalError.
        """
        if distributed.world() > 1:
            with kept_refusals() as refused:
                yield refused
            return
        try:
            yield []
        except NotFiniteError as error:
            raise NumericalError(f"{what}: {error}; {self.after_bad_numbers()}") from error

    def refuse(self, what: str, refused: Sequence[NotFiniteError]) -> None:
        """Raise NumericalError on every process if routers of any refused; all must call."""
        for rank, said in enumerate(distributed.gather([str(error) for error in refused[:1]])):
            if said:
                raise NumericalError(
                    f"{what}: process {rank}: {said[0]}; {self.after_bad_numbers()}"
                )

    def set_rates(self) -> None:
        """Give every group its rate for this step."""
        schedule, steps = self.config.schedule, self.progress.steps
        if self.config.seconds:  # warmup was chosen for a number of steps that was a guess
            schedule = dataclasses.replace(schedule, warmup=min(schedule.warmup, -(-steps // 10)))
        set_rates(self.task.optimizer, factor(schedule, self.progress.step, steps))

    def check(self, loss_sum: float, tokens: float) -> None:
        """Refuse to update from a step without targets or with numbers that are none."""
        step = self.progress.step + 1
        if not tokens:
            raise ValueError(f"step {step} has no target that counts: check the masks of the data")
        if math.isfinite(loss_sum) and math.isfinite(self.norm):
            return
        raise NumericalError(
            f"step {step}: the loss is {loss_sum / tokens:g} and the gradient's norm {self.norm:g}"
            f"; {self.after_bad_numbers()}"
        )

    def after_bad_numbers(self) -> str:
        """Where they are, what is left of the run, and what helps."""
        self.checkpoints.wait(self.metrics.say)
        kept = self.checkpoints.newest()
        return (
            f"{first_not_finite(self.task.model)}. Nothing was updated; the newest checkpoint is "
            f"{kept or 'none'}. A lower learning rate, a longer warmup or a smaller max_norm helps "
            "where the data is in order"
        )

    # between steps

    def after_step(self, *, last: bool) -> None:
        """Log, evaluate, sample and save, where due."""
        config, step = self.config, self.progress.step
        began = time.perf_counter()

        def due(every: int) -> bool:
            return every > 0 and (last or step % every == 0)

        if last or step % config.metrics.every == 0:
            self.log(whole=due(config.eval_every) or last)
        if due(config.eval_every):
            self.evaluate()
        if due(config.sample_every):
            with self.untrained():
                self.metrics.samples(step, self.task.sample())
        self.progress.seconds += time.perf_counter() - began
        if config.seconds and step in _PLANNED_AT:
            self.plan()
        if last or (config.save_every and step % config.save_every == 0):
            self.save(last=last)

    def evaluate(self) -> None:
        """Measure on held-out data and log it."""
        step = self.progress.step
        what = f"evaluation after step {step}"
        with self.untrained(), self.refusals(what) as refused:
            self.evaluation = self.task.evaluate()
        self.refuse(what, refused)
        if self.evaluation:
            self.metrics.evaluation(step, self.evaluation)

    def log(self, *, whole: bool) -> None:
        """A line of metrics: means since the one before. whole: with what is long."""
        progress, clock = self.progress, max(self.clock, 1e-9)
        record: dict[str, Any] = {
            "step": progress.step,
            "loss": progress.loss_sum / progress.loss_tokens,
            "lr": self.task.optimizer.param_groups[0]["lr"],
            "norm": self.norm,
            "tokens": progress.tokens,
            "tokens_per_second": progress.loss_tokens / clock,
            "seconds": progress.seconds,
        }
        if self.flops:
            peak = peak_flops(self.task.device, self.task.compute_dtype) * distributed.world()
            record["mfu"] = self.flops / clock / peak
        record |= self.task.numbers(whole=whole)
        remaining = (progress.steps - progress.step) * progress.seconds / progress.step
        self.metrics.training(record, steps=progress.steps, remaining=remaining)
        progress.loss_sum, progress.loss_tokens = 0.0, 0
        self.flops = self.clock = 0.0

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Nothing inside is differentiated or leaves a trace in what training does next."""
        model = self.task.model
        before = model.training
        model.eval()
        try:
            with preserved_random_state(), torch.no_grad():
                yield
        finally:
            distributed.reshard(model)
            model.train(before)

    def plan(self) -> None:
        """As many steps as fit in `seconds`, judged by those done; the same on every process."""
        progress = self.progress
        rates = distributed.gather(progress.seconds / progress.step)
        left = self.config.seconds - max(rates) * progress.step
        progress.steps = progress.step + max(int(left / max(rates)), 1)

    def save(self, *, last: bool) -> None:
        """Copy the state and have it written."""
        snapshot = take_snapshot(
            self.task,
            step=self.progress.step,
            progress=dataclasses.asdict(self.progress),
            settings=self.settings,
            evaluation=self.evaluation,
        )
        self.checkpoints.save(self.task, snapshot, self.metrics.say, last=last)

    def keep(self) -> None:
        """Save the last step that was done, unless it is saved already."""
        self.checkpoints.wait(self.metrics.say)
        newest = self.checkpoints.newest()
        if self.progress.step and (newest is None or step_of(newest) < self.progress.step):
            self.save(last=True)

    def close(self) -> None:
        """Let the writer finish and the terminal go."""
        self.checkpoints.close(self.metrics.say)
        self.metrics.close()


def first_not_finite(model: torch.nn.Module) -> str:
    """The first parameter, else the first gradient, of this process that holds NaN or infinity."""
    for what in ("parameter", "gradient"):
        for name, parameter in model.named_parameters():
            tensor = parameter if what == "parameter" else parameter.grad
            if tensor is not None:
                values = distributed.local(tensor.detach())
                bad = int(values.numel() - torch.isfinite(values).sum())
                if bad:
                    return f"first: {bad} of {values.numel()} values of the {what} of {name}"
    return "every parameter and gradient of this process is finite"

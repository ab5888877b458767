"""Calls rewards, and stops the run with the answer named when one of them fails.

What a timeout guarantees. The function of a file runs in a process, which is killed: nothing that
it does can hold up the run. A function that Python code hands over runs in a thread of this
process, and a timeout ends the wait for it: the run goes on to its error and its end, while the
thread stays until the process ends (a C call that keeps Python's lock holds up everything; nothing
in one process can help that). Shipped rewards end by themselves on any text, and so do reward
models: they are called directly.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastllm.errors import RewardError
from fastllm.train.rewards.accuracy import accuracy, require
from fastllm.train.rewards.answers import expected, number
from fastllm.train.rewards.process import FunctionProcess
from fastllm.train.rewards.resolving import NamedReward
from fastllm.train.rewards.shipped import exact_match
from fastllm.train.rewards.values import Raised, SampleFault, as_floats, parameters_of

if TYPE_CHECKING:
    from torch import Tensor

Prompt = str | Sequence[Mapping[str, Any]]
TIMEOUT = 60.0
FINISH_REASONS = "finish_reasons"  # a column beside the data's: "stop", or "length" of what was cut
_OURS = ("prompts", "completions", FINISH_REASONS)


def check(rewards: Sequence[NamedReward], columns: Mapping[str, Sequence[Any]]) -> None:
    """Whether a data set has what rewards need, to be asked before a run.

    columns: lists by name, as `gather_columns` makes them. Raises RewardError naming a column that
    is missing; of the column `answer` one that is empty; ValueError for a column with a name that
    rewards get otherwise; and ModuleNotFoundError if "accuracy" needs math-verify for one of them,
    which is not installed.
    """
    _check_names(columns)
    for reward in rewards:
        lists = {name: list(column) for name, column in columns.items()}
        taken = _columns(reward, lists, [])
        if reward.function is accuracy or reward.function is exact_match:
            for sample, answer in enumerate(taken["answer"]):
                try:
                    value = number(expected(answer))
                except ValueError as error:
                    where = f"prompt {sample + 1} of {len(taken['answer'])}"
                    raise RewardError(reward.name, None, "", f"{where}: {error}") from error
                if value is None and reward.function is accuracy:
                    require()


def score(
    rewards: Sequence[NamedReward],
    weights: Sequence[float] | None,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    timeout: float = TIMEOUT,
    *,
    truncated: Sequence[bool] | None = None,
) -> Tensor:
    """The rewards of N completions: float32 [N, F], one column for each of F rewards.

    Args:
        rewards: from `resolve`.
        weights: factors of the F columns; None leaves them as they are.
        prompts: N strings or lists of messages; functions get their words.
        completions: N answers.
        columns: lists of N by name; a function without **columns gets those that it names.
        timeout: seconds that one reward may take for all N.
        truncated: which of the N were cut at the longest length; default none. Functions see it
            as the column `finish_reasons`.

    Raises:
        RewardError: naming reward, answer and prompt, if a function raises, takes too long, gives
            no finite numbers or not N of them, or needs a column that is not there.
        ValueError: if the arguments do not fit each other.
    """
    import torch

    _check(rewards, weights, prompts, completions, columns, timeout)
    if truncated is not None and len(truncated) != len(completions):
        raise ValueError(f"truncated has {len(truncated)} values for {len(completions)} answers")
    cut = truncated or [False] * len(completions)
    reasons = ["length" if each else "stop" for each in cut]
    calls = [_Call(reward, prompts, completions, columns, reasons) for reward in rewards]
    found = [call.run(timeout) for call in calls]
    values = torch.tensor(found, dtype=torch.float32).reshape(len(rewards), len(prompts)).T
    return values.contiguous() if weights is None else values * torch.tensor(weights)


def _check(
    rewards: Sequence[NamedReward],
    weights: Sequence[float] | None,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    timeout: float,
) -> None:
    if not rewards:
        raise ValueError("no rewards: give at least one")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(f"{len(weights)} weights for {len(rewards)} rewards")
    if weights is not None and not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {list(weights)}")
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
    _check_names(columns)
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise ValueError(f"column {name!r} has {len(column)} values for {len(prompts)} prompts")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, got {timeout}")


def _check_names(columns: Iterable[str]) -> None:
    for name in columns:
        if name in _OURS:
            raise ValueError(f"the data has a column {name!r}, which rewards get otherwise: rename")


def _columns(
    reward: NamedReward, columns: dict[str, list[Any]], finish_reasons: list[str]
) -> dict[str, list[Any]]:
    """The columns that a reward takes. Raises RewardError for one that is missing."""
    function, more = reward.function, {FINISH_REASONS: finish_reasons}
    try:
        if isinstance(function, FunctionProcess):
            return function.parameters.choose(columns, more)
        return parameters_of(function).choose(columns, more)
    except (SampleFault, TypeError) as error:
        raise RewardError(reward.name, None, "", str(error.args[0])) from error


class _Call:
    """One reward and what it is called with."""

    def __init__(
        self,
        reward: NamedReward,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        finish_reasons: list[str],
    ) -> None:
        from fastllm.train.data.prompts import prompt_text

        self.reward = reward
        self.texts = [prompt_text(prompt) for prompt in prompts]
        self.prompts: list[Any] = list(prompts) if reward.messages else self.texts
        self.completions = list(completions)
        lists = {name: list(column) for name, column in columns.items()}
        self.columns = _columns(reward, lists, finish_reasons)

    def run(self, timeout: float) -> list[float]:
        """The rewards of all answers. Raises RewardError."""
        if not self.texts:
            return []
        start = time.monotonic()
        try:
            return self._part(slice(None), timeout)
        except TimeoutError:
            problem = f"took longer than {timeout:g} s"
            raise self._blame(problem, timeout, late=True) from None
        except Raised as fault:
            left = max(timeout - (time.monotonic() - start), 1.0)
            raise self._blame(fault.problem, left, late=False) from fault
        except SampleFault as fault:
            raise self._error(fault.problem, fault.sample) from fault

    def _part(self, part: slice, timeout: float) -> list[float]:
        prompts, completions = self.prompts[part], self.completions[part]
        columns = {name: column[part] for name, column in self.columns.items()}
        function, count = self.reward.function, len(completions)
        if isinstance(function, FunctionProcess):
            found = function.call((prompts, completions), columns, timeout, count)
            return list(found)

        def call() -> list[float]:
            try:
                return as_floats(function(prompts, completions, **columns), count)
            except SampleFault:
                raise
            except Exception as error:
                raise Raised(f"raised {type(error).__name__}: {str(error)[:500]}") from error

        return call() if self.reward.direct else _in_thread(call, timeout)

    def _blame(self, problem: str, seconds: float, late: bool) -> RewardError:
        """Call it answer by answer, for no longer than `seconds`, to find which one is meant."""
        if len(self.texts) == 1:
            return self._error(problem, 0)
        if isinstance(self.reward.function, FunctionProcess):
            self.reward.function.ensure()
        deadline = time.monotonic() + seconds
        for sample in range(len(self.texts)):
            try:
                self._part(slice(sample, sample + 1), max(deadline - time.monotonic(), 0.01))
            except SampleFault as fault:
                return self._error(fault.problem, sample)
            except TimeoutError:
                if late:
                    return self._error(problem, sample)
                break
        return self._error(
            f"{problem} (with {len(self.texts)} answers together, with none of them alone)", None
        )

    def _error(self, problem: str, sample: int | None) -> RewardError:
        prompt = "" if sample is None else self.texts[sample]
        return RewardError(self.reward.name, sample, prompt, problem)


def _in_thread(function: Callable[[], list[float]], timeout: float) -> list[float]:
    """The function's result, from a thread that the process need not wait for.

    Raises TimeoutError, leaving the thread behind; what the function raises.
    """
    result: list[Any] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            result[:] = [True, context.run(function)]
        except BaseException as error:  # SystemExit too: it is the reward's, not the run's
            result[:] = [False, error]

    thread = threading.Thread(target=work, name="fastllm reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError
    done, value = result
    if done:
        return value  # type: ignore[no-any-return]
    if isinstance(value, SampleFault):
        raise value
    raise Raised(f"raised {type(value).__name__}: {value}") from value

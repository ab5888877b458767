"""From names of rewards to what is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastllm.errors import did_you_mean
from fastllm.train.rewards import shipped
from fastllm.train.rewards.accuracy import accuracy
from fastllm.train.rewards.process import FunctionProcess

RewardFunction = Callable[..., Sequence[float]]

SHIPPED: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "exact_match": shipped.exact_match,
    "think_format": shipped.think_format,
    "length": shipped.length(1000),
    "repetition": shipped.repetition(3),
}
# shipped rewards that take a number behind a colon
_NUMBERED: dict[str, Callable[[int], RewardFunction]] = {
    "length": shipped.length,
    "repetition": shipped.repetition,
}
_MODEL = "model:"


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A reward and its name in metrics and errors.

    function: a Python function, or a FunctionProcess. direct: it always ends by itself, so it is
    called without a timeout. messages: it takes prompts as they are, chat messages too.
    """

    name: str
    function: RewardFunction | FunctionProcess
    direct: bool = False
    messages: bool = False


def resolve(
    names: Sequence[str | RewardFunction | NamedReward], device: str | None = None
) -> list[NamedReward]:
    """The rewards that names mean; see the package's docstring. Functions name themselves; the
    second of a name, from another file or of another model, keeps all that is given: b.py:polite.

    device: of reward models; default "cpu".

    Raises ValueError for an unknown name, one that occurs twice, or a function that cannot be
    loaded; FileNotFoundError; what loading a reward model raises.
    """
    if isinstance(names, str):
        raise TypeError("names must be a sequence of names, not one name")
    found: dict[str, NamedReward] = {}
    given: set[object] = set()
    for name in names:
        reward = _resolve(name, device)
        if reward.name in found and isinstance(name, str):  # functions or models of two places
            reward = replace(reward, name=name)
        if name in given or reward.name in found:
            raise ValueError(f"the reward {reward.name!r} is given twice; weigh it instead")
        given.add(name)
        found[reward.name] = reward
    return list(found.values())


def _resolve(name: str | RewardFunction | NamedReward, device: str | None) -> NamedReward:
    if isinstance(name, NamedReward):
        return name
    if not isinstance(name, str):
        if not callable(name):
            raise TypeError(f"a reward is a name or a function, not a {type(name).__name__}")
        return NamedReward(getattr(name, "__name__", type(name).__name__), name)
    if name.startswith(_MODEL):
        return _model(name.removeprefix(_MODEL), device)
    place, colon, last = name.rpartition(":")
    if place.endswith(".py"):
        return _of_file(place, last)
    if name.endswith(".py"):
        raise ValueError(f"{name} names no function: give {name}:FUNCTION")
    kind = place if colon else name
    if kind not in SHIPPED:
        hint = did_you_mean(kind, SHIPPED) or (
            f"there are {', '.join(SHIPPED)}, path/to/file.py:function and model:DIR"
        )
        raise ValueError(f"there is no reward {name!r}; {hint}")
    return NamedReward(name, _numbered(kind, last) if colon else SHIPPED[kind], direct=True)


def _numbered(kind: str, number: str) -> RewardFunction:
    if kind not in _NUMBERED:
        raise ValueError(f"the reward {kind} takes no number, got {number!r}")
    if not (number.isascii() and number.isdigit() and 0 < int(number[:10]) <= 10**9):
        raise ValueError(f"{kind}:{number}: expected a whole number above 0")
    return _NUMBERED[kind](int(number))


def _of_file(place: str, name: str) -> NamedReward:
    if not name.isidentifier():
        raise ValueError(f"{place}:{name}: expected the name of a function behind the colon")
    if not Path(place).is_file():
        raise FileNotFoundError(f"{place}: there is no such file")
    return NamedReward(name, FunctionProcess(f"{os.path.abspath(place)}:{name}"))


def _model(path: str, device: str | None) -> NamedReward:
    if not path:
        raise ValueError("model: names no directory: give model:DIR")
    from fastllm.train.reward_model import RewardModel

    return NamedReward(
        "model", RewardModel(path, device=device or "cpu"), direct=True, messages=True
    )

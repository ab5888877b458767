from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from fastllm.train.config import (
    describe,
    flat,
    keys,
    load_config,
    parse_overrides,
    save_config,
    to_dict,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-3
    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    every: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    steps: int = 100
    fast: bool = False
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    out: str = "runs"
    optim: Optim = field(default_factory=Optim)
    loop: Loop = field(default_factory=Loop)
    names: tuple[str, ...] = ()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_over_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "out: a\noptim:\n  lr: 2e-3\nloop.inner.every: 5\n")
    config = load_config(Config, file, ["optim.lr=3e-3", "--loop.steps", "1_000", "--loop.fast"])
    assert config == Config(
        out="a", optim=Optim(lr=3e-3), loop=Loop(steps=1000, fast=True, inner=Inner(every=5))
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["out=x=y"], {"out": "x=y"}),
        (["--out", "x=y"], {"out": "x=y"}),
        (["--out=-3"], {"out": "-3"}),
        (["--loop.fast", "--out", "b"], {"loop.fast": True, "out": "b"}),
        (["--loop.fast", "false"], {"loop.fast": False}),
        (["--optim.muon-lr", "0.5"], {"optim.muon_lr": 0.5}),
        (["optim.muon_lr=none"], {"optim.muon_lr": None}),
        (["optim.betas=[0.8, 0.9]"], {"optim.betas": [0.8, 0.9]}),
        (["optim.betas=0.8,0.9"], {"optim.betas": [0.8, 0.9]}),
        (["names=a,b"], {"names": ["a", "b"]}),
        (["names="], {"names": []}),
        (["loop.steps=1e3"], {"loop.steps": 1000}),
    ],
)
def test_overrides_take_the_type_of_their_field(words: list[str], value: dict[str, Any]) -> None:
    assert flat(to_dict(load_config(Config, None, words))).items() >= value.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], r"option optim\.lrr is unknown: did you mean optim\.lr\?"),
        (["lr=1"], r"option lr is unknown: did you mean optim\.lr\?"),
        (["--loop.inner.evry", "3"], r"did you mean loop\.inner\.every\?"),
        (["zzzz=1"], r"there are out, optim\.lr"),
        (["optim.lr=fast"], r"optim\.lr must be number, got 'fast'"),
        (["loop.steps=1.5"], r"loop\.steps must be integer, got '1\.5'"),
        (["loop.steps=nan"], r"loop\.steps must be integer"),
        (["loop.fast=2"], r"loop\.fast must be true\|false"),
        (["optim.name=adam"], r"optim\.name must be one of adamw, muon \(did you mean adamw\?\)"),
        (["optim.lr=-1"], r"optim\.lr must be positive, got -1\.0"),
        (["stray"], "'stray' is not an override"),
        (["--out"], "--out needs a value"),
        (["--out", "--loop.fast"], "--out needs a value"),
    ],
)
def test_what_does_not_fit_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Config, None, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", r"run\.yaml: key optim\.lrr is unknown: did you mean optim\.lr\?"),
        ("optimm:\n  lr: 1\n", r"run\.yaml: key optimm is unknown"),
        ("optim: 3\n", r"run\.yaml: optim is a section of keys, not the value 3"),
        ("out: a\nout: b\n", r"key 'out' is there twice"),
        ("- a\n", r"must hold keys and values, holds a list"),
        ("out: [", r"run\.yaml is not YAML"),
        ("loop:\n  steps: many\n", r"loop\.steps must be integer, got 'many'"),
        ("loop:\n  steps: true\n", r"loop\.steps must be integer, got True"),
        ("out: !!python/object/apply:os.getcwd []\n", r"run\.yaml is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Config, written(tmp_path, text))


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = Config(out="é", optim=Optim(lr=1e-5, muon_lr=0.02), names=("a", "null"))
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Config, tmp_path / "c.yaml") == config


def test_derived_values_lie_between_defaults_and_what_is_given() -> None:
    seen: list[set[str]] = []

    def derive(config: Config, given: Set[str]) -> dict[str, Any]:
        seen.append(set(given))
        return {"optim.lr": config.loop.steps / 1000, "loop.inner.every": 7}

    config = load_config(
        Config, None, ["every=3", "loop.steps=50"], derive=derive,
        aliases={"every": "loop.inner.every"},
    )  # fmt: skip
    assert (config.optim.lr, config.loop.inner.every) == (0.05, 3)
    assert seen == [{"loop.inner.every", "loop.steps"}]


def test_a_section_keeps_the_defaults_of_its_field() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Other:
        loop: Loop = field(default_factory=lambda: Loop(steps=7, inner=Inner(every=5)))

    assert load_config(Other, None, ["loop.fast=true"]).loop == Loop(
        steps=7, fast=True, inner=Inner(every=5)
    )
    assert load_config(Other, None, ["loop.steps=2"]).loop.inner.every == 5


def test_every_key_is_described() -> None:
    rows = {key: (kind, default) for key, kind, default in describe(Config)}
    assert list(rows) == list(keys(Config))
    assert rows["optim.name"] == ("adamw|muon", "adamw")
    assert rows["optim.muon_lr"] == ("number or none", "none")
    assert rows["loop.fast"] == ("true|false", "false")


def test_hyphens_and_switches_in_words() -> None:
    assert parse_overrides(["--a-b=1", "c=2"], {}) == [("a_b", "1"), ("c", "2")]

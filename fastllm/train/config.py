"""Configurations: frozen dataclasses, filled from a YAML file and dotted overrides.

    config = load_config(PretrainConfig, "small.yaml", ["model.depth=8", "--optim.lr", "1e-3"])

A section is a field whose type is a dataclass; a key is the path to a value, `optim.lr`. Values
take the type of their field, an unknown key is an error that names the nearest one, and what does
not fit is refused with the key in front. Classes check their own values in `__post_init__`, by
raising ValueError with a message that begins with the field's name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from fastllm.errors import did_you_mean

T = TypeVar("T")

_TRUE, _FALSE, _NONE = ("true", "yes", "on"), ("false", "no", "off"), ("none", "null", "~")


def load_config(
    cls: type[T],
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    derive: Callable[[T, Set[str]], Mapping[str, Any]] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> T:
    """A `cls` from its defaults, then the YAML file, then the overrides, each over the one before.

    overrides: command-line words: `key=value`, `--key=value`, `--key value`, or `--key` alone for a
        switch that is to be on.
    derive: gives values by key for what the file and the overrides leave open, from the
        configuration that they make with the defaults, and the keys that they name.
    aliases: short names of keys, for overrides: {"depth": "model.depth"}.
    Raises ValueError naming the file or the option, the key and, for an unknown key, the nearest.
    """
    values: dict[str, Any] = {}
    if path is not None:
        for key, value in _flatten(cls, _read_yaml(Path(path)), str(path)):
            values[key] = value
    known, short = keys(cls), dict(aliases or {})
    spelled = known | {name: known[key] for name, key in short.items()}
    for key, value in parse_overrides(overrides, spelled):
        if key not in spelled:
            raise ValueError(_unknown(key, spelled, f"option {key}"))
        values[short.get(key, key)] = value
    config = _build(cls, values, "")
    if derive is None:
        return config
    return _build(cls, {**derive(config, values.keys()), **values}, "")


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write a configuration as YAML that `load_config` reads back to an equal one."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values: what YAML and JSON can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def keys(cls: type) -> dict[str, Any]:
    """Every dotted key of a configuration class with the type of its value, in order."""
    found: dict[str, Any] = {}
    for field, kind in _fields(cls):
        section = _section(kind)
        if section is None:
            found[field.name] = kind
        else:
            found |= {f"{field.name}.{key}": kind for key, kind in keys(section).items()}
    return found


def describe(cls: type) -> list[tuple[str, str, str]]:
    """(key, type, default) of every key, as text for `--help`."""
    defaults = flat(to_dict(cls()))
    return [(key, _type_name(kind), _text(defaults.get(key))) for key, kind in keys(cls).items()]


def parse_overrides(
    words: Sequence[str], known: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Command-line words as (key, value) pairs; hyphens in a key are underscores.

    known: types by key; `--key` of a bool needs no value. Raises ValueError for a stray word.
    """
    pairs: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option = word.startswith("--")
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not key or not (equals or option):
            raise ValueError(f"{word!r} is not an override: write key=value or --key value")
        if not equals:
            switch = known is not None and known.get(key) is bool
            follows = rest and not rest[0].startswith("--") and "=" not in rest[0]
            if follows and not (switch and rest[0].lower() not in _TRUE + _FALSE):
                value = rest.pop(0)
            elif switch:
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)  # a value with "=" in it
            else:
                raise ValueError(f"--{key} needs a value: --{key} VALUE or {key}=VALUE")
        pairs.append((key, value))
    return pairs


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                mark = key_node.start_mark
                problem = f"key {key_node.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, holds a {type(values).__name__}")
    return values


def _flatten(cls: type, values: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of a file's nested values; `optim.lr: 1` is read as well as nested keys."""
    known = keys(cls)
    sections = {key.rpartition(".")[0] for key in known} - {""}
    sections |= {s.partition(".")[0] for s in sections}

    def walk(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if key in known:
                yield key, value
            elif key not in sections:
                raise ValueError(_unknown(key, known, f"{where}: key {key}"))
            elif isinstance(value, Mapping):
                yield from walk(value, key + ".")
            elif value is not None:
                raise ValueError(
                    f"{where}: {key} is a section of keys, not the value {value!r:.80}"
                )

    return walk(values, "")


def _unknown(key: str, known: Mapping[str, Any], subject: str) -> str:
    hint = did_you_mean(key, known, cutoff=0.5)
    if not hint:  # the section may be wrong or left out
        last = {k.rpartition(".")[2]: k for k in reversed(list(known))}
        near = difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
        hint = f"did you mean {last[near[0]]}?" if near else f"there are {', '.join(known)}"
    return f"{subject} is unknown: {hint}"


def _build(cls: type[T], values: Mapping[str, Any], prefix: str, base: T | None = None) -> T:
    """A `cls` of the values. base: what fields that no value names have; default the class's."""
    arguments: dict[str, Any] = {}
    for field, kind in _fields(cls):
        key = prefix + field.name
        section = _section(kind)
        if section is not None:
            # A section's defaults are those that its field has, not those of the section's class.
            own = _default(field) if base is None else getattr(base, field.name)
            if any(k.startswith(key + ".") for k in values) or own is None:
                arguments[field.name] = _build(section, values, key + ".", own)
            else:
                arguments[field.name] = own
        elif key in values:
            arguments[field.name] = convert(values[key], kind, key)
        elif base is not None:
            arguments[field.name] = getattr(base, field.name)
        elif not _has_default(field):
            raise ValueError(f"{key} has no default: give it in the file or as {key}=VALUE")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        if prefix and not str(error).startswith(prefix):
            raise type(error)(f"{prefix}{error}") from error
        raise


def convert(value: Any, kind: Any, key: str) -> Any:
    """`value`, from a file or as text, as the type `kind`. Raises ValueError naming the key."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in _NONE):
            if type(None) in arguments:
                return None
        (kind,) = [a for a in arguments if a is not type(None)]
        return convert(value, kind, key)
    if origin is Literal:
        if value in arguments:
            return value
        hint = did_you_mean(str(value), map(str, arguments))
        hint = f" ({hint})" if hint else ""
        choices = ", ".join(map(str, arguments))
        raise ValueError(f"{key} must be one of {choices}{hint}, got {value!r:.80}")
    if origin is tuple:
        if isinstance(value, str):
            value = yaml.safe_load(value) if value[:1] == "[" else value.split(",") if value else []
        if not isinstance(value, list | tuple):
            value = [value]
        return tuple(convert(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value))
    converted = _scalar(value, kind)
    if converted is None:
        raise ValueError(f"{key} must be {_type_name(kind)}, got {value!r:.80}")
    return converted


def _scalar(value: Any, kind: type) -> Any:
    """The value as int, float, bool or str; None if it is none of that type."""
    if kind is bool:
        text = str(value).lower() if isinstance(value, bool | str) else ""
        return True if text in _TRUE else False if text in _FALSE else None
    if kind is str:
        return (
            value
            if isinstance(value, str)
            else None
            if isinstance(value, dict | list)
            else str(value)
        )
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if kind is float:
        return number
    if isinstance(value, int):
        return value
    if number != number or number in (float("inf"), float("-inf")) or number != int(number):
        return None
    return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field, hints[field.name]


def _section(kind: Any) -> type | None:
    """The dataclass that a field's type is, or None."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, None if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default if field.default is not dataclasses.MISSING else None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    names = {type(None): "none", bool: "true|false", int: "integer", float: "number", str: "text"}
    return names.get(kind, str(kind))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

"""Typed reading of untrusted mappings: JSON objects and GGUF metadata.

Only the keys that are asked for are looked at. A value of the wrong type, a number that is not
finite, a repeated key: all are ModelFileError naming file and field.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fastllm.errors import ModelFileError

MAX_JSON_BYTES = 16 << 20  # the index of a model of a trillion parameters takes 8 MiB
MAX_CONFIG_BYTES = 1 << 20
MAX_INTEGER = 1 << 63

_REQUIRED: Final = object()


def describe(value: object) -> str:
    """A short text for an error message, bounded whatever the value is."""
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return f"a {type(value).__name__}"


class Fields:
    """Checked access to a mapping that came from `file`. Null counts as absent."""

    def __init__(
        self, values: Mapping[str, Any], file: str | os.PathLike[str], prefix: str = ""
    ) -> None:
        self.values = values
        self.file = file
        self.prefix = prefix

    def fail(self, key: str, problem: str, remedy: str = "") -> ModelFileError:
        """The error for one key, to be raised by the caller."""
        return ModelFileError(self.file, self.prefix + key, problem, remedy)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.fail(key, "is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number; 8.0 counts as one. `default` is returned as it is."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= MAX_INTEGER:
            raise self.fail(key, f"must be an integer, is {describe(value)}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite float."""
        value = self._get(key, default)
        return value if value is default else self._finite(key, value)

    def _finite(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, float) and math.isfinite(value):
                return value
            if isinstance(value, int) and abs(value) < MAX_INTEGER:
                return float(value)
        raise self.fail(key, f"must be a finite number, is {describe(value)}")

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, is {describe(value)}")
        return value

    def string(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.fail(key, f"must be a string, is {describe(value)}")
        return value

    def sequence(self, key: str, limit: int, default: Any = _REQUIRED) -> Any:
        """A list of at most `limit` items, unchecked."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise self.fail(key, f"must be a list, is {describe(value)}")
        if len(value) > limit:
            raise self.fail(key, f"has {len(value)} items, more than the allowed {limit}")
        return value

    def strings(self, key: str, limit: int, default: Any = _REQUIRED) -> Any:
        values = self.sequence(key, limit, default)
        if values is default:
            return values
        for value in values:
            if not isinstance(value, str):
                raise self.fail(key, f"must hold strings only, holds {describe(value)}")
        return tuple(values)

    def numbers(self, key: str, limit: int, default: Any = _REQUIRED) -> Any:
        values = self.sequence(key, limit, default)
        return values if values is default else tuple(self._finite(key, v) for v in values)

    def token_ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A token id or a list of them."""
        if not self.has(key):
            return default
        value = self.values[key]
        if not isinstance(value, list | tuple):
            return (int(self.integer(key)),)
        if len(value) > 1024:
            raise self.fail(key, f"lists {len(value)} token ids, more than the allowed 1024")
        for item in value:
            if not isinstance(item, int) or isinstance(item, bool):
                raise self.fail(key, f"must hold integers only, holds {describe(item)}")
        return tuple(dict.fromkeys(value))

    def section(self, key: str) -> Fields | None:
        """The nested object under `key`, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(key, f"must be an object, is {describe(value)}")
        return Fields(value, self.file, f"{self.prefix}{key}.")


def read_json_object(
    path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """A JSON file whose top level is an object. Raises ModelFileError on anything else."""
    path = Path(path)
    try:
        if not path.is_file() or path.stat().st_size > max_bytes:
            raise ModelFileError(
                path, "file", f"does not exist or is not a file of at most {max_bytes} bytes"
            )
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelFileError(path, "file", f"cannot be read: {reason}") from error
    return parse_json_object(raw, path, "JSON")


def parse_json_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse untrusted JSON: duplicate keys, NaN, infinities and deep nesting are refused."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_constant=_no_constant
        )
    except RecursionError:
        raise ModelFileError(path, what, "is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ModelFileError(path, what, f"is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ModelFileError(path, what, "must be an object at the top level")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {describe(key)} appears twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")

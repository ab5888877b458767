"""Which releases of transformers this package was tested with."""

from __future__ import annotations

import warnings

TESTED = ("5.20", "5.23")  # first and last minor release that the tests ran with, all parts
_WARNED: set[str] = set()


def check_version() -> None:
    """Warn once where another transformers is installed than the tested ones.

    Raises:
        ImportError: transformers is not installed, or is older than 5, whose attention, mask and
            experts interfaces are not there.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "transformers is needed for this: pip install 'fastllm-engine[bench]'"
        ) from error
    version = transformers.__version__
    minor = _numbers(version)
    if minor < (5, 0):
        raise ImportError(
            f"transformers {version} is too old: its interfaces for attention, masks and experts "
            f"came with 5.0; tested are {TESTED[0]} to {TESTED[1]}"
        )
    if not _numbers(TESTED[0]) <= minor <= _numbers(TESTED[1]) and version not in _WARNED:
        _WARNED.add(version)
        warnings.warn(
            f"transformers {version} is outside the tested range ({TESTED[0]} to {TESTED[1]}): "
            "run fastllm.verify(model) before you rely on it",
            stacklevel=3,
        )


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)

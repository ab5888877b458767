"""Print the requirements that pyproject.toml declares, for `pip install -r`.

Usage: python tools/requirements.py [EXTRA ...]

Prints the build requirements, the dependencies and the named extras, one a line. pip cannot install
these without also building the project, and `make` builds the project in a step of its own, so that
a change of one C++ file costs one incremental build.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Build requirements, dependencies and the requirements of `extras`, in that order."""
    config = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    optional = config["project"]["optional-dependencies"]
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise SystemExit(f"pyproject.toml has no extra named {', '.join(unknown)}")
    lines = config["build-system"]["requires"] + config["project"]["dependencies"]
    for extra in extras:
        lines += optional[extra]
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).parent.parent / "pyproject.toml", sys.argv[1:])))

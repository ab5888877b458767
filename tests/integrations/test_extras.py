"""Without the optional packages: an ImportError that names the extra, and nothing else broken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "peft", "trl", "lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

sys.meta_path.insert(0, Missing())
import fastllm

CALLS = {
    "patch": lambda: fastllm.patch(),
    "verify": lambda: fastllm.verify(None),
    "QuantConfig": lambda: fastllm.QuantConfig("int4"),
    "load_gguf": lambda: fastllm.load_gguf("model.gguf"),
    "nn": lambda: fastllm.nn.RMSNorm(8),
    **{name: lambda name=name: importlib.import_module(f"fastllm.integrations.{name}")
       for name in ("live_model", "trl", "peft", "lm_eval")},
}
found = {}
for name, call in CALLS.items():
    try:
        call()
        found[name] = None
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""
EXTRAS = {
    "patch": "bench", "verify": "bench", "QuantConfig": "bench", "load_gguf": "bench",
    "live_model": "trl", "trl": "trl", "peft": "trl", "lm_eval": "eval", "nn": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, list[str] | None]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120
    )
    made: dict[str, list[str] | None] = json.loads(run.stdout)
    return made


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_an_error_that_names_the_extra(
    name: str, found: dict[str, list[str] | None]
) -> None:
    error, extra = found[name], EXTRAS[name]
    if extra is None:
        assert error is None
    else:
        assert error is not None and error[0] == "ImportError"
        assert f"pip install 'fastllm-engine[{extra}]'" in error[1]

"""Makes the helper files beside the tests importable: test folders are not packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

for name in ("tiny_models", "tiny_tokenizer"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

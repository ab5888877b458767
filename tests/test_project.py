"""The project's own rules: who may import whom, what every op has, what the files may not hold."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllm.ops
from fastllm.ops.registry import OPS, Impl, Op
from fastllm.testing.check import case_arguments
from fastllm.testing.opinfo import OpInfo, all_infos

ROOT = Path(__file__).parent.parent
INFOS = all_infos()

# part of the package -> the parts below it that it may import. Arrows point one way.
OPS_LEVEL = {"errors", "kernels", "_C"}
MODELS_LEVEL = {"errors", "tables", "ops", "nn", "quantize", "graph"}
BELOW = {
    "errors": set[str](),
    "tables": set[str](),
    "ops": OPS_LEVEL,
    "graph": {"errors", "ops", "_C"},
    "quantize": {"errors", "tables", "ops", "_C"},
    "nn": {"errors", "ops", "quantize"},
    "models": MODELS_LEVEL,
    "engine": MODELS_LEVEL | {"models"},
    "train": MODELS_LEVEL | {"models", "engine"},
    "integrations": MODELS_LEVEL | {"models", "engine"},
    "cli": MODELS_LEVEL | {"models", "engine", "train", "integrations", "_C", "__init__"},
    "testing": MODELS_LEVEL | {"models", "engine", "train", "_C", "__init__"},
    "__init__": {"ops", "nn", "models", "quantize", "engine", "graph", "integrations"},
    "__main__": {"cli"},
}
LAZY_IN_CLI = {"testing", "bench"}  # only inside functions, for `bench`, `doctor` and `demo`
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def imports(path: Path, package: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Absolute names that a file imports, and whether the import waits inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If))
        if not isinstance(node, ast.If) or ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield ".".join([*base, alias.name]), id(node) in lazy


def violations(path: Path, package: tuple[str, ...], part: str) -> list[str]:
    """The imports of one file of the package that its part may not make."""
    wrong = []
    for name, lazy in imports(path, package):
        head, *rest = name.split(".")
        if head != "fastllm":
            continue
        target = rest[0] if rest else "__init__"
        if target.startswith("__") and target != "__init__":
            target = "__init__"  # fastllm.__version__
        allowed = BELOW[part] | {part} | (LAZY_IN_CLI if part == "cli" and lazy else set())
        if target not in allowed:
            wrong.append(f"{path.relative_to(ROOT)}: {part} imports {target} ({name})")
    return wrong


def test_imports_inside_the_package_point_one_way() -> None:
    files = sorted((ROOT / "fastllm").rglob("*.py"))
    assert files
    wrong: list[str] = []
    for path in files:
        place = path.relative_to(ROOT).with_suffix("").parts
        part = place[1]
        assert part in BELOW, f"{path} is in no part that the rules know"
        wrong += violations(path, place[:-1], part)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "package", "part", "count"),
    [
        ("from ..engine import llm", ("fastllm", "ops"), "ops", 1),
        ("import fastllm.models.decoder", ("fastllm", "nn"), "nn", 1),
        ("from ..testing import timing", ("fastllm", "cli"), "cli", 1),
        ("def f():\n    from ..testing import timing", ("fastllm", "cli"), "cli", 0),
        ("def f():\n    from ..testing import opinfo", ("fastllm", "engine"), "engine", 1),
        ("from .. import _C\nfrom ..kernels import rope", ("fastllm", "ops"), "ops", 0),
    ],
)
def test_the_import_rules_catch_a_wrong_arrow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    package: tuple[str, ...],
    part: str,
    count: int,
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "probe.py"
    path.write_text(source)
    assert len(violations(path, package, part)) == count


def test_kernels_import_torch_triton_and_the_standard_library_only() -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert files
    siblings = {path.stem for path in files}
    for path in files:
        for name, _ in imports(path, ("kernels",)):
            parts = name.split(".")
            own = parts[0] == "kernels" and (len(parts) < 2 or parts[1] in siblings)
            assert own or parts[0] in KERNELS_MAY_IMPORT, f"{path.name} imports {name}"


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_folders_that_other_packages_share_their_name_with_are_no_packages(folder: str) -> None:
    # With an __init__.py, `import kernels` at the root would shadow a package of that name.
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_native_sources_include_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        found = set(re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8")))
        foreign = {name for name in found if name.startswith(("torch/", "ATen/", "c10/"))}
        if path.name != "bindings.cpp":
            foreign |= {
                name for name in found if name.startswith("pybind11/") or name == "Python.h"
            }
        assert not foreign, f"{path.name} includes {foreign}"


def test_every_op_has_an_opinfo() -> None:
    assert fastllm.ops is not None
    assert set(OPS) == set(INFOS)


def _needs(info: OpInfo) -> dict[tuple[torch.dtype | None, str], tuple[Any, ...]]:
    """Arguments of one case for each pair of dtype and variant that the cases of an op call for."""
    op = OPS[info.name]
    found: dict[tuple[torch.dtype | None, str], tuple[Any, ...]] = {}
    for dtype in info.dtypes:
        for case in info.cases(dtype):
            args = case_arguments(info, case)
            variant = op.variant(*args) if op.variant is not None else ""
            first = next(
                (a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()), None
            )
            found.setdefault((first.dtype if first is not None else None, variant), args)
    return found


def _serving(op: Op, device: str, name: str, dtype: Any, variant: str) -> list[Impl]:
    return [
        row
        for row in op.tables[device]
        if row.name == name
        and not row.opt_in
        and (dtype is None or dtype in row.dtypes)
        and (not variant or variant in row.variants)
    ]


@pytest.mark.parametrize("name", sorted(INFOS))
def test_every_dtype_and_variant_has_a_native_row_and_a_triton_row(name: str) -> None:
    op, info = OPS[name], INFOS[name]
    needs = _needs(info)
    assert {variant for _, variant in needs if variant} >= set(info.variants), (
        "a variant has no case"
    )
    for (dtype, variant), args in needs.items():
        what = f"{name} {dtype} {variant}"
        native = _serving(op, "cpu", "native", dtype, variant)
        assert native, f"{what}: no native CPU row"
        assert op.select(args) in [row.fn for row in native], f"{what}: another row is chosen"
        assert _serving(op, "cuda", "triton", dtype, variant), f"{what}: no Triton row"


def _project_files() -> list[Path]:
    folders = ["bench", "cmake", "csrc", "fastllm", "kernels", "tests", "tools", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return [p for p in files if "__pycache__" not in p.parts and p.suffix not in (".png", ".so")]


def test_no_file_names_a_private_path_or_a_package_index() -> None:
    # A path of somebody's machine, or an index, would work for its author alone.
    folders = "|".join(["home/\\w", "root/", "tmp/\\w", "work/", "Users/\\w", "mnt/"])
    indexes = "|".join(["pypi" + "\\.org", "pythonhosted" + "\\.org", "extra-" + "index-url"])
    pattern = re.compile(rf"(?<![\w.])/(?:{folders})|{indexes}")
    for path in _project_files():
        if path == Path(__file__):
            continue
        found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)} holds {found.group(0)!r}"  # type: ignore[union-attr]


def test_pinned_versions_satisfy_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        requirement.name.lower(): str(requirement.specifier).removeprefix("==")
        for requirement in (Requirement(s) for s in lines if s.strip() and not s.startswith("#"))
    }
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = config["project"]["dependencies"] + config["build-system"]["requires"]
    for extra in config["project"]["optional-dependencies"].values():
        declared += extra
    for requirement in map(Requirement, declared):
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]}"

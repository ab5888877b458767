"""Every Python block of docs/dropin.md runs, on a tiny model in the place of the real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, tiny
from tiny_tokenizer import tiny_tokenizer

import fastllm
from fastllm.integrations.live_model import LiveModel
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.weights import open_weights

PAGE = Path(__file__).parents[2] / "docs" / "dropin.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPTIONAL = ("trl", "peft", "lm_eval", "datasets")  # packages that a block may need
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list[Any]:
    """(first line, source) of each block, named by the heading that it stands under."""
    text = PAGE.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()]
        heading = re.findall(r"^## (.*)", before, re.MULTILINE)[-1]
        line = before.count("\n") + 2
        found.append(pytest.param(line, match[1], id=f"{heading} (line {line})"))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("SmolLM2")
    made = tiny("smollm")
    made.generation_config.eos_token_id = 2
    made.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tokenizer = train_tokenizer(["Once upon a time, twice upon a time"], 300, allow_smaller=True)
    tiny("llama", vocab_size=tokenizer.vocab_size).save_pretrained(path / "llama")
    export_gguf(weights_of(open_weights(path / "llama")), path / "model.gguf", "q8_0", tokenizer)
    return path


@pytest.mark.filterwarnings("ignore")  # of packages that the block imports
@pytest.mark.parametrize(("line", "source"), blocks())
def test_the_block_runs(
    line: int, source: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in OPTIONAL:
        if re.search(rf"^(import|from) {package}\b", source, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").symlink_to(model / "model.gguf")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "0")  # a block may set it: it is set back
    code = compile("\n" * (line - 1) + source.replace(MODEL, str(model)), str(PAGE), "exec")
    try:
        exec(code, {"__name__": "__dropin__"})
    finally:
        fastllm.unpatch()


def test_the_page_has_blocks_for_all_that_it_names() -> None:
    text = "\n".join(block.values[1] for block in blocks())
    for name in ("patch(", "verify(", "rollout_func(", "FastLM(", "sdpa(", "RMSNorm(", "MoE(",
                 "QuantLinear.", "LinearCrossEntropyLoss(", "fuse_head(", "QuantConfig(",
                 "load_gguf(", "get_peft_model("):  # fmt: skip
        assert name in text, f"docs/dropin.md shows no {name}"


def test_examples_of_plain_pytorch_have_few_lines() -> None:
    plain = [b.values[1] for b in blocks() if b.id is not None and "Plain PyTorch" in b.id]
    assert len(plain) == 5
    for source in plain:
        lines = [x for x in source.splitlines() if x and not x.startswith(("import ", "from "))]
        assert len(lines) <= 5, source


def table() -> dict[str, set[str]]:
    """The table of families: class -> the columns that say yes."""
    lines = [x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith("| ")]
    first = next(i for i, line in enumerate(lines) if line.startswith("| transformers class"))
    columns = [cell.strip() for cell in lines[first].split("|")[2:-1]]
    found = {}
    for line in lines[first + 1 :]:
        if not line.startswith("| `"):
            break
        name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        said = {c for c, cell in zip(columns, cells, strict=True) if cell.startswith("yes")}
        found[name.split("`")[1]] = said
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_families_is_what_the_report_says(family: str) -> None:
    model = tiny(family)
    said = table()[type(model).__name__]
    report = fastllm.patch(model, strict=True)
    assert said - {"rollouts"} == set(report.counts())
    try:
        LiveModel(model)
        served = True
    except ValueError:
        served = False
    assert served == ("rollouts" in said)

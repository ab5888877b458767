"""The demo's pretraining: a tokenizer and a small model, from texts that every Python brings along.

The texts are the interpreter's documentation topics and the sources of its standard library. The
model is judged on files that it never saw, in bits per byte, beside `gzip -9` of the same files:
both are compressors, the one learned in minutes, the other a rule.
"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import facts, heading

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer
    from ..train.data.store import TokenStore

VOCAB_SIZE = 8192
DEPTH = 3  # 2.9M parameters: of depths 3 and 4 the one that ends lower in two minutes on two cores
# Tests, tables and what is about to leave the library say little about how Python is written.
_SKIPPED = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "pydoc_data", "idlelib", "lib2to3", "distutils", "turtledemo", "msilib", "ensurepip",
}  # fmt: skip
_PROMPTS = ("def read_file(path):\n", "The built-in function", "class Queue:\n")
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """What came of it."""

    model: Path  # a Hugging Face directory
    bits_per_byte: float
    gzip_bits_per_byte: float
    tokens_per_second: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model": str(self.model),
            "bits_per_byte": self.bits_per_byte,
            "gzip_bits_per_byte": self.gzip_bits_per_byte,
            "tokens_per_second": self.tokens_per_second,
        }


def pretrain_demo(out: Path, seconds: float, depth: int = DEPTH) -> Pretrained:
    """Corpus, tokenizer, store, model; everything below `out`.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..models.tokenizer_training import save_tokenizer, train_tokenizer
    from ..train import pretrain
    from ..train.data.prepare import PrepareConfig, prepare

    heading(f"A tokenizer and a model of your own Python's texts, in {seconds:.0f} seconds")
    files = corpus(out / "topics")
    size = sum(file.stat().st_size for file in files)
    tokenizer = train_tokenizer((f.read_text("utf-8") for f in files), VOCAB_SIZE)
    save_tokenizer(tokenizer, out / "tokenizer", overwrite=True)
    store = prepare(
        PrepareConfig(
            inputs=tuple(map(str, files)),
            tokenizer=str(out / "tokenizer"),
            out=str(out / "store"),
            holdout=0.05,
            filters=None,
            processes=1,  # starting others takes as long as these few texts
            overwrite=True,
        ),
        warn=lambda _: None,
    )
    train, held = store.split("train"), store.split("holdout")
    facts(
        [
            ("texts", f"{len(files)} files, {size / 1e6:.1f} MB"),
            ("tokenizer", f"{VOCAB_SIZE} tokens, {train.text_bytes / train.tokens:.2f} bytes each"),
            (
                "held out",
                f"{held.documents} files, {held.text_bytes / 1e3:.0f} kB, never trained on",
            ),
        ]
    )
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    result = pretrain.main(pretrain.load(None, overrides(out, run, seconds, depth)))
    if result.status != "finished" or result.checkpoint is None:
        raise KeyboardInterrupt
    records = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    done = Pretrained(
        model=result.checkpoint,
        bits_per_byte=result.metrics["bits_per_byte"],
        gzip_bits_per_byte=gzip_bits(store, tokenizer),
        tokens_per_second=rate(records),
    )
    show(done, records, run)
    return done


def overrides(out: Path, run: Path, seconds: float, depth: int) -> list[str]:
    """The run as `fastllm pretrain` takes it: what the preset gives, in so many seconds."""
    return [
        f"--store={out / 'store'}",
        f"--tokenizer={out / 'tokenizer'}",
        f"--depth={depth}",
        f"--seconds={seconds}",
        f"--out={run}",
        "--optim.name=muon",
        "--data.eval_rows=0",
        "--loop.eval_every=1000000",
        "--loop.save_every=1000000",
        "--loop.metrics.every=20",
    ]


def corpus(folder: Path) -> list[Path]:
    """The files to learn from; the documentation topics are written into `folder`."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    library = Path(sysconfig.get_path("stdlib"))
    sources = [
        file
        for file in sorted(library.rglob("*.py"))
        if not _SKIPPED & set(file.relative_to(library).parts) and file.stat().st_size
    ]
    return [*sorted(folder.glob("*.txt")), *sources]


def gzip_bits(store: TokenStore, tokenizer: Tokenizer) -> float:
    """Bits per byte of `gzip -9` on the held-out files, all in one: it may use what they share."""
    held = store.split("holdout")
    text = b"".join(documents(store, tokenizer, range(held.first, held.first + held.documents)))
    return 8 * len(gzip.compress(text, 9)) / len(text)


def documents(store: TokenStore, tokenizer: Tokenizer, numbers: Sequence[int]) -> Iterator[bytes]:
    """The texts of stored documents, byte for byte."""
    for number in numbers:
        first, last = map(int, store.offsets[number : number + 2])
        yield tokenizer.decode(store.tokens[first:last].tolist()).encode("utf-8")


def rate(records: Sequence[dict[str, Any]]) -> float:
    """Tokens a second of training, the median of the lines of metrics."""
    rates = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    return rates[len(rates) // 2] if rates else float("nan")


def show(done: Pretrained, records: Sequence[dict[str, Any]], run: Path) -> None:
    """Numbers, curve and samples."""
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams

    better = "below" if done.bits_per_byte < done.gzip_bits_per_byte else "NOT below"
    facts(
        [
            ("loss", sparkline([r["loss"] for r in records if "loss" in r])),
            ("trained", f"{max(r.get('tokens', 0) for r in records):,} tokens, "
                        f"{done.tokens_per_second:,.0f} tok/s"),
            ("held-out files", f"{done.bits_per_byte:.3f} bits per byte, {better} gzip -9: "
                               f"{done.gzip_bits_per_byte:.3f}"),
            ("report", str((run / "report.html").resolve())),
        ]
    )  # fmt: skip
    llm = LLM(done.model)
    params = SamplingParams(max_tokens=48, temperature=0.7, top_p=0.95, seed=1)
    for prompt, output in zip(_PROMPTS, llm.generate(list(_PROMPTS), params), strict=True):
        print(f"\n{prompt}{output.outputs[0].text}")


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """`8.31 █▆▄▃▂▁ 4.02`: values as blocks, the first and the last in figures."""
    if not values:
        return "no values"
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / ((high - low) or 1.0)
    blocks = "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)
    return f"{values[0]:.2f} {blocks} {values[-1]:.2f}"

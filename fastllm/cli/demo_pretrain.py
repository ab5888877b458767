"""The demo's pretraining: a tokenizer and two small models of texts that every Python brings along.

The texts are the interpreter's documentation topics and the sources of its standard library. One
model is a mixture of experts; the other is dense and multiplies each token with as many weights.
Both read the same tokens in the same order. They are judged on files that they never saw, in bits
per byte, beside `gzip -9` of the same files: all are compressors, the ones learned in a minute, the
other a rule.
"""

from __future__ import annotations

import gzip
import itertools
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import facts
from .demo_stage import Part, Setting, read_lines

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer
    from ..train.data.store import TokenStore

VOCAB_SIZE = 8192
DEPTH = 3  # of depths 3 and 4 the one that ends lower in two minutes on two cores
EXPERTS = 16  # of which a token takes 4
SHARE = 0.58  # of the time, for the model with experts; the dense one needs less for its tokens
# Tests, tables and what is about to leave the library say little about how Python is written.
_SKIPPED = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "pydoc_data", "idlelib", "lib2to3", "distutils", "turtledemo", "msilib", "ensurepip",
}  # fmt: skip
_PROMPTS = ("def read_file(path):\n", "The built-in function", "class Queue:\n")
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One of the two trainings."""

    model: Path  # a Hugging Face directory
    parameters: int
    active: int  # of them a token is multiplied with, the LM head's included
    steps: int
    bits_per_byte: float
    tokens_per_second: float
    lines: list[dict[str, Any]]  # of metrics

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        names = ("parameters", "active", "steps", "bits_per_byte", "tokens_per_second")
        return {"model": str(self.model), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """What came of it."""

    experts: Run
    dense: Run
    gzip_bits_per_byte: float

    @property
    def expert_load(self) -> float:
        """Slots of the busiest expert over the mean, worst layer, in the last line of metrics."""
        return next(float(r["expert_load"]) for r in reversed(self.experts.lines) if "experts" in r)

    def record(self) -> dict[str, Any]:
        """As JSON values: those of the model with experts, and the dense one's apart."""
        return {
            **self.experts.record(),
            "gzip_bits_per_byte": self.gzip_bits_per_byte,
            "expert_load": self.expert_load,
            "dense": self.dense.record(),
        }


def pretrain(setting: Setting) -> Part:
    """The stage: `pretrain_demo`, and what it shows."""
    folder = setting.folder("pretrain")
    done = pretrain_demo(folder, setting.seconds)
    runs = {"experts": done.experts, "dense": done.dense}
    losses = [
        (name, [(r["step"], r["loss"]) for r in run.lines if "loss" in r])
        for name, run in runs.items()
    ]
    rows = [
        [name, f"{run.parameters / 1e6:.2f}M", f"{run.active / 1e6:.2f}M",
         f"{run.tokens_per_second:,.0f}", f"{run.bits_per_byte:.3f}"]
        for name, run in runs.items()
    ]  # fmt: skip
    rows.append(["gzip -9", "", "", "", f"{done.gzip_bits_per_byte:.3f}"])
    columns = ["", "parameters", "active", "tok/s", "bits per byte, held out"]
    return Part(
        record=done.record(),
        curves={"training loss, nats a token, over steps": losses},
        tables=[("beside gzip", columns, rows)],
        samples=show(done, folder),
    )


def pretrain_demo(out: Path, seconds: float, depth: int = DEPTH) -> Pretrained:
    """Corpus, tokenizer, store, two models; everything below `out`.

    Raises what the parts raise, KeyboardInterrupt if a signal stopped the training.
    """
    from ..models.tokenizer_training import save_tokenizer, train_tokenizer
    from ..train.data.prepare import PrepareConfig, prepare

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
    experts = trained(out, "experts", expert_overrides(SHARE * seconds, depth))
    dense = trained(out, "dense", dense_overrides(experts.steps, out / "experts", depth))
    return Pretrained(experts=experts, dense=dense, gzip_bits_per_byte=gzip_bits(store, tokenizer))


def trained(out: Path, name: str, words: Sequence[str]) -> Run:
    """One training in `out`/`name`. Raises KeyboardInterrupt if a signal stopped it."""
    from ..models.config import ModelConfig
    from ..train import presets, pretrain

    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    config = pretrain.load(None, [*overrides(out, folder), *words])
    result = pretrain.main(config)
    if result.status != "finished" or result.checkpoint is None:
        raise KeyboardInterrupt
    model = ModelConfig.from_directory(result.checkpoint)
    lines = read_lines(folder / "metrics.jsonl")
    return Run(
        model=result.checkpoint,
        parameters=presets.parameters(model)[0],
        active=presets.active_parameters(model) + model.vocab_size * model.hidden_size,
        steps=result.step,
        bits_per_byte=result.metrics["bits_per_byte"],
        tokens_per_second=rate(lines),
        lines=lines,
    )


def overrides(out: Path, run: Path) -> list[str]:
    """What both runs share, as `fastllm pretrain` takes it; presets give the rest."""
    return [
        f"--store={out / 'store'}",
        f"--tokenizer={out / 'tokenizer'}",
        f"--out={run}",
        "--optim.name=muon",
        "--data.eval_rows=0",
        "--loop.eval_every=1000000",
        "--loop.save_every=1000000",
        "--loop.metrics.every=20",
    ]


def expert_overrides(seconds: float, depth: int) -> list[str]:
    """A mixture of experts, trained for so long."""
    return [
        "--preset=moe",
        f"--depth={depth}",
        f"--model.experts={EXPERTS}",
        f"--seconds={seconds}",
    ]


def dense_overrides(steps: int, experts: Path, depth: int) -> list[str]:
    """The same without experts: width, heads, batches, rate and steps of the run in `experts`."""
    from ..train.pretrain import load

    other = load(experts / "config.yaml")
    return [
        "--model.family=qwen3",
        f"--depth={depth}",
        f"--steps={steps}",
        f"--tokens={other.data.tokens}",
        f"--data.batch_tokens={other.data.batch_tokens}",
        f"--data.micro_rows={other.data.micro_rows}",
        f"--lr={other.optim.lr}",
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


def show(done: Pretrained, out: Path) -> list[tuple[str, str]]:
    """Print numbers, curve, chart and samples; returns the samples."""
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams

    for title, run in (("experts", done.experts), ("dense", done.dense)):
        better = "below" if run.bits_per_byte < done.gzip_bits_per_byte else "NOT below"
        facts(
            [
                (title, f"{run.parameters / 1e6:.2f}M parameters, {run.active / 1e6:.2f}M active"),
                ("loss", sparkline([r["loss"] for r in run.lines if "loss" in r])),
                ("trained", f"{max(r.get('tokens', 0) for r in run.lines):,} tokens, "
                            f"{run.tokens_per_second:,.0f} tok/s"),
                ("held-out files", f"{run.bits_per_byte:.3f} bits per byte, {better} gzip -9: "
                                   f"{done.gzip_bits_per_byte:.3f}"),
                ("report", str((out / title / "report.html").resolve())),
            ]
        )  # fmt: skip
        print()
    facts([("busiest expert", f"{done.expert_load:.2f} of the mean, in the worst layer"),
           ("chart", _chart(done, out / "experts-and-dense.png"))])  # fmt: skip
    llm = LLM(done.experts.model)
    params = SamplingParams(max_tokens=48, temperature=0.7, top_p=0.95, seed=1)
    outputs = llm.generate(list(_PROMPTS), params)
    samples = [(p, o.outputs[0].text) for p, o in zip(_PROMPTS, outputs, strict=True)]
    for prompt, text in samples:
        print(f"\n{prompt}{text}")
    return samples


def _chart(done: Pretrained, path: Path) -> str:
    """Where the chart is, or why there is none."""
    if find_spec("matplotlib") is None:
        return "needs matplotlib (pip install matplotlib)"
    from .demo_chart import draw_comparison

    runs = {"experts": done.experts, "dense": done.dense}
    bits = {name: run.bits_per_byte for name, run in runs.items()}
    draw_comparison(
        path,
        {name: run.lines for name, run in runs.items()},
        {name: run.tokens_per_second for name, run in runs.items()},
        {**bits, "gzip -9": done.gzip_bits_per_byte},
    )
    return str(path.resolve())


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

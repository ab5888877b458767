"""The demo's chart of two pretrainings: losses, speeds, and how evenly the experts were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"experts": "#1f6feb", "dense": "#8c959f"}


def draw_comparison(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], rates: Mapping[str, float],
    bits: Mapping[str, float],
) -> Path:  # fmt: skip
    """Write a picture of four panels.

    runs: lines of metrics of "experts" and "dense". rates: tokens a second of each. bits: bits per
    byte on held-out files of each, and of gzip.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    _losses(panels[0, 0], runs)
    _bars(panels[0, 1], bits, "bits per byte of held-out files; lower is better", "{:.3f}")
    _bars(panels[1, 1], rates, "tokens a second of training", "{:,.0f}")
    _loads(panels[1, 0], runs["experts"])
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _losses(axes: Any, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for name, records in runs.items():
        points = [(r["tokens"] / 1e6, r["loss"]) for r in records if "loss" in r]
        axes.plot(*zip(*points, strict=True), label=name, color=_COLOURS[name], linewidth=1.4)
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", title="training loss")
    axes.grid(alpha=0.25)
    axes.legend()


def _bars(axes: Any, values: Mapping[str, float], title: str, format: str) -> None:
    names = list(values)
    colours = [_COLOURS.get(name, "#d0d7de") for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colours, height=0.6)
    axes.bar_label(bars, [format.format(values[name]) for name in names], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(values.values()))
    axes.set_title(title)


def _loads(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    found = [r for r in records if "experts" in r]
    steps = [r["step"] for r in found]
    for number, layer in enumerate(found[0]["experts"]["layer"] if found else []):
        axes.plot(steps, [r["experts"]["load"][number] for r in found], label=f"layer {layer}")
    axes.axhline(1.0, color="#57606a", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="over the mean", title="load of a layer's busiest expert")
    axes.grid(alpha=0.25)
    axes.legend()

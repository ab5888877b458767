"""A run on one page: curves as `loss.png`, everything in `report.html`, which needs no network."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllm.train.config import flat
from fastllm.train.report_balance import draw_balance, last_loads, load_curves, load_table

PNG, PAGE = "loss.png", "report.html"

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 56, 28
_COLOURS = ("#1f6feb", "#d1580b", "#1a7f37")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em;
       color: #1f2328; background: #fff }
table { border-collapse: collapse; font-size: 13px }
td { padding: 2px 12px 2px 0; vertical-align: top }
td:first-child { color: #59636e } pre { white-space: pre-wrap; background: #f6f8fa; padding: 8px }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: #59636e }
"""


def write_report(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Write both files into `out`; without matplotlib the page alone, and say so."""
    curves = {
        "loss": [("training", series(records, "loss")), ("held out", series(records, "eval_loss"))],
        "reward": [
            ("samples", series(records, "reward")),
            ("held out, greedy", series(records, "eval_reward")),
        ],
        "held-out pairs in the right order": [("", series(records, "eval_order"))],
        "KL to the reference": [("", series(records, "kl"))],
        "KL to the reference, of a completion": [("", series(records, "objective/kl"))],
        "squared error of the critic": [("", series(records, "val/error"))],
        "entropy of a token": [("", series(records, "entropy"))],
        "tokens of a completion": [("", series(records, "completions/mean_length"))],
        "bits per byte": [("held out", series(records, "bits_per_byte"))],
        "tokens per second": [("", series(records, "tokens_per_second"))],
        "load of the busiest expert, over the mean": load_curves(records),
        "balancing loss, 1 where loads are even": [("", series(records, "aux_loss"))],
        "router z loss": [("", series(records, "z_loss"))],
    }
    (out / PAGE).write_text(page(out.name, records, settings, curves), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        say(f"{PNG} needs matplotlib: pip install 'fastllm-engine[train]' ({PAGE} has the curves)")
        return
    draw(out / PNG, out.name, curves["loss"], records)


def series(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    """(step, value) of every record that has `name`."""
    return [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]


def draw(
    path: Path, title: str, lines: Sequence[tuple[str, Points]],
    records: Sequence[Mapping[str, Any]] = (),
) -> None:  # fmt: skip
    """The loss curve as a picture; below it the experts' loads, where the records have them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    experts = any("experts" in record for record in records)
    figure = Figure(figsize=(8, 10.5 if experts else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *more = figure.subplots(3 if experts else 1, squeeze=False)[:, 0]
    if experts:
        draw_balance(more, records)
    for (label, points), colour in zip(lines, _COLOURS, strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.4)
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.25)
    if any(points for _, points in lines):
        axes.legend()
    figure.savefig(path, dpi=120)


def page(
    title: str,
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    curves: Mapping[str, Sequence[tuple[str, Points]]],
) -> str:
    """The page's HTML: last numbers, curves, samples, settings."""
    name = html.escape(title)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>",
        f"<style>{_STYLE}</style><h1>{name}</h1>",
        table(last_values(records)),
    ]
    for heading, lines in curves.items():
        if any(len(points) > 1 for _, points in lines):
            parts.append(f"<h2>{heading}</h2>{svg(lines)}")
    layers, loads = last_loads(records)
    if loads:
        parts.append(f"<h2>load of every expert, at the end</h2>{load_table(layers, loads)}")
    bins: Sequence[Mapping[str, Any]] = next(
        (r["reliability"] for r in reversed(records) if "reliability" in r), []
    )
    if bins:
        found = {f"said {b['confidence']:.0%}": f"right {b['accuracy']:.0%} of {b['pairs']} pairs"
                 for b in bins}  # fmt: skip
        parts.append(f"<h2>reliability on held-out pairs</h2>{table(found)}")
    samples = [r for r in records if r.get("samples")]
    if samples:
        parts.append(f"<h2>samples of step {samples[-1]['step']}</h2>")
        for prompt, text in samples[-1]["samples"]:
            parts.append(f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>")
    parts.append(f"<h2>settings</h2>{table(flat(settings))}</html>")
    return "\n".join(parts)


def last_values(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The newest value of everything that was measured."""
    newest: dict[str, str] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float):
                newest[name.replace("_", " ")] = f"{value:,.6g}"
    return newest


def table(values: Mapping[str, Any]) -> str:
    """Two columns."""
    rows = (f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"


def svg(lines: Sequence[tuple[str, Points]]) -> str:
    """Curves over the step, as a drawing."""
    every = [point for _, points in lines for point in points]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    across, up = (right - left) or 1.0, (high - low) or 1.0

    def place(point: tuple[float, float]) -> str:
        x = _LEFT + (point[0] - left) / across * (_WIDTH - _LEFT - 8)
        y = (_HEIGHT - _BOTTOM) - (point[1] - low) / up * (_HEIGHT - _BOTTOM - 16)
        return f"{x:.1f},{y:.1f}"

    base = _HEIGHT - _BOTTOM
    drawn = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img>',
        f'<path d="M{_LEFT} 8V{base}H{_WIDTH - 8}" fill=none stroke="#d1d9e0"/>',
        f"<text x=4 y=20>{high:.4g}</text><text x=4 y={base}>{low:.4g}</text>",
        f"<text x={_LEFT} y={_HEIGHT - 8}>step {left:g}</text>",
        f"<text x={_WIDTH - 8} y={_HEIGHT - 8} text-anchor=end>{right:g}</text>",
    ]
    for number, (label, points) in enumerate(lines):
        colour = _COLOURS[number]
        path = " ".join(map(place, points))
        drawn.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=1.6 />')
        if label and points:
            y = 20 + 16 * number
            drawn.append(
                f'<text x={_WIDTH - 12} y={y} text-anchor=end style="fill:{colour}">{label}</text>'
            )
    return "".join(drawn) + "</svg>"

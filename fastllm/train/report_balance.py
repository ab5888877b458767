"""The experts' loads in a run's report: over steps, and of every expert at the end."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

Points = list[tuple[float, float]]

_SIDE, _LEFT, _TOP = 640, 56, 8
_HIGHEST = 2.0  # the load that has the full colour


def load_curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Points]]:
    """(label, (step, most over mean)) of the worst layer and of the mean over layers."""
    found = [r for r in records if "experts" in r]
    worst = [(r["step"], r["expert_load"]) for r in found]
    mean = [(r["step"], sum(r["experts"]["load"]) / len(r["experts"]["load"])) for r in found]
    return [("worst layer", worst), ("mean of layers", mean)]


def last_loads(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[list[float]]]:
    """(layer numbers, load of each expert of each layer) of the newest line that has them."""
    for record in reversed(records):
        experts = record.get("experts", {})
        if "loads" in experts:
            return experts["layer"], experts["loads"]
    return [], []


def load_table(layers: Sequence[int], loads: Sequence[Sequence[float]]) -> str:
    """A drawing with a row for each layer and a column for each expert: pale is idle, 1 is even."""
    count = max(len(row) for row in loads)
    wide = (_SIDE - _LEFT - 8) / count
    high = min(max(wide, 6.0), 22.0)
    height = _TOP + high * len(loads) + 22
    parts = [f'<svg viewBox="0 0 {_SIDE} {height:.0f}" role=img>']
    for number, (layer, row) in enumerate(zip(layers, loads, strict=True)):
        y = _TOP + number * high
        parts.append(f"<text x=4 y={y + high / 2 + 4:.1f}>layer {layer}</text>")
        for expert, load in enumerate(row):
            title = html.escape(f"layer {layer}, expert {expert}: {load:.2f} of the mean")
            parts.append(
                f"<rect x={_LEFT + expert * wide:.2f} y={y:.2f} width={wide:.2f} "
                f'height={high:.2f} fill="{colour(load)}"><title>{title}</title></rect>'
            )
    parts.append(f"<text x={_LEFT} y={height - 6:.0f}>expert 0</text>")
    parts.append(f"<text x={_SIDE - 8} y={height - 6:.0f} text-anchor=end>{count - 1}</text>")
    return "".join(parts) + "</svg>"


def colour(load: float) -> str:
    """White for 0, blue for 1, dark for twice the mean and more."""
    share = min(max(load, 0.0), _HIGHEST) / _HIGHEST
    light, dark = ((255, 255, 255), (31, 111, 235)), ((31, 111, 235), (9, 32, 70))
    low, high = light if share < 0.5 else dark
    part = 2 * share if share < 0.5 else 2 * share - 1
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def draw_balance(panels: Sequence[Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Fill two of matplotlib's axes: most over mean over the steps, and the last loads."""
    curve, picture = panels
    for label, points in load_curves(records):
        if points:
            curve.plot(*zip(*points, strict=True), label=label, linewidth=1.4)
    curve.axhline(1.0, color="#57606a", linewidth=0.8, linestyle="--")
    curve.set(xlabel="step", ylabel="busiest expert, over the mean")
    curve.grid(alpha=0.25)
    curve.legend()
    layers, loads = last_loads(records)
    if not loads:
        picture.set_axis_off()
        return
    shown = picture.imshow(
        loads, aspect="auto", cmap="Blues", vmin=0.0, vmax=_HIGHEST, interpolation="nearest"
    )
    picture.set(xlabel="expert", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
    picture.figure.colorbar(shown, ax=picture, label="load, over the mean")

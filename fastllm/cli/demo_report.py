"""The demo's report: every stage on one HTML page, which needs no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .demo_stage import Outcome, Part

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em;
       color: #1f2328; background: #fff }
h2 { margin-top: 2em; border-bottom: 1px solid #d1d9e0 } h3 { font-size: 14px; color: #59636e }
table { border-collapse: collapse; font-size: 13px; margin: 0.6em 0 }
td, th { padding: 2px 14px 2px 0; vertical-align: top; text-align: left }
td:first-child { color: #59636e } nav a { margin-right: 1em }
pre { white-space: pre-wrap; background: #f6f8fa; padding: 8px; font-size: 13px }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: #59636e }
.failed { color: #d1242f; font-weight: 600 } .legend { font-size: 13px; color: #59636e }
"""


def write_report(path: Path, outcomes: Sequence[Outcome], machine: Mapping[str, str]) -> Path:
    """Write the page. machine: facts about it, by name."""
    total = sum(outcome.seconds for outcome in outcomes)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>fastllm demo</title>",
        f"<style>{_STYLE}</style><h1>fastllm demo</h1>",
        f"<p>The life of a language model, in {total / 60:.1f} minutes on this machine.",
        _pairs(list(machine.items())),
        "<nav>", *(f"<a href=#{o.stage.name}>{o.stage.name}</a>" for o in outcomes), "</nav>",
        *(_section(outcome) for outcome in outcomes),
        "</html>",
    ]  # fmt: skip
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _section(outcome: Outcome) -> str:
    part = outcome.part
    parts = [
        f"<h2 id={outcome.stage.name}>{html.escape(outcome.stage.title)}</h2>",
        f"<p class=legend>{outcome.seconds:.0f} seconds",
    ]
    if part.problem is not None:
        parts.append(f"<p class=failed>failed: {html.escape(part.problem)}")
    if part.facts:
        parts.append(_pairs(part.facts))
    parts += _curves(part)
    for title, columns, rows in part.tables:
        parts.append(f"<h3>{html.escape(title)}</h3>{_table(columns, rows)}")
    for title, text in part.samples:
        parts.append(f"<pre><b>{html.escape(title)}</b>\n{html.escape(text)}</pre>")
    return "\n".join(parts)


def _curves(part: Part) -> list[str]:
    from ..train.report import svg

    drawn = []
    for title, lines in part.curves.items():
        kept = [(label, points) for label, points in lines if points]
        if any(len(points) > 1 for _, points in kept):
            drawn.append(f"<h3>{html.escape(title)}</h3>{svg(kept)}")
    return drawn


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    return _table((), [(name, str(value)) for name, value in pairs])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows
    )
    return f"<table>{f'<tr>{head}' if head else ''}{body}</table>"

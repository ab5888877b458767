"""Put measured tables into the READMEs.

Usage: python tools/readme_table.py FILE.json
       python tools/readme_table.py TABLE.md NAME

FILE.json holds rows of `fastllm bench ... --json FILE`, which replace the text between the lines
`<!-- measured:begin -->` and `<!-- measured:end -->` of README.md and README.zh.md. TABLE.md is
what `fastllm eval perplexity --formats ... --markdown` printed: its table goes between the marks of
NAME (formats-smollm2, formats-pretrained). No number gets into them by hand.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ("measured", "formats-smollm2", "formats-pretrained")
WORDS = {
    "README.md": ("case", "activation", "fastllm", "of the bound"),
    "README.zh.md": ("项目", "激活", "fastllm", "占上限"),
}
# What fits a README, a table each: the suites, and how the cases begin that are shown. The file
# holds every row.
TABLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("decode", "prefill", "load"), ("",)),
    (("train",), ("10M full", "50M full", "135M full", "135M lora")),
    (("dropin",), ("",)),
    (("rollout", "rl"), ("",)),
    (("moe",), ("forward", "layer", "decode fine", "q4_0")),
    (("quant",), ("q4_0 8B", "q4_k", "q6_k", "q8_0", "int4_g128", "int8", "nf4 8B", "fp8 8B")),
)
HIDDEN = ("memory", "count", "Zipf")  # words of cases that are not shown


def shown(
    rows: list[dict[str, Any]], suites: tuple[str, ...], beginnings: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The rows of one table."""
    return [
        row
        for row in rows
        if row["suite"] in suites
        and row["case"].startswith(beginnings)
        and not any(word in row["case"] for word in HIDDEN)
    ]


def markdown(rows: list[dict[str, Any]], words: tuple[str, ...]) -> str:
    """A table of rows: value, each peer with our ratio, percent of the bound."""
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    bounded = any(row["percent_of_bound"] for row in rows)
    lines = [
        "| " + " | ".join([*words[:3], *peers, *words[3:][:bounded]]) + " |",
        "|" + "---|" * (3 + bounded + len(peers)),
    ]
    for row in rows:
        cells = [f"{row['suite']}: {row['case']}", row["dtype"], f"**{row['value']:g}** "]
        cells[-1] += row["unit"]
        for name in peers:
            known = name in row["peers"]
            cells.append(f"{row['peers'][name]:g} ({row['ratio'][name]:g}x)" if known else "")
        share = row["percent_of_bound"]
        cells += [f"{share:.0f}%" if share else ""] if bounded else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace(text: str, table: str, name: str = "measured") -> str:
    """`text` with `table` between the two marks. Raises ValueError if a mark is missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{begin} and {end} must both be in the file")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def table_of(page: str) -> str:
    """The lines of the Markdown table of a page. Raises ValueError if there is none."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError("the file holds no Markdown table: it must be what --markdown printed")
    return "\n".join(lines)


def main() -> None:
    """Rewrite both READMEs."""
    source = Path(sys.argv[1])
    if len(sys.argv) == 3:
        table = table_of(source.read_text(encoding="utf-8"))
        for path in (ROOT / name for name in WORDS):
            text = replace(path.read_text(encoding="utf-8"), table, sys.argv[2])
            path.write_text(text, encoding="utf-8")
        return
    rows = json.loads(source.read_text(encoding="utf-8"))
    date = datetime.date.fromtimestamp(source.stat().st_mtime).isoformat()
    for name, words in WORDS.items():
        path = ROOT / name
        parts = []
        for suites, beginnings in TABLES:
            part = shown(rows, suites, beginnings)
            used = " ".join(dict.fromkeys(row["suite"] for row in part))
            commits = ", ".join(dict.fromkeys(row["commit"] for row in part))
            caption = f"{part[0]['device']}, {date}, commit {commits}" if part else ""
            parts += [markdown(part, words), f"`fastllm bench {used}`: {caption}"] if part else []
        text = replace(path.read_text(encoding="utf-8"), "\n\n".join(parts))
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

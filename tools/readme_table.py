"""Put measured tables into the READMEs.

Usage: python tools/readme_table.py FILE.json

FILE holds rows of `fastllm bench ... --json FILE`. The text between the lines
`<!-- measured:begin -->` and `<!-- measured:end -->` of README.md and README.zh.md is replaced: no
number gets into them by hand.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
WORDS = {
    "README.md": ("case", "activation", "fastllm", "of the bound"),
    "README.zh.md": ("项目", "激活", "fastllm", "占上限"),
}
# What fits a README, a table each: the suites, and how the cases begin that are shown. The file
# holds every row.
TABLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("decode", "prefill", "load"), ("",)),
    (("train",), ("10M full", "50M full", "135M full", "135M lora")),
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


def replace(text: str, table: str) -> str:
    """`text` with `table` between the two marks. Raises ValueError if a mark is missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{BEGIN} and {END} must both be in the file")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Rewrite both READMEs."""
    source = Path(sys.argv[1])
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

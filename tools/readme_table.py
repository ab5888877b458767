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
SUITES = ("decode", "prefill", "load")  # what fits a README; the file holds every row


def markdown(rows: list[dict[str, Any]], words: tuple[str, ...]) -> str:
    """One table of the end-to-end suites: value, each peer with our ratio, percent of the bound."""
    rows = [row for row in rows if row["suite"] in SUITES]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [
        "| " + " | ".join([*words[:3], *peers, words[3]]) + " |",
        "|" + "---|" * (len(words) + len(peers)),
    ]
    for row in rows:
        cells = [f"{row['suite']}: {row['case']}", row["dtype"], f"**{row['value']:g}** "]
        cells[-1] += row["unit"]
        for name in peers:
            known = name in row["peers"]
            cells.append(f"{row['peers'][name]:g} ({row['ratio'][name]:g}x)" if known else "")
        share = row["percent_of_bound"]
        lines.append("| " + " | ".join([*cells, f"{share:.0f}%" if share else ""]) + " |")
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
    used = dict.fromkeys(row["suite"] for row in rows if row["suite"] in SUITES)
    command = f"fastllm bench {' '.join(used)}"
    date = datetime.date.fromtimestamp(source.stat().st_mtime).isoformat()
    for name, words in WORDS.items():
        path = ROOT / name
        table = markdown(rows, words)
        caption = f"`{command}`: {rows[0]['device']}, {date}, commit {rows[0]['commit']}"
        text = replace(path.read_text(encoding="utf-8"), f"{table}\n\n{caption}")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

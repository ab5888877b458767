"""Run every GPU test and GPU benchmark, and write bench/results/<gpu>.json after each suite.

Usage: python -P tools/gpu.py [--again]

A suite whose result for the current commit is in the file is not run again, so an interrupted run
goes on where it stopped; --again starts over. The exit status is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from fastllm.cli.bench import find_suites
from fastllm.testing import machine

ROOT = Path(__file__).parent.parent
MODEL = "random-1b"  # made on the machine, which may have no network
COUNTS = ("tests", "failures", "errors", "skipped")


def main() -> int:
    """Run what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="run every suite anew")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 2
    path = ROOT / "bench" / "results" / f"{gpu_name()}.json"
    results = {} if options.again else load(path, machine.commit(ROOT))
    results |= {
        "commit": machine.commit(ROOT),
        "gpu": torch.cuda.get_device_name(),
        "versions": machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    tests, rows = results.setdefault("tests", {}), results.setdefault("bench", {})
    for folder in sorted({p.parent for p in (ROOT / "tests").rglob("test_*.py")}):
        suite = str(folder.relative_to(ROOT))
        if suite not in tests:
            tests[suite] = run_tests(folder)
            save(path, results)
        print(f"{suite}: {tests[suite]}", flush=True)
    for suite in find_suites():
        if suite not in rows:
            rows[suite] = run_bench(suite)
            save(path, results)
        print(f"bench {suite}: {len(rows[suite])} rows", flush=True)
    print(f"results: {path}")
    ran = sum(outcome["tests"] for outcome in tests.values())
    bad = sum(outcome["failures"] + outcome["errors"] for outcome in tests.values())
    print(f"{ran} GPU tests, {bad} failed")
    return 1 if bad or not ran else 0


def gpu_name() -> str:
    """The file name of this GPU's results."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def load(path: Path, commit: str) -> dict[str, Any]:
    """Earlier results of the same commit, or nothing."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if results["commit"] == commit else {}


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace the result file at once, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def run_tests(folder: Path) -> dict[str, float]:
    """GPU tests of one folder, its subfolders left to themselves: counts and seconds."""
    files = [str(path) for path in sorted(folder.glob("test_*.py"))]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", *files]
        code = subprocess.run([*command, f"--junit-xml={report}"], cwd=ROOT).returncode
        if code not in (0, 1, 5):  # 5: the folder has no GPU test
            return {**dict.fromkeys(COUNTS, 0), "errors": 1, "seconds": 0.0}
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, "0")) for name in COUNTS}
    return {**counts, "seconds": round(time.perf_counter() - start, 1)}


def run_bench(suite: str) -> list[dict[str, Any]]:
    """Rows of one suite on the GPU, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        program = "import sys; from fastllm.cli.main import main; sys.exit(main(sys.argv[1:]))"
        options = ["--quick", "--device", "cuda", "--model", MODEL, "--json", str(out)]
        command = [sys.executable, "-P", "-c", program, "bench", suite, *options]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            return [{"suite": suite, "error": "the suite stopped with an error"}]
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    sys.exit(main())

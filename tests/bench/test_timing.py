"""Timing and rows: who alternates with whom, which way a ratio points, what a bound is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastllm.cli.bench import find_suites, measure, show, write_rows
from fastllm.cli.demo_speed import draw
from fastllm.testing import suite, timing
from fastllm.testing.suite import OURS, BenchCase, Row, Settings, Work, run_case

COLUMNS = (
    "suite case device dtype unit value peers ratio bound percent_of_bound commit".split()
)  # fmt: skip


def _case(work: Work) -> BenchCase:
    return BenchCase(
        suite="s", label="c", dtype="bf16", seconds=0.0, min_rounds=3, make=lambda: work
    )


def test_functions_alternate_and_every_other_round_runs_backwards() -> None:
    calls: list[str] = []

    def function(name: str) -> float:
        calls.append(name)
        return 1.0

    samples = timing.alternate(
        {"a": lambda: function("a"), "b": lambda: function("b")},
        seconds=0.0,
        min_rounds=4,
        own_clock=True,
    )
    assert calls == list("abbaabba")
    assert len(samples["a"].values) == 4


def test_samples_show_median_and_best() -> None:
    samples = timing.Samples((3.0, 1.0, 2.0))
    assert (samples.median, samples.best) == (2.0, 1.0)


def test_rotation_covers_the_asked_bytes_before_it_repeats() -> None:
    counter = iter(range(1000))
    copies: Iterator[int] = timing.rotation(lambda: next(counter), nbytes=10, total=95)
    assert [next(copies) for _ in range(12)] == [*range(10), 0, 1]


def test_a_faster_fastllm_has_a_ratio_above_one_in_times_and_in_rates() -> None:
    functions = {OURS: lambda: 0.5, "peer": lambda: 1.0}
    for unit, values in (("ms", (500.0, 1000.0)), ("tok/s", (200.0, 100.0))):
        work = Work(functions=functions, unit=unit, amount=100.0, own_clock=True)
        row = run_case(_case(work), work, "abc")
        assert (row.value, row.peers["peer"]) == values
        assert row.ratio == {"peer": 2.0}


def test_memory_is_in_megabytes_and_less_is_better() -> None:
    functions = {OURS: lambda: 130e6, "file": lambda: 100e6}
    work = Work(functions=functions, unit="MB", own_clock=True)
    row = run_case(_case(work), work, "abc")
    assert (row.value, row.ratio["file"]) == (130.0, pytest.approx(0.769))


def test_percent_of_bound_never_rewards_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = timing.ReadProbe(4, lambda: None)
    monkeypatch.setattr(suite, "read_probe", lambda device: probe)
    monkeypatch.setattr(suite, "timed", lambda read, device: lambda: 1.0)
    for unit in ("ms", "tok/s"):
        work = Work(functions={OURS: lambda: 0.5}, unit=unit, own_clock=True, nbytes=1.0)
        row = run_case(_case(work), work, "abc")
        assert row.percent_of_bound == 50.0


def test_beside_a_reader_ours_and_the_peer_still_end_rounds_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def function(name: str) -> float:
        calls.append(name)
        return 1.0

    probe = timing.ReadProbe(4, lambda: None)
    monkeypatch.setattr(suite, "read_probe", lambda device: probe)
    monkeypatch.setattr(suite, "timed", lambda read, device: lambda: function("read"))
    functions = {OURS: lambda: function("ours"), "peer": lambda: function("peer")}
    work = Work(functions=functions, own_clock=True, nbytes=1.0)
    row = run_case(_case(work), work, "abc")
    assert row.peers.keys() == {"peer"}
    assert calls[:6] == ["ours", "read", "peer", "peer", "read", "ours"]


def test_a_reader_of_memory_takes_about_the_time_of_its_bound() -> None:
    torch.set_num_threads(1)  # of two, one waits for a core on a busy machine
    probe = timing.read_probe()
    work = Work(functions={OURS: probe.read}, unit="us", nbytes=probe.nbytes)
    row = run_case(_case(work), work, "abc")
    assert row.peers == {}
    assert row.percent_of_bound is not None and 50 < row.percent_of_bound < 200


def test_rows_have_exactly_the_agreed_fields(tmp_path: Path) -> None:
    row = Row(suite="s", case="c", device="d", dtype="t", unit="us", value=1.0)
    write_rows(tmp_path / "new" / "rows.json", [row])
    (written,) = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert list(written) == COLUMNS == [field.name for field in fields(Row)]


def test_only_cases_that_hold_the_text_run() -> None:
    work = Work(functions={OURS: lambda: 0.5}, unit="ms", own_clock=True)
    small = ModuleType("bench_small")
    small.SUITE, small.TITLE = "small", "a suite"  # type: ignore[attr-defined]
    labels = ("step 1", "step 2", "decode 1")
    small.cases = lambda _: [replace(_case(work), label=n) for n in labels]  # type: ignore[attr-defined]
    for text, wanted in (("step", ["step 1", "step 2"]), ("", list(labels)), ("none", [])):
        rows: list[Row] = []
        measure(small, Settings(), rows.append, text)
        assert [row.case for row in rows] == wanted


def test_losing_rows_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show([Row(suite="s", case="c", device="d", dtype="t", unit="us", value=2.0,
              peers={"torch": 1.0}, ratio={"torch": 0.5})])  # fmt: skip
    assert "0.5x" in capsys.readouterr().out


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    row = Row(suite="decode", case="c", device="d", dtype="t", unit="tok/s", value=2.0,
              peers={"llama.cpp": 1.0}, ratio={"llama.cpp": 2.0}, bound=3.0)  # fmt: skip
    path = draw([row], tmp_path / "demo.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_machine_probes_are_plausible() -> None:
    probe = timing.read_probe()
    seconds = timing.alternate({"read": probe.read}, seconds=0.1)["read"].best
    assert 1e9 < probe.nbytes / seconds < 1e12
    assert 1e9 < timing.matmul_peak("f32") < 1e14


@pytest.mark.parametrize(
    "name", ["decode", "head", "linear", "load", "moe", "ops", "prefill", "train"]
)
def test_suites_list_cases_and_quick_is_a_part(name: str) -> None:
    module = find_suites()[name]
    model = "smollm2"
    assert module.SECONDS > 0 and module.TITLE
    quick = [str(case) for case in module.cases(Settings(quick=True, model=model))]
    every = [str(case) for case in module.cases(Settings(model=model))]
    assert quick and set(quick) <= set(every) and len(set(every)) == len(every)


def test_an_op_s_case_runs_against_its_peer() -> None:
    cases = find_suites()["ops"].cases(Settings(quick=True))
    case = next(case for case in cases if case.label.startswith("rms_norm"))
    row = run_case(case, case.make(), "abc")
    assert row.value > 0 and row.peers and row.device

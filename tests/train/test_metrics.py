from __future__ import annotations

import json
import re
import resource
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastllm.train.metrics import Metrics, MetricsConfig, clock, drop_after, read
from fastllm.train.report import write_report

RECORD = {
    "step": 1, "loss": 2.5, "lr": 1e-3, "norm": 1.25, "tokens": 128,
    "tokens_per_second": 1234.5, "mfu": 0.321, "seconds": 1.0,
}  # fmt: skip


def recorded(out: Path, **config: object) -> Metrics:
    metrics = Metrics(out, MetricsConfig(**config), {"loop": {"steps": 5}})  # type: ignore[arg-type]
    metrics.open(step=0)
    return metrics


def test_lines_are_json_and_people_read_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = recorded(tmp_path, progress="plain")
    metrics.training(RECORD, steps=5, remaining=125)
    metrics.evaluation(1, {"eval_loss": 2.25, "bits_per_byte": 1.5})
    metrics.samples(1, [("a", 'b\n"é')])
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [
        RECORD,
        {"step": 1, "eval_loss": 2.25, "bits_per_byte": 1.5},
        {"step": 1, "samples": [["a", 'b\n"é']]},
    ]
    said = capsys.readouterr().err
    assert "step 1/5  loss 2.5000  lr 1.00e-03  norm 1.25  1,234 tok/s  MFU 32.1%  ETA 2:05" in said
    assert "step 1: eval loss 2.2500, bits per byte 1.5000" in said
    assert (tmp_path / "config.yaml").read_text().endswith("loop:\n  steps: 5\n")


def test_a_terminal_gets_a_bar_and_nothing_is_drawn_when_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("rich", "none"):
        metrics = recorded(tmp_path / kind, progress=kind)
        metrics.training(RECORD, steps=5, remaining=0)
        metrics.say("[brackets] stay")
        metrics.close()
        said = capsys.readouterr().err
        assert ("loss 2.5000" in said and "[brackets] stay" in said) == (kind == "rich")


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    file.write_text("\n".join([*lines, '{"step": 4, "lo']))
    assert [r["step"] for r in read(file)] == [1, 2, 3]
    drop_after(file, 2)
    assert file.read_text() == lines[0] + "\n" + lines[1] + "\n"
    file.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read(file)


def test_a_number_that_json_has_not_is_not_written(tmp_path: Path) -> None:
    metrics = recorded(tmp_path, progress="none")
    with pytest.raises(ValueError, match="JSON"):
        metrics.training({**RECORD, "loss": float("nan")}, steps=5, remaining=0)
    metrics.close()


def test_a_full_disk_costs_lines_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond is an error then
    metrics = recorded(tmp_path, progress="plain")
    try:
        metrics.evaluation(1, {"eval_loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
        metrics.evaluation(2, {"eval_loss": 1.0})
        metrics.evaluation(3, {"eval_loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.evaluation(4, {"eval_loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        metrics.close()
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 4]
    assert capsys.readouterr().err.count("cannot be written") == 1


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"metrics.{name} needs {name}: pip install"):
        recorded(tmp_path, **{name: True})


def test_tensorboard_receives_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = recorded(tmp_path, progress="none", tensorboard=True)
    metrics.training(RECORD, steps=5, remaining=0)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (1, 2.5)


class Page(HTMLParser):
    """Collects tags and whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href")]


def test_the_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    records = [{**RECORD, "step": k, "loss": 3 - k / 10} for k in range(1, 9)]
    records += [{"step": k, "eval_loss": 3.0, "bits_per_byte": 1.5 + k / 100} for k in (4, 8)]
    samples = [*records, {"step": 8, "samples": [["<b>", "x & y</pre>"]]}]
    said: list[str] = []
    write_report(tmp_path, samples, {"optim": {"lr": 0.1}}, said.append)
    page = Page()
    text = (tmp_path / "report.html").read_text()
    page.feed(text)
    assert page.tags.count("svg") == 3 and page.tags.count("polyline") >= 3 and not page.fetched
    assert "&lt;b&gt;" in text and "x &amp; y&lt;/pre&gt;" in text and "optim.lr" in text
    points = re.findall(r'points="([^"]+)"', text)[0].split()
    x, y = ([float(p.split(",")[i]) for p in points] for i in (0, 1))
    assert len(points) == 8 and x == sorted(x) and y == sorted(y)  # the loss falls, y points down
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not said


def test_a_run_without_numbers_still_has_a_page(tmp_path: Path) -> None:
    write_report(tmp_path, [], {}, print)
    assert (tmp_path / "report.html").exists()


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3599, 3661, -1)] == [
        "0:00", "1:00", "59:59", "1:01:01", "0:00",
    ]  # fmt: skip

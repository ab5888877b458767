from __future__ import annotations

import math

import pytest

from fastllm.train.schedule import ScheduleConfig, factor


def factors(steps: int, **values: object) -> list[float]:
    config = ScheduleConfig(**values)  # type: ignore[arg-type]
    return [factor(config, step, steps) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_full_rate() -> None:
    assert factors(10, kind="constant", warmup=4) == [0.25, 0.5, 0.75, 1, *[1] * 6]


def test_cosine_falls_from_the_full_rate_to_the_final_one() -> None:
    got = factors(12, kind="cosine", warmup=2, final=0.2)
    wanted = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 10)) for k in range(1, 11)]
    assert got[2:] == pytest.approx(wanted)
    assert got[-1] == pytest.approx(0.2) and sorted(got[1:], reverse=True) == got[1:]


@pytest.mark.parametrize(
    ("shape", "tail"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0]),
        ("sqrt", [1 - math.sqrt(k / 4) for k in (1, 2, 3, 4)]),
    ],
)
def test_wsd_is_stable_and_then_decays(shape: str, tail: list[float]) -> None:
    got = factors(20, kind="wsd", warmup=2, decay=0.2, final=0.0, shape=shape)
    assert got[:2] == [0.5, 1.0] and got[2:16] == [1.0] * 14
    assert got[16:] == pytest.approx(tail)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_short_runs_and_steps_beyond_the_end_stay_in_range(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup=5, decay=1.0)  # type: ignore[arg-type]
    for steps in (1, 2, 5, 6):
        assert all(0 < factor(config, step, steps) <= 1 for step in range(steps + 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "line"}, "kind must be"),
        ({"shape": "cube"}, "shape must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"final": 1.5}, "final must be from 0 to 1"),
        ({"decay": -0.1}, "decay must be from 0 to 1"),
    ],
)
def test_what_is_no_schedule_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**values)  # type: ignore[arg-type]

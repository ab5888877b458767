"""SamplingParams refuse what makes no sense, naming the field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from fastllm import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 10**6),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e39),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 1e38),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("seed", 2**63),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 1000),
        ("stop", ["x"] * 17),
        ("stop", ["a", ""]),
        ("stop", "x" * 10_000),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(100))),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    word = "stop string" if field == "stop" and len(value) != 17 else field
    with pytest.raises(ValueError, match=word):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1.0),
        ("n", True),
        ("max_tokens", "16"),
        ("temperature", "hot"),
        ("top_p", None),
        ("seed", 1.5),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", 1),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
    ],
)
def test_wrong_types_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="n must be 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0)


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_parameters_are_frozen_and_normalized() -> None:
    params = SamplingParams(stop="a", stop_token_ids=[3])
    assert params.stop == ("a",) and params.stop_token_ids == (3,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert dataclasses.replace(params, n=3).stop == ("a",)

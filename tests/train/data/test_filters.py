"""Each rule drops what it is for, and ordinary text of any script and source code pass."""

# ruff: noqa: RUF001 (texts of other scripts)
from __future__ import annotations

import base64
import inspect

import pytest

from fastllm.train.data import dedup
from fastllm.train.data.filters import Filters

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "short"),
        (" \n\t ", "short"),
        ("Chapter", "short"),
        (PROSE + "\x07\x08\ufffd", "garbled"),
        ("+-----+=====+-----+\n" * 3 + "name", "symbols"),
        (base64.b64encode(bytes(range(256)) * 4).decode(), "long words"),
        (("Click here to subscribe.\n" * 20) + PROSE, "repeated lines"),
        ("buy " * 60 + PROSE, "repeated words"),
    ],
)
def test_rules_drop_what_they_are_for(text: str, reason: str) -> None:
    assert Filters().reason(text) == reason


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
        "国境の長いトンネルを抜けると雪国であった。夜の底が白くなった。",
        "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
        inspect.getsource(dedup),
        "| a | b |\n|---|---|\n| one | two |\nand a sentence that says something.",
    ],
)
def test_ordinary_text_passes(text: str) -> None:
    assert Filters().reason(text) is None


@pytest.mark.parametrize("limit", [{"max_symbols": 1.5}, {"min_chars": -1}])
def test_limits_that_cannot_be_meant_are_named(limit: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(limit))):
        Filters(**limit)

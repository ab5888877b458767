"""MinHash against the similarity that it estimates; digests against what they ignore."""

# ruff: noqa: RUF001 (texts of other scripts)
from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest

from fastllm.train.data.dedup import _WORD, digest, near_duplicates, signatures


def words(count: int, seed: int) -> list[str]:
    return [f"w{n}" for n in random.Random(seed).choices(range(50_000), k=count)]


def jaccard(left: str, right: str) -> float:
    a, b = ({tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))}
            for w in (_WORD.findall(text.lower()) for text in (left, right)))  # fmt: skip
    return len(a & b) / len(a | b)


def changed(base: list[str], count: int) -> str:
    text = list(base)
    for place in random.Random(count).sample(range(len(base)), count):
        text[place] = f"x{place}"
    return " ".join(text)


@pytest.mark.parametrize("count", [0, 2, 5, 20, 60, 300])
def test_signatures_estimate_jaccard_similarity(count: int) -> None:
    base = words(600, 1)
    texts = [" ".join(base), changed(base, count)]
    similarity = jaccard(*texts)
    left, right = signatures(texts)
    # Four standard deviations of the estimate.
    assert (
        abs((left == right).mean() - similarity) <= 4 * (similarity * (1 - similarity) / 125) ** 0.5
    )


def test_near_duplicates_are_the_later_ones_of_similar_texts() -> None:
    bases = [words(300, seed) for seed in range(20)]
    texts = [" ".join(base) for base in bases]
    close = [changed(base, 2) for base in bases]
    far = [changed(base, 60) for base in bases]
    assert min(map(jaccard, texts, close)) > 0.93 and max(map(jaccard, texts, far)) < 0.5
    found = near_duplicates(signatures([*texts, *far, *close]), 0.8)
    assert found.tolist() == [False] * 40 + [True] * 20


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["one two three", "One, two: THREE!", "one two four"], [False, True, False]),
        (["春眠不觉晓，处处闻啼鸟。", "春眠不觉晓处处闻啼鸟", "夜来风雨声，花落知多少。"],
         [False, True, False]),
        (["...", "!!!", "..."], [False, False, True]),
        ([], []),
    ],
)  # fmt: skip
def test_short_texts_and_texts_without_words(texts: list[str], found: list[bool]) -> None:
    assert near_duplicates(signatures(texts), 0.8).tolist() == found


def test_signatures_do_not_depend_on_the_batch() -> None:
    texts = [" ".join(words(n, n)) for n in (1, 4, 5, 6, 50)] + ["", "é 字 x", "日本語のテキスト"]
    one_by_one = np.concatenate([signatures([text]) for text in texts])
    assert (signatures(texts) == one_by_one).all()


def test_chains_of_similar_texts_leave_the_first() -> None:
    base = words(400, 3)
    chain = [" ".join(base[10 * i : 300 + 10 * i]) for i in range(8)]
    assert jaccard(chain[0], chain[7]) < 0.65 < 0.9 < jaccard(chain[0], chain[1])
    assert near_duplicates(signatures(chain), 0.8).tolist() == [False] + [True] * 7


def test_digests_ignore_space_and_composition_only() -> None:
    assert digest(" a\n b\t") == digest("a b") != digest("ab")
    assert (
        digest("caf\u00e9") == digest(unicodedata.normalize("NFD", "caf\u00e9")) != digest("cafe")
    )
    assert digest("A") != digest("a")

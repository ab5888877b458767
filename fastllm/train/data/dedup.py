"""Duplicates: equal texts by a hash, similar ones by MinHash.

Two texts are equal when they differ in nothing but spaces and Unicode composition (NFC). They are
similar when they share most of their shingles, runs of five words (a Chinese character or a kana is
a word of its own): the share of hash functions whose minimum over the shingles agrees estimates the
Jaccard similarity J of the two sets, with standard deviation sqrt(J (1 - J) / 125), 0.036 at 0.8
(Broder, 1997). Comparing all pairs is avoided by bands: 25 groups of 5 functions; only texts that
agree on all of a group are compared. At J = 0.8 a pair is missed with probability 5e-5, at 0.7 with
0.9%.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .order import key, mix

BANDS, BAND_ROWS = 25, 5
FUNCTIONS = BANDS * BAND_ROWS
SHINGLE_WORDS = 5
DIGEST_BYTES = 16

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_COEFFICIENTS = mix(np.arange(2 * FUNCTIONS, dtype=np.uint64) ^ np.uint64(key(1)))
_FACTORS, _TERMS = _COEFFICIENTS[:FUNCTIONS] | np.uint64(1), _COEFFICIENTS[FUNCTIONS:]
_PLACES = mix(np.arange(SHINGLE_WORDS, dtype=np.uint64) ^ np.uint64(key(2))) | np.uint64(1)
_PAIRS = 1 << 16  # compared at once: 2 x 33 MB of signatures


def digest(text: str) -> bytes:
    """16 bytes that name a text up to spaces and Unicode composition."""
    plain = text if text.isascii() else unicodedata.normalize("NFC", text)
    joined = " ".join(plain.split()).encode()
    return hashlib.blake2b(joined, digest_size=DIGEST_BYTES).digest()


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """[texts, 125] uint32: of each hash function, its minimum over the text's shingles.

    A text without any word has the signature of its digest. About 8 MB/s of text.
    """
    if not texts:
        return np.empty((0, FUNCTIONS), np.uint32)
    shingles, first = _shingles(texts)
    result = np.empty((len(texts), FUNCTIONS), np.uint32)
    products = np.empty_like(shingles)
    for k in range(FUNCTIONS):
        # Multiply-shift: the high half of a x + b is a universal hash (Dietzfelbinger, 1996).
        np.multiply(shingles, _FACTORS[k], out=products)
        products += _TERMS[k]
        result[:, k] = np.minimum.reduceat(products, first) >> np.uint64(32)
    return result


def near_duplicates(
    signatures: NDArray[np.uint32], threshold: float, chosen: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """[texts] bool: True for a text whose estimated similarity to an earlier one is at least
    `threshold`, or that a chain of such pairs connects with an earlier one.

    signatures: [all texts, 125] uint32; may be a memory map, which is read 25 times in part and
    never held whole. chosen: rows of it to look at (default: all).
    """
    rows = np.arange(len(signatures)) if chosen is None else chosen
    parent = np.arange(len(rows))
    compared: set[int] = set()
    for band in range(BANDS):
        pairs = _candidates(signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS][rows])
        # A pair that agrees on many bands is compared once.
        names = pairs[:, 0] * len(rows) + pairs[:, 1]
        fresh = np.array([name not in compared for name in names.tolist()], bool)
        compared.update(names[fresh].tolist())
        for low in range(0, np.count_nonzero(fresh), _PAIRS):
            part = pairs[fresh][low : low + _PAIRS]
            agree = signatures[rows[part[:, 0]]] == signatures[rows[part[:, 1]]]
            for left, right in part[agree.mean(axis=1) >= threshold].tolist():
                _join(parent, left, right)
    roots = np.array([_root(parent, i) for i in range(len(parent))], np.int64)
    return roots != np.arange(len(parent))


def _shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all shingles, text after text, and where each text's begin."""
    lines = [" ".join(_WORD.findall(text.lower())) or digest(text).hex() for text in texts]
    data = np.frombuffer("\n".join(lines).encode(), np.uint8)
    breaks = np.flatnonzero((data == ord(" ")) | (data == ord("\n")))
    starts = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(data)]])
    words = _word_hashes(data, starts, ends)
    heads = np.concatenate([[0], np.flatnonzero(data[breaks] == ord("\n")) + 1])
    counts = np.diff(np.concatenate([heads, [len(words)]]))
    left = np.repeat(heads + counts, counts) - np.arange(len(words))  # words to the text's end
    sums = np.zeros_like(words)
    for place in range(SHINGLE_WORDS):
        n = len(words) - place
        if n > 0:
            sums[:n] += np.where(left[:n] > place, words[place:] * _PLACES[place], np.uint64(0))
    whole = left >= SHINGLE_WORDS
    whole[heads] = True  # a text of fewer words is one shingle
    first = np.concatenate([[0], np.cumsum(np.add.reduceat(whole, heads, dtype=np.int64))[:-1]])
    return mix(sums[whole]), first


def _word_hashes(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Polynomial hashes modulo 2^64 of stretches of bytes, from one pass of prefix sums."""
    powers = np.full(len(data) + 1, _BASE, np.uint64)
    inverses = np.full(len(data) + 1, _INVERSE, np.uint64)
    powers[0] = inverses[0] = 1
    np.cumprod(powers, out=powers)
    np.cumprod(inverses, out=inverses)
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(data * powers[:-1], out=prefix[1:])
    return mix((prefix[ends] - prefix[starts]) * inverses[starts])


def _candidates(band: NDArray[np.uint32]) -> NDArray[np.int64]:
    """[pairs, 2] int64: texts that agree on all of a band, the earlier first: each with the first
    of its group and with the one before it. All pairs of a group would be quadratic."""
    names = np.zeros(len(band), np.uint64)
    for column in band.T:
        names = mix(names ^ column)
    order = np.argsort(names, kind="stable")
    same = np.concatenate([[False], names[order][1:] == names[order][:-1]])
    here = np.flatnonzero(same)
    leader = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    with_first = np.stack([order[leader[here]], order[here]], axis=1)
    with_last = np.stack([order[here - 1], order[here]], axis=1)
    return np.concatenate([with_first, with_last[leader[here] != here - 1]])


def _root(parent: NDArray[np.int64], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i


def _join(parent: NDArray[np.int64], left: int, right: int) -> None:
    a, b = _root(parent, left), _root(parent, right)
    parent[max(a, b)] = min(a, b)

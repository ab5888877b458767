"""Models made on the spot load like real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm.errors import ModelNotFoundError
from fastllm.models.weights import open_weights
from fastllm.testing import random_model
from fastllm.testing.random_model import model_path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_model.model_config(layers=2, hidden=64, inner=96, heads=4, kv=2, vocab=64)
    monkeypatch.setitem(random_model.SIZES, "random-small", config)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "format"), [("random-small", "bf16"), ("random-small-q4_1", "q4_1")]
)
def test_a_random_model_opens_with_the_asked_shapes_and_format(
    small: None, name: str, format: str
) -> None:
    weights = open_weights(model_path(name))
    expected = random_model.SIZES["random-small"]
    assert weights.config.weight_shapes() == expected.weight_shapes()
    assert weights.config.rope == expected.rope
    assert weights.get("model.layers.1.mlp.down_proj.weight").format == format
    assert model_path(name) == weights.path  # made once


def test_other_names_resolve_as_anywhere(small: None) -> None:
    with pytest.raises(ModelNotFoundError):
        model_path("random-enormous")
    with pytest.raises(ModelNotFoundError):
        model_path("random-small-q9_9")

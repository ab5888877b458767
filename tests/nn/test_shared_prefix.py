"""Documents with one beginning, laid out once: the bits of documents that have it each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm.models.decoder import Decoder
from fastllm.nn.batch import Documents, Group
from fastllm.nn.rows import take_rows
from fastllm.testing.small_models import CONFIGS, SPARSE, VOCAB, model_of

LENGTHS = [(70, (33, 1, 0, 12)), (1, (5, 5)), (9, (20,)), (64, (0, 0))]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def groups() -> list[Group]:
    found: list[Group] = []
    for i, (prefix, suffixes) in enumerate(LENGTHS):
        ends = [draw(n, seed=100 * i + j).tolist() for j, n in enumerate(suffixes)]
        found.append((draw(prefix, seed=i).tolist(), ends))
    return found


def apart() -> tuple[Documents, Tensor]:
    """Every document with its own copy of the beginning, and the rows that `pack_shared` names."""
    whole, rows, start = [], [], 0
    for prefix, suffixes in groups():
        for suffix in suffixes:
            whole.append([*prefix, *suffix])
            rows += range(start + len(prefix) - 1, start + len(whole[-1]))
            start += len(whole[-1])
    return Documents.pack(whole), torch.tensor(rows)


def both(model: Decoder) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Log-probabilities and gradients, without and with sharing."""
    shared, rows = Documents.pack_shared(groups())
    together = torch.cat(rows)
    targets, weights = draw(len(together), seed=7), torch.linspace(-1, 1, len(together))
    found = []
    for documents, places in (apart(), (shared, together)):
        model.zero_grad()
        logp, entropy = model.log_probs(documents, targets, rows=places, temperature=0.8)
        (logp * weights + 0.1 * entropy).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logp.detach(), gradients))
    return found


@pytest.mark.parametrize("case", [*CONFIGS, *SPARSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_log_probs_have_the_bits_of_whole_documents(case: str, dtype: torch.dtype) -> None:
    (one, gradients), (other, shared) = both(model_of(case, dtype))
    assert torch.equal(one, other)
    for name, gradient in gradients.items():
        limit = (2e-5 if dtype == torch.float32 else 2e-2) * gradient.abs().max().clamp(min=1e-6)
        assert (shared[name] - gradient).abs().max() <= limit, name


def test_sharing_saves_the_repeated_rows() -> None:
    shared, rows = Documents.pack_shared(groups())
    assert len(shared.ids) == sum(prefix + sum(ends) for prefix, ends in LENGTHS)
    assert [len(r) for r in rows] == [n + 1 for _, ends in LENGTHS for n in ends]
    assert shared.max_seqlen == 103
    alone, (only,) = Documents.pack_shared([([1, 2], [[3]])])
    assert alone.seen is None and alone.keys(alone.ids) is alone.ids
    assert only.tolist() == [1, 2]


def test_what_is_no_group_is_refused() -> None:
    for wrong in ([], [([], [[1]])], [([1], [])]):
        with pytest.raises(ValueError, match="group"):
            Documents.pack_shared(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_row_s_uses_are_added_before_they_are_rounded(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_(True)
    rows = torch.tensor([4, 1, 1, 0, 1, 1, 1, 1])
    dy = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    taken = take_rows(x, rows)
    assert torch.equal(taken, x[rows])
    taken.backward(dy)
    wanted = torch.zeros(5, 2, 8, dtype=torch.float64).index_add_(0, rows, dy.double())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted.to(dtype), rtol=1e-6, atol=1e-6)

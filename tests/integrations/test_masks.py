"""Masks: a description hides what transformers' booleans hide, and gives them to who wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor
from transformers import DynamicCache, StaticCache, masking_utils

from fastllm.integrations.transformers import registry
from fastllm.integrations.transformers.attention import attention_forward
from fastllm.integrations.transformers.lazy_mask import LazyMask
from fastllm.integrations.transformers.masks import make_mask

WINDOW = 5


@pytest.fixture(autouse=True)
def registered() -> None:
    registry.register()


def padding(lengths: tuple[int, ...], width: int, left: bool = True) -> Tensor:
    place = torch.arange(width)[None].expand(len(lengths), width)
    lengths_ = torch.tensor(lengths)[:, None]
    return place >= width - lengths_ if left else place < lengths_


def both(**arguments: Any) -> tuple[Tensor | None, Tensor]:
    """Our mask, and transformers' booleans without its own shortcuts."""
    return make_mask(**arguments), masking_utils.sdpa_mask(
        **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


def booleans(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:  # causal from key 0; one query sees all
        queries, keys = like.shape[-2:]
        seen = torch.ones(queries, keys, dtype=torch.bool)
        return (seen if queries == 1 else seen.tril()).expand_as(like)
    return (mask.dense() if isinstance(mask, LazyMask) else mask).expand_as(like)


FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(WINDOW), WINDOW),
    "near": (masking_utils.sliding_window_bidirectional_mask_function(WINDOW), WINDOW),
    "full": (masking_utils.bidirectional_mask_function, None),
}
# queries, keys, position of query 0, position of key 0
SHAPES = [(9, 9, 0, 0), (4, 9, 5, 0), (1, 9, 8, 0), (4, 12, 0, 0), (4, 12, 3, 0), (3, 7, 14, 10),
          (1, 5, 14, 10), (1, 12, 4, 0), (9, 9, 0, 0)]  # fmt: skip


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("padded", ["no", "left", "right"])
def test_a_mask_hides_what_transformers_booleans_hide(kind: str, padded: str) -> None:
    function, local = FUNCTIONS[kind]
    lazy = 0
    for queries, keys, q_offset, kv_offset in SHAPES:
        width = q_offset + queries
        mask = None if padded == "no" else padding((width - 2, width), width, padded == "left")
        ours, theirs = both(
            batch_size=2, q_length=queries, kv_length=keys, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=function, attention_mask=mask, local_size=local,
            allow_is_bidirectional_skip=kind in ("near", "full"),
        )  # fmt: skip
        lazy += isinstance(ours, LazyMask)
        if kind == "full" and ours is None:
            assert theirs.all()
        else:
            assert torch.equal(booleans(ours, theirs), theirs), (queries, keys, q_offset, ours)
    assert lazy or (kind, padded) == ("full", "no")


def packing(inner: Any, position: Tensor, remapped: bool) -> Any:
    """The mask function of packed documents, as transformers makes it since 5.23 or before."""
    same = masking_utils.find_packed_sequence_indices(position)
    if remapped:
        return masking_utils.packed_sequence_compatibility_function(inner, position, same)
    return masking_utils.and_masks(inner, masking_utils.packed_sequence_mask_function(same))


FORMS = [False, *[True] * hasattr(masking_utils, "packed_sequence_compatibility_function")]


@pytest.mark.parametrize("remapped", FORMS)
def test_packed_documents_become_their_starts(remapped: bool) -> None:
    position = torch.stack([torch.tensor([0, 1, 2, 0, 1, 0]), torch.arange(6)])
    for inner, local in (FUNCTIONS["causal"], FUNCTIONS["window"]):
        function = packing(inner, position, remapped)
        ours, theirs = both(
            batch_size=2, q_length=6, kv_length=6, mask_function=function, local_size=local
        )
        assert isinstance(ours, LazyMask) and ours.kind == "documents"
        assert ours.held.tolist() == [0, 3, 5, 6, 12]
        assert torch.equal(ours.dense(), theirs)


def test_mask_functions_of_users_and_blocks_get_transformers_own_booleans() -> None:
    def odd(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key % 2 == 0

    causal = masking_utils.causal_mask_function
    blocks = masking_utils.blockwise_overlay(torch.tensor([[0, 0, 1, 1, -1, -1]]))
    chunk = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))
    for function, vmap in (
        (masking_utils.or_masks(causal, odd), True), (masking_utils.and_masks(causal, odd), True),
        (masking_utils.and_masks(causal, odd), False), (odd, False), (chunk, False),
        (masking_utils.or_masks(causal, blocks), False),
    ):  # fmt: skip
        ours, theirs = both(
            batch_size=1, q_length=6, kv_length=6, mask_function=function, use_vmap=vmap,
            allow_is_causal_skip=False,
        )  # fmt: skip
        assert type(ours) is Tensor and torch.equal(ours, theirs)


def test_whoever_operates_on_a_mask_gets_booleans() -> None:
    mask = make_mask(2, 6, 6, attention_mask=padding((3, 6), 6))
    assert isinstance(mask, LazyMask) and mask.shape == (2, 1, 6, 6) and mask.dtype is torch.bool
    dense = mask.dense()
    part = mask[:, :, :, :4]
    assert type(part) is Tensor and torch.equal(part, dense[..., :4])
    assert torch.equal(~mask, ~dense) and int(mask.sum()) == int(dense.sum())
    assert type(mask.to(torch.float32)) is Tensor
    assert isinstance(mask.detach(), LazyMask) and "kind='keys'" in repr(mask)


@pytest.mark.parametrize("detached", [False, True])  # as checkpointing hands it on
def test_what_somebody_writes_into_a_mask_holds(detached: bool) -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": 9, "kv_length": 9}
    mask, booleans = both(**arguments, attention_mask=padding((9, 6), 9))
    assert isinstance(mask, LazyMask)
    mask = mask.detach() if detached else mask
    for one in (mask, booleans):
        one[:, :, 4:, 2] = False
    again = mask.detach() if detached else mask
    q, k, v = torch.randn(3, 2, 2, 9, 16)
    found, _ = attention_forward(torch.nn.Module(), q, k, v, again)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, booleans).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


def test_nothing_quadratic_is_made_for_padding_windows_caches_and_documents() -> None:
    config = tiny_config("mistral", sliding_window=WINDOW)
    config._attn_implementation = "fastllm"
    embeds = torch.zeros(2, 7, 8)
    cases = {
        "padding": {"attention_mask": padding((4, 7), 7), "past_key_values": None},
        "documents": {
            "attention_mask": None, "past_key_values": None,
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        },
    }  # fmt: skip
    for make in (
        masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask
    ):  # fmt: skip
        for arguments in cases.values():
            mask = make(config, embeds, **arguments)
            assert isinstance(mask, LazyMask) and mask.held.numel() <= 14
    for cache in (DynamicCache(), StaticCache(tiny_config("llama"), max_cache_len=32)):
        key = torch.zeros(2, 2, 6, 16)
        for layer in range(2):
            cache.update(key, key, layer)
        mask = masking_utils.create_causal_mask(config, embeds, None, cache)
        assert isinstance(mask, LazyMask) and (mask.offset, mask.held.numel()) == (6, 0)


def test_the_first_token_of_a_static_cache_does_not_see_its_empty_places() -> None:
    ours, theirs = both(batch_size=1, q_length=1, kv_length=9)
    assert isinstance(ours, LazyMask) and torch.equal(ours.dense(), theirs)
    assert ours.dense() is ours.dense() and int(theirs.sum()) == 1


def test_a_full_padding_mask_and_a_wide_window_hide_nothing() -> None:
    assert make_mask(2, 6, 6, attention_mask=padding((6, 6), 6)) is None
    function = masking_utils.sliding_window_causal_mask_function(6)
    assert make_mask(2, 6, 6, mask_function=function, local_size=6) is None
    assert make_mask(1, 1, 9, q_offset=8, attention_mask=padding((9,), 9)) is None


def test_a_traced_mask_is_described_too() -> None:
    def packed(position: Tensor, x: Tensor) -> Tensor:
        function = packing(
            masking_utils.sliding_window_causal_mask_function(3), position, FORMS[-1]
        )
        mask = make_mask(2, 6, 6, mask_function=function, local_size=3, allow_is_causal_skip=False)
        assert isinstance(mask, LazyMask)
        return x + mask.held[3] + mask.dense().sum()

    def padded(mask_2d: Tensor, x: Tensor) -> Tensor:
        mask = make_mask(2, 6, 6, attention_mask=mask_2d)
        assert isinstance(mask, LazyMask)
        return x + mask.held.sum() + mask[..., :3].sum()

    position = torch.stack([torch.tensor([0, 1, 2, 0, 1, 0]), torch.arange(6)])
    for function, argument in ((packed, position), (padded, padding((2, 6), 6))):
        x = torch.zeros(())
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert compiled(argument, x) == function(argument, x)

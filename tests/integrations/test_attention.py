"""Attention of transformers' models on our op: equal to unpatched, whatever is hidden, and how."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, inputs, tiny
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)

import fastllm
from fastllm import ops
from fastllm.integrations.transformers import attention, registry
from fastllm.integrations.transformers.attention import attention_forward

TIGHT = 1e-5  # of the largest value, in float32: sums in another order
SOME = ["llama", "mistral", "gemma2", "gpt_oss"]  # plain, window, soft cap and window, sinks


class Calls:
    """Counts what was served by our op and what was handed to transformers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = self.theirs = 0
        op, theirs = ops.attention, attention._theirs

        def count_op(*args: Any, **kwargs: Any) -> Any:
            self.ours += 1
            return op(*args, **kwargs)

        def count_theirs(*args: Any) -> Any:
            self.theirs += 1
            return theirs(*args)

        monkeypatch.setattr(attention.ops, "attention", count_op)
        monkeypatch.setattr(attention, "_theirs", count_theirs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(attention, "_faster_there", lambda *_: False)
    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def default_names_restored() -> Iterator[None]:
    yield
    fastllm.unpatch()


def pair(family: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The family's model as transformers runs it, and the same weights with our attention."""
    return tiny(family, **changes), tiny(family, attn_implementation="fastllm", **changes)


def error(found: Tensor, wanted: Tensor) -> float:
    assert not found.isnan().any()
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def gradient_error(found: nn.Module, wanted: nn.Module) -> float:
    pairs = list(zip(found.parameters(), wanted.parameters(), strict=True))
    assert any(p.grad is not None for p, _ in pairs)
    largest = max(float(q.grad.abs().max()) for _, q in pairs if q.grad is not None)
    return max(
        float((p.grad - q.grad).abs().max()) / max(float(q.grad.abs().max()), 1e-3 * largest)
        for p, q in pairs
        if q.grad is not None and p.grad is not None
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_gradients_and_generation_equal_unpatched(family: str, calls: Calls) -> None:
    plain, ours = pair(family)
    for side in ("right", "left"):
        batch = inputs(padding=side)
        valid = batch["attention_mask"].bool()
        # The label of a sequence's first token is asked of the padding before it, whose attention
        # sees nothing: 0 in sdpa and here, an average of everything in eager attention.
        first = (batch["labels"] >= 0).int().argmax(1)
        batch["labels"][torch.arange(len(first)), first] = -100
        wanted, found = plain(**batch), ours(**batch)
        assert error(found.logits[valid], wanted.logits[valid]) < TIGHT
        wanted.loss.backward()
        found.loss.backward()
        assert gradient_error(ours, plain) < 2 * TIGHT
        plain.zero_grad()
        ours.zero_grad()
    asked = {"attention_mask": batch["attention_mask"], "max_new_tokens": 6, "do_sample": False}
    for how in ({}, {"cache_implementation": "static"}):
        wanted, found = (m.generate(batch["input_ids"], **asked, **how) for m in (plain, ours))
        assert torch.equal(found, wanted), how
    assert calls.ours > 0 and calls.theirs == 0


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_unpatched(family: str) -> None:
    batch = inputs(padding="right")
    valid = batch["attention_mask"].bool()
    exact = tiny(family)(**batch).logits[valid].detach()
    plain, ours = (m(**batch).logits[valid].float() for m in pair(family, dtype=torch.bfloat16))
    ulp = 2.0**-8 * float(exact.abs().max())
    assert float((ours - exact).abs().max()) <= max(2 * float((plain - exact).abs().max()), ulp)


@pytest.mark.parametrize("family", SOME)
def test_packed_documents_and_prompts_in_pieces_equal_unpatched(family: str, calls: Calls) -> None:
    plain, ours = pair(family)
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    position = torch.stack([
        torch.cat([torch.arange(10), torch.arange(14)]),
        torch.cat([torch.arange(20), torch.arange(4)]),
    ])  # fmt: skip
    found, wanted = (
        m(input_ids=ids, position_ids=position, use_cache=False).logits for m in (ours, plain)
    )
    assert error(found, wanted) < TIGHT
    pieces = (slice(0, 11), slice(11, 20), slice(20, 21), slice(21, 24))
    for make in (DynamicCache, lambda config: StaticCache(config, max_cache_len=32)):
        caches = [make(config=m.config) for m in (ours, plain)]
        for piece in pieces:
            found, wanted = (
                m(input_ids=ids[:, piece], past_key_values=cache).logits
                for m, cache in zip((ours, plain), caches, strict=True)
            )
            assert error(found, wanted) < TIGHT
    assert calls.theirs == 0


def test_sequence_starts_of_a_flattening_collator_are_kept_apart(calls: Calls) -> None:
    ours = tiny("llama", attn_implementation="fastllm")
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, 8, 20], dtype=torch.int32)
    position = torch.cat([torch.arange(8), torch.arange(12)])[None]
    found = ours(
        input_ids=ids, position_ids=position, cu_seq_lens_q=starts, cu_seq_lens_k=starts,
        max_length_q=12, max_length_k=12, use_cache=False,
    ).logits  # fmt: skip
    apart = [ours(input_ids=ids[:, a:b], use_cache=False).logits for a, b in ((0, 8), (8, 20))]
    assert error(found, torch.cat(apart, 1)) < TIGHT


def test_beams_assistants_and_chunked_prompts_generate_the_same_tokens(calls: Calls) -> None:
    plain, ours = pair("mistral")
    small = tiny("mistral", seed=1, attn_implementation="fastllm", num_hidden_layers=1)
    ids = inputs((20,))["input_ids"]
    asked = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = plain.generate(ids, **asked)
    for how in ({"assistant_model": small}, {"prefill_chunk_size": 7},
                {"prompt_lookup_num_tokens": 3}):  # fmt: skip
        assert torch.equal(ours.generate(ids, **asked, **how), wanted), how
    beams = [m.generate(ids, num_beams=3, **asked) for m in (plain, ours)]
    assert torch.equal(*beams) and calls.theirs == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_continuous_batching_runs_on_ours_by_default_names(family: str, calls: Calls) -> None:
    model = tiny(family)
    prompts = [list(range(5, 5 + length)) for length in (7, 12, 3, 30)]

    def generate() -> list[list[int]]:
        results = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(
                max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
            progress_bar=False,
        )
        assert len(results) == len(prompts)
        return [r.generated_tokens for _, r in sorted(results.items())]

    wanted = generate()
    assert calls.ours == 0
    fastllm.patch(default=True)
    assert generate() == wanted
    assert calls.ours > 0 and calls.theirs == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, calls: Calls) -> None:
    _, ours = pair("mistral")
    again = tiny("mistral", attn_implementation="fastllm")
    enable = "activation_checkpointing_enable"  # its name since 5.23
    if not hasattr(again, enable):
        enable = "gradient_checkpointing_enable"
    getattr(again, enable)({"use_reentrant": reentrant})
    batch = inputs()
    for model in (ours.train(), again.train()):
        model(**batch, use_cache=False).loss.backward()
    assert gradient_error(again, ours) == 0 and calls.theirs == 0 and calls.ours == 6


def compiled_kernels(ours: nn.Module, plain: nn.Module, widths: tuple[int, ...]) -> str:
    """Names of what a compiled model calls, after checking its values with and without padding."""
    kernels: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        kernels.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    batch = inputs(padding="right")
    for width in widths:
        for mask in (None, batch["attention_mask"][:, :width]):
            arguments = {"input_ids": batch["input_ids"][:, :width], "attention_mask": mask}
            valid = torch.ones(2, width, dtype=torch.bool) if mask is None else mask.bool()
            found, wanted = (m(**arguments, use_cache=False).logits for m in (compiled, plain))
            assert error(found[valid], wanted[valid]) < TIGHT
    torch._dynamo.reset()
    return " ".join(kernels)


def test_a_compiled_model_traces_whole_and_holds_our_op_alone() -> None:
    small = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    names = compiled_kernels(*reversed(pair("gemma2", **small)), widths=(24,))
    assert "fastllm.attention" in names and "scaled_dot_product" not in names


@pytest.mark.full
@pytest.mark.parametrize("family", SOME)
def test_compiled_models_of_changing_lengths_hold_our_op_alone(family: str) -> None:
    names = compiled_kernels(*reversed(pair(family)), widths=(24, 13, 9))
    assert "fastllm.attention" in names and "scaled_dot_product" not in names


@pytest.mark.full
def test_a_model_compiled_by_inductor_trains_and_generates_as_before() -> None:
    plain, ours = pair("mistral")
    compiled = torch.compile(ours, fullgraph=True)
    batch = inputs(padding="right")
    for model in (compiled, plain):
        model(**batch, use_cache=False).loss.backward()
    assert gradient_error(ours, plain) < 2 * TIGHT
    ids = batch["input_ids"][:1]
    asked = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    wanted = plain.generate(ids, **asked)
    ours.forward = torch.compile(ours.forward)
    assert torch.equal(ours.generate(ids, **asked), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", SOME)
def test_masks_and_options_of_users_get_what_transformers_would_have_run(
    family: str, calls: Calls
) -> None:
    plain, ours = pair(family)
    batch = inputs((24, 24))
    ids = batch["input_ids"]
    odd = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    odd[:, :, 10:, 3] = False
    floats = torch.where(odd, 0.0, torch.finfo(torch.float32).min)
    # a dense mask reaches attention as the user made it: sdpa takes booleans, eager takes floats
    eager = plain.config._attn_implementation == "eager"
    found = [ours(input_ids=ids, attention_mask=m).logits for m in (odd, floats)]
    wanted = plain(input_ids=ids, attention_mask=floats if eager else odd).logits
    assert all(error(f, wanted) < TIGHT for f in found)
    assert calls.ours == 0 and calls.theirs == 4
    for model in (plain.train(), ours.train()):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    torch.manual_seed(0)
    wanted = plain(**batch).logits
    torch.manual_seed(0)
    assert error(ours(**batch).logits, wanted) < TIGHT
    assert calls.ours == 0 and calls.theirs == 6


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, queries, keys = shape
    make = lambda h, n: torch.randn(batch, h, n, 16, generator=generator).to(dtype)  # noqa: E731
    return make(4, queries), make(2, keys), make(2, keys)


class Attention(nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("float64", {}),
        ("position_bias", {}),
        ("broadcast", {}),
        ("more queries than keys", {}),
        ("dropout", {"dropout": 1e-9}),
    ],
)
def test_what_the_op_does_not_do_is_handed_on(
    what: str, options: dict[str, Any], calls: Calls
) -> None:
    query, key, value = heads(2, 5, 5, dtype=torch.float64 if what == "float64" else torch.float32)
    if what == "position_bias":
        options = {"position_bias": torch.randn(1, 4, 5, 5)}
    if what == "more queries than keys":  # causal from key 0, which the op counts from the end
        key, value = key[:, :, :3], value[:, :, :3]
    if what == "broadcast":
        query = query[:1]
    found, weights = attention_forward(Attention(), query, key, value, None, **options)
    assert calls.theirs == 1 and calls.ours == 0 and weights is None
    assert found.dtype is query.dtype and found.shape[1:] == (5, 4, 16)


def test_autocast_computes_in_its_dtype_as_sdpa_does(calls: Calls) -> None:
    query, key, value = heads(2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention_forward(Attention(), query, key, value.bfloat16(), None)
    assert found.dtype is torch.bfloat16 and calls.ours == 1
    wanted, _ = attention_forward(Attention(), query, key, value, None)
    assert error(found.float(), wanted) < 0.02


def test_one_query_a_sequence_sees_the_keys_that_its_mask_shows(calls: Calls) -> None:
    query, key, value = heads(2, 1, 9)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :4] = False
    for given in (mask, mask[:1], None):
        found, _ = attention_forward(Attention(), query, key, value, given)
        wanted = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=given, enable_gqa=True
        )
        assert error(found, wanted.transpose(1, 2)) < TIGHT
    assert calls.ours == 3


def test_short_decoding_in_float32_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    for given in (heads(1, 1, 9), heads(1, 1, 9, dtype=torch.bfloat16), heads(1, 2, 9),
                  heads(8, 1, 2048)):  # fmt: skip
        found, _ = attention_forward(Attention(), *given, None)
        wanted, _ = registry.original("attention")(Attention(), *given, None, is_causal=False)
        assert given[0].shape[2] > 1 or error(found.float(), wanted.float()) < 0.01
    assert (calls.ours, calls.theirs) == (3, 0)


@pytest.mark.parametrize("family", SOME)
def test_attention_weights_come_from_eager_attention(family: str, calls: Calls) -> None:
    eager = tiny(family, attn_implementation="eager")
    ours = tiny(family, attn_implementation="fastllm")
    batch = inputs((20, 20))
    with torch.no_grad():
        wanted, found = (m(**batch, output_attentions=True) for m in (eager, ours))
    assert error(found.logits, wanted.logits) < TIGHT and calls.ours == 0
    assert len(found.attentions) == 2
    assert all(map(torch.equal, found.attentions, wanted.attentions))
    default = tiny("llama")
    fastllm.patch(default=True)
    assert not default(**batch, output_attentions=True).attentions  # as sdpa: none, and a warning


def test_soft_caps_without_an_eager_twin_are_refused_with_the_remedy() -> None:
    query, key, value = heads(1, 5, 5)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match='use attn_implementation="eager"'):
        attention_forward(Attention(), query, key, value, mask, softcap=2.0)

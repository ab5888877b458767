"""Multi-head latent attention against transformers' own, and its two forms against each other."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.models.config import ModelConfig
from fastllm.models.deepseek import mla_from_hf
from fastllm.models.mla_config import half_split_index
from fastllm.models.rope_scaling import rope_tables
from fastllm.nn.batch import Batch, Documents
from fastllm.nn.mla import MultiHeadLatentAttention
from fastllm.ops import head_linear, linear, new_mla_cache

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 40, "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
    "mscale_all_dim": 0.8, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("V3", {"q_lora_rank": 28}),
    "v3 yarn": ("V3", {"q_lora_rank": 28, "rope_parameters": YARN}),
    "v3 biases": ("V3", {"q_lora_rank": 28, "attention_bias": True}),
    "v3 half-split": ("V3", {"q_lora_rank": None, "rope_interleave": False}),
    "v2": ("V2", {"q_lora_rank": 28}),
    "v2-lite yarn": ("V2", {"q_lora_rank": None, "rope_parameters": YARN}),
}


class Pair:
    """transformers' attention in float64 and ours, of the same random weights."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        version, options = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"Deepseek{version}Config")(
            **SIZES | options, attn_implementation="eager"
        )
        self.theirs = getattr(transformers, f"Deepseek{version}Model")(config)
        attention = self.theirs.layers[0].self_attn
        with torch.no_grad():
            for parameter in attention.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0, parameter.shape[1] ** -0.5)
                parameter.copy_(parameter.to(dtype))
        self.weights = {
            f"model.layers.0.self_attn.{n}": p.detach().clone()
            for n, p in attention.named_parameters()
        }
        self.attention = attention.double()
        values = config.to_dict() | {"architectures": [f"Deepseek{version}ForCausalLM"]}
        self.config = ModelConfig.from_hf(values)
        self.ours = mla_from_hf(self.config, self.weights, 0, dtype=dtype)
        self.tables = rope_tables(self.config, 256)

    def exact(self, x: Tensor) -> Tensor:
        """Their output for one sequence x [T, hidden]."""
        tokens = x.shape[0]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mask = torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        places = self.theirs.rotary_emb(x.double()[None], torch.arange(tokens)[None])
        return self.attention(
            x.double()[None], position_embeddings=places, attention_mask=mask[None, None]
        )[0][0]


def int32(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def positions_of(ranges: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(a, b, dtype=torch.int32) for a, b in ranges])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, exact: Tensor, relative: float) -> None:
    error = (got.double() - exact.double()).abs().max().item()
    assert error <= relative * exact.abs().max().item(), f"error {error:.2e}"


def expanded(pair: Pair, xs: list[Tensor]) -> list[Tensor]:
    lengths = [len(x) for x in xs]
    places = positions_of([(0, n) for n in lengths])
    starts = int32([0, *accumulate(lengths)])
    documents = Documents(ids=torch.zeros_like(places), positions=places, cu_seqlens=starts)
    together = pair.ours.over_documents(torch.cat(xs), documents, pair.tables)
    return list(together.split(lengths))


class Paged:
    """Sequences that go through the compressed cache in steps."""

    def __init__(self, pair: Pair, xs: list[Tensor], seed: int = 0) -> None:
        self.pair, self.xs = pair, xs
        width = max(-(-len(x) // 64) for x in xs)
        g = torch.Generator().manual_seed(seed)
        pages = torch.randperm(len(xs) * width, generator=g)
        self.table = pages.view(len(xs), width).int()
        assert pair.config.mla is not None
        columns = pair.config.mla.cache_width
        self.cache = new_mla_cache(len(pages), 64, columns, xs[0].dtype)

    def step(self, ranges: list[tuple[int, int]], fresh: bool = False) -> list[Tensor]:
        """Outputs for tokens a..b of every sequence; (a, a) is a dead slot."""
        new = [b - a for a, b in ranges]
        batch = Batch(
            ids=torch.empty(0, dtype=torch.int32),
            positions=positions_of(ranges),
            cu_seqlens_q=int32([0, *accumulate(new)]),
            cache_seqlens=int32(b if n else 0 for (_, b), n in zip(ranges, new, strict=True)),
            block_table=self.table,
            fresh=fresh,
        )
        x = torch.cat([x[a:b] for x, (a, b) in zip(self.xs, ranges, strict=True)])
        return list(self.pair.ours(x, batch, self.pair.tables, self.cache).split(new))


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_equal_transformers_attention(name: str) -> None:
    pair = Pair(name)
    xs = [randn(n, 48, seed=n) for n in (70, 1, 33)]
    exact = [pair.exact(x) for x in xs]
    for got, e in zip(expanded(pair, xs), exact, strict=True):
        assert_close(got, e, 2e-5)
    paged = Paged(pair, xs)
    prompts = paged.step([(0, 60), (0, 1), (0, 20)])
    chunk = paged.step([(60, 69), (1, 1), (20, 33)])
    token = paged.step([(69, 70), (1, 1), (33, 33)])
    assert_close(torch.cat((prompts[0], chunk[0], token[0])), exact[0], 2e-5)
    assert_close(prompts[1], exact[1], 2e-5)
    assert_close(torch.cat((prompts[2], chunk[2])), exact[2], 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_expanded_form_are_those_of_transformers_attention(name: str) -> None:
    pair = Pair(name)
    pair.ours.requires_grad_(True)
    xs = [randn(n, 48, seed=n) for n in (40, 9)]
    weights = [randn(n, 48, seed=n + 100) for n in (40, 9)]
    ours = [x.clone().requires_grad_() for x in xs]
    theirs = [x.double().requires_grad_() for x in xs]
    sum((o * w).sum() for o, w in zip(expanded(pair, ours), weights, strict=True)).backward()
    sum((pair.exact(x) * w).sum() for x, w in zip(theirs, weights, strict=True)).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.grad, b.grad, 5e-5)
    found = dict(pair.ours.named_parameters())
    assert set(found) == {n for n, _ in pair.attention.named_parameters()}
    for n, parameter in pair.attention.named_parameters():
        index = half_split_index(pair.config.mla, 3, f"model.layers.0.self_attn.{n}")
        exact = parameter.grad if index is None else parameter.grad[index]
        assert_close(found[n].grad, exact, 5e-5)


def test_the_forms_are_close_in_bfloat16() -> None:
    dtype = torch.bfloat16
    pair = Pair("v3 yarn", dtype)
    xs = [randn(130, 48, dtype=dtype), randn(64, 48, seed=1, dtype=dtype)]
    whole = [(0, 130), (0, 64)]
    forms = [expanded(pair, xs), Paged(pair, xs).step(whole)]
    for got in forms:
        for y, x in zip(got, xs, strict=True):
            assert_close(y, pair.exact(x), 3e-2)


def test_prompts_expand_when_they_are_asked_to_and_begin_here() -> None:
    pair = Pair("v3")
    xs = [randn(70, 48), randn(5, 48, seed=1)]
    whole = [(0, 70), (0, 5)]
    absorbed = Paged(pair, xs).step(whole, fresh=True)
    pair.ours.prefill = "expanded"
    paged = Paged(pair, xs)
    fresh = paged.step(whole, fresh=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh, expanded(pair, xs), strict=True))
    assert not torch.equal(fresh[0], absorbed[0])
    other = Paged(pair, xs)
    assert all(map(torch.equal, other.step(whole), absorbed))
    assert torch.equal(paged.cache, other.cache)  # what later steps read is the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_tokens_and_company_change_no_bit(dtype: torch.dtype) -> None:
    pair = Pair("v2-lite yarn", dtype)
    xs = [randn(n, 48, seed=n, dtype=dtype) for n in (97, 66)]
    for isa in _C.isas():
        _C.set_isa(isa)
        torch.set_num_threads(1)
        whole = Paged(pair, xs).step([(0, 97), (0, 66)])
        torch.set_num_threads(2)
        alone = Paged(pair, xs[:1], seed=3)
        parts = [alone.step([(a, b)])[0] for a, b in ((0, 50), (50, 95), (95, 96), (96, 97))]
        assert torch.equal(torch.cat(parts), whole[0])


def test_the_forms_hold_for_documents_of_no_tokens() -> None:
    pair = Pair("v3")
    empty = randn(0, 48)
    assert expanded(pair, [empty])[0].shape == (0, 48)
    paged = Paged(pair, [randn(3, 48)])
    assert paged.step([(0, 0)])[0].shape == (0, 48)
    assert not paged.cache.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_linear_has_the_bits_of_linear(dtype: torch.dtype) -> None:
    x, weight = randn(21, 3, 300, dtype=dtype), randn(3, 50, 300, seed=1, dtype=dtype)
    for isa in _C.isas():
        _C.set_isa(isa)
        rows = torch.stack([linear(x[:, h], weight[h]) for h in range(3)], dim=1)
        columns = weight.mT.contiguous().mT
        for tokens, threads in ((21, 2), (3, 1), (1, 2)):
            torch.set_num_threads(threads)
            for w in (weight, columns):
                assert torch.equal(head_linear(x[:tokens], w), rows[:tokens])


def test_bad_weights_and_layers_are_named() -> None:
    pair = Pair("v3")
    with pytest.raises(ValueError, match=r"layer must be from 0 to 0, got 1"):
        mla_from_hf(pair.config, pair.weights, 1)
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(KeyError, match=name):
        mla_from_hf(pair.config, {k: v for k, v in pair.weights.items() if k != name}, 0)
    with pytest.raises(ValueError, match=r"o_proj.weight has shape \[3, 3\]"):
        mla_from_hf(pair.config, pair.weights | {name: torch.ones(3, 3)}, 0)


def test_the_module_names_its_parameters_as_checkpoints_do() -> None:
    pair = Pair("v3 biases")
    assert isinstance(pair.ours, MultiHeadLatentAttention)
    state = {f"model.layers.0.self_attn.{name}" for name in pair.ours.state_dict()}
    assert state == set(pair.weights)


def test_the_expanded_form_compiles_whole_with_its_backward() -> None:
    pair = Pair("v3 yarn")
    pair.ours.requires_grad_(True)
    x, documents = randn(20, 48), Documents.pack([range(20)])
    compiled = torch.compile(pair.ours.over_documents, fullgraph=True, backend="aot_eager")
    results = []
    for run in (pair.ours.over_documents, compiled):
        inputs = x.clone().requires_grad_()
        y = run(inputs, documents, pair.tables)
        results.append(
            (y, *torch.autograd.grad(y.square().sum(), [inputs, *pair.ours.parameters()]))
        )
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)

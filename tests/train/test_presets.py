from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm.models.trainable import initialize
from fastllm.train import presets, pretrain
from fastllm.train.balance import BalanceConfig
from fastllm.train.presets import ShapeConfig


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 8, 12, 15, 16, 20, 24, 32])
def test_every_depth_gives_a_model_that_fits(depth: int) -> None:
    config = presets.model_config(
        ShapeConfig(depth=depth), vocab_size=1000, bos=0, eos=(0,), context=64
    )
    assert config.num_hidden_layers == depth
    assert config.hidden_size == config.num_attention_heads * config.head_dim
    assert config.head_dim in (64, 128)
    total, body = presets.parameters(config)
    assert 0.8 < body / (12 * depth * config.hidden_size**2) < 1.3  # the usual estimate
    assert total > body


def test_what_is_given_is_not_derived_and_what_follows_follows() -> None:
    full = presets.shape(ShapeConfig(depth=8, width=256, kv_heads=2))
    assert (full.layers, full.width, full.heads, full.kv_heads, full.inner, full.tied) == (
        8, 256, 4, 2, 704, True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="width 100 is not a multiple of head_dim 64"):
        presets.shape(ShapeConfig(width=100))
    with pytest.raises(ValueError, match="kv_heads must be at least 1"):
        ShapeConfig(kv_heads=0)


def test_the_budget_is_that_of_the_formulas() -> None:
    # By hand for 10M parameters: 200M tokens, C = 1.2e16.
    plan = presets.budget(10_000_000, 1024)
    assert plan.tokens == 200_000_000
    assert plan.lr == pytest.approx(0.3118 * 1.2e16**-0.125, rel=0.01) == 3.06e-3
    assert abs(plan.batch_tokens - 0.2920 * 1.2e16**0.3271) <= 512
    assert plan.batch_tokens % 1024 == 0
    assert plan.steps * plan.batch_tokens == pytest.approx(plan.tokens, rel=0.01)
    assert plan.warmup == pytest.approx(0.05 * plan.steps, abs=1)


def test_fewer_tokens_give_smaller_batches_and_higher_rates() -> None:
    long, short = presets.budget(10**7, 256), presets.budget(10**7, 256, tokens=2 * 10**6)
    assert short.batch_tokens < long.batch_tokens and short.lr > long.lr


@pytest.mark.parametrize("batch", [None, 8192])
def test_given_steps_are_kept(batch: int | None) -> None:
    plan = presets.budget(10**7, 256, steps=300, batch_tokens=batch)
    assert plan.steps == 300
    assert plan.tokens == pytest.approx(300 * plan.batch_tokens, rel=0.05)
    if batch:
        assert plan.batch_tokens == batch


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_counts_are_those_of_the_model(family: str) -> None:
    shape = ShapeConfig(depth=1, width=64, family=family)  # type: ignore[arg-type]
    config = presets.model_config(shape, vocab_size=100, bos=None, eos=(), context=32)
    model = initialize(config, dtype=torch.float32)
    total, body = presets.parameters(config)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - body == model.model.embed_tokens.weight.numel()
    assert presets.flops_per_token(config) == 6 * total


def test_what_help_says_comes_from_the_depth_is_derived(tiny: Any) -> None:
    config = pretrain.PretrainConfig(data=pretrain.DataConfig(store=str(tiny.store)))
    assert pretrain.derive(config, frozenset()).keys() >= pretrain.DERIVED


@pytest.mark.parametrize("preset", ["moe", "deepseek"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 8, 12, 16, 20, 24, 32])
def test_every_depth_gives_experts_of_a_dense_models_active_size(preset: Any, depth: int) -> None:
    dense, sparse = (
        presets.model_config(
            ShapeConfig(preset=kind, depth=depth), vocab_size=1000, bos=0, eos=(0,), context=64
        )
        for kind in ("dense", preset)
    )
    experts = sparse.experts
    assert experts is not None and experts.num_experts >= 8 * experts.per_token
    assert experts.moe_intermediate_size % 32 == 0
    assert experts.bias_correction == (preset == "deepseek")
    total, body = presets.parameters(sparse)
    active, plain = presets.active_parameters(sparse), presets.active_parameters(dense)
    assert plain == presets.parameters(dense)[1] < body < total
    slack = 0.12 if preset == "moe" else 0.45  # latent attention has other sizes
    assert abs(active / plain - 1) < slack
    assert presets.flops_per_token(sparse) == 6 * (active + 1000 * sparse.hidden_size)


def test_the_active_parameters_are_those_of_the_experts_that_a_token_takes() -> None:
    shape = ShapeConfig(
        preset="deepseek", depth=3, width=64, experts=8, experts_per_token=2, expert_inner=32,
        shared_experts=1, dense_layers=1,
    )  # fmt: skip
    config = presets.model_config(shape, vocab_size=100, bos=None, eos=(), context=32)
    model = initialize(config, dtype=torch.float32)
    total, body = presets.parameters(config)
    assert total == sum(p.numel() for p in model.parameters())
    idle = 2 * 6 * 3 * 64 * 32  # layers x experts that are not taken x their values
    assert presets.active_parameters(config) == body - idle


def test_what_balances_comes_from_the_preset_and_is_checked() -> None:
    def of(preset: Any, **given: float) -> BalanceConfig:
        return presets.balance(BalanceConfig(**given), ShapeConfig(preset=preset))

    assert of("dense") == BalanceConfig(aux_loss=0.0, z_loss=0.0, bias_update=0.0)
    assert of("moe") == BalanceConfig(aux_loss=0.01, z_loss=0.001, bias_update=0.0)
    assert of("deepseek", aux_loss=0.1) == BalanceConfig(
        aux_loss=0.1, z_loss=0.0, bias_update=0.001
    )
    with pytest.raises(ValueError, match=r"balance\.z_loss is for models with experts"):
        of("dense", z_loss=0.1)
    with pytest.raises(ValueError, match=r"balance\.bias_update needs a selection bias"):
        of("moe", bias_update=0.1)
    with pytest.raises(ValueError, match="family of preset moe must be qwen3_moe, got 'llama'"):
        ShapeConfig(preset="moe", family="llama")
    with pytest.raises(ValueError, match="shared_experts is not a size of preset moe"):
        ShapeConfig(preset="moe", shared_experts=1)
    with pytest.raises(ValueError, match="dense_layers 2 leaves none of 2 layers"):
        presets.shape(ShapeConfig(preset="deepseek", depth=2, dense_layers=2))

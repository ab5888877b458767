"""The decoder in plain PyTorch, for any dtype: the definition that gradients are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.config import ModelConfig
from ..models.moe_config import MoeConfig
from ..models.rope_scaling import rope_tables

LATENT_EPS = 1e-6  # of the norms of latents


def plain_logits(config: ModelConfig, weights: Mapping[str, Tensor], ids: Sequence[int]) -> Tensor:
    """Logits `[len(ids), vocab]` of one document in the dtype of the weights."""
    table = weights["model.embed_tokens.weight"]
    h = table[torch.tensor(ids)]
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = _norm(h, own["input_layernorm.weight"], config.rms_norm_eps)
        attend = _attention if config.mla is None else _latent_attention
        h = h + attend(config, own, x, config.window_left(layer))
        x = _norm(h, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        experts = config.experts_of(layer)
        h = h + (_mlp(own, "mlp", x) if experts is None else _experts(experts, own, x))
    h = _norm(h, weights["model.norm.weight"], config.rms_norm_eps)
    return h @ (table if config.tie_word_embeddings else weights["lm_head.weight"]).T


def plain_loss(
    config: ModelConfig, weights: Mapping[str, Tensor], documents: Sequence[Sequence[int]]
) -> Tensor:
    """Sum of the cross entropies of every next token within its document."""
    losses = [
        F.cross_entropy(
            plain_logits(config, weights, ids)[:-1], torch.tensor(ids[1:]).long(), reduction="sum"
        )
        for ids in documents
    ]
    return torch.stack(losses).sum()


def _linear(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ own[f"{name}.weight"].T
    bias = own.get(f"{name}.bias")
    return y if bias is None else y + bias


def _mlp(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up = _linear(own, f"{name}.gate_proj", x), _linear(own, f"{name}.up_proj", x)
    return _linear(own, f"{name}.down_proj", F.silu(gate) * up)


def _experts(experts: MoeConfig, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Every expert for every token, weighted with 0 where it was not chosen."""
    weights = _gate_weights(experts, own, _linear(own, "mlp.gate", x))
    y = _mlp(own, "mlp.shared_experts", x) if experts.shared else torch.zeros_like(x)
    for e in range(experts.num_experts):
        gate, up = (x @ own["mlp.experts.gate_up_proj"][e].T).chunk(2, -1)
        y = y + weights[:, e, None] * ((F.silu(gate) * up) @ own["mlp.experts.down_proj"][e].T)
    return y


def _gate_weights(experts: MoeConfig, own: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """[T, E]: what each expert's output is multiplied with."""
    scores = logits.softmax(-1) if experts.scoring == "softmax" else logits.sigmoid()
    choice = scores
    if experts.bias_correction:
        choice = scores + own["mlp.gate.e_score_correction_bias"]
    grouped = choice.unflatten(1, (experts.groups, -1))
    best = grouped.topk(2 if experts.group_score == "top2" else 1, -1).values.sum(-1)
    kept = torch.zeros_like(best).scatter(1, best.topk(experts.kept_groups, -1).indices, 1.0)
    choice = choice.masked_fill(kept.repeat_interleave(grouped.shape[2], 1) == 0, float("-inf"))
    chosen = torch.zeros_like(scores).scatter(1, choice.topk(experts.per_token, -1).indices, 1.0)
    weights = scores * chosen
    if experts.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * experts.scale


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _rotate(config: ModelConfig, x: Tensor) -> Tensor:
    """x [T, H, R], rotated by its place, in half-split order."""
    cos, sin = (t.to(x.dtype)[:, None] for t in rope_tables(config, x.shape[0]))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window_left: int) -> Tensor:
    """Causal softmax attention of [T, H, D] queries over keys and values of as many heads."""
    place = torch.arange(q.shape[0])
    distance = place[:, None] - place
    hidden = (distance < 0) | ((distance > window_left) if window_left >= 0 else distance.isnan())
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def _attention(
    config: ModelConfig, own: Mapping[str, Tensor], x: Tensor, window_left: int
) -> Tensor:
    q, k, v = (_linear(own, f"self_attn.{name}_proj", x) for name in "qkv")
    if config.qk_norm_whole:
        q = _norm(q, own["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = _norm(k, own["self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in (q, k, v))
    if config.qk_norm:
        q = _norm(q, own["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = _norm(k, own["self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k = _rotate(config, q), _rotate(config, k)
    group = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    o = _attend(q, k, v, config.head_dim**-0.5, window_left)
    return _linear(own, "self_attn.o_proj", o)


def _latent_attention(
    config: ModelConfig, own: Mapping[str, Tensor], x: Tensor, window_left: int
) -> Tensor:
    mla, heads = config.mla, config.num_attention_heads
    assert mla is not None
    if mla.q_lora_rank is None:
        q = _linear(own, "self_attn.q_proj", x)
    else:
        q = _linear(own, "self_attn.q_a_proj", x)
        q = _norm(q, own["self_attn.q_a_layernorm.weight"], LATENT_EPS)
        q = _linear(own, "self_attn.q_b_proj", q)
    q = q.unflatten(-1, (heads, -1))
    q = torch.cat(
        (q[..., : mla.qk_nope_head_dim], _rotate(config, q[..., mla.qk_nope_head_dim :])), -1
    )
    latent, key = _linear(own, "self_attn.kv_a_proj_with_mqa", x).split(
        (mla.kv_lora_rank, mla.qk_rope_head_dim), -1
    )
    latent = _norm(latent, own["self_attn.kv_a_layernorm.weight"], LATENT_EPS)
    k, v = (
        _linear(own, "self_attn.kv_b_proj", latent)
        .unflatten(-1, (heads, -1))
        .split((mla.qk_nope_head_dim, mla.v_head_dim), -1)
    )
    shared = _rotate(config, key[:, None]).expand(-1, heads, -1)
    o = _attend(q, torch.cat((k, shared), -1), v, config.softmax_scale, window_left)
    return _linear(own, "self_attn.o_proj", o)

"""The decoder: one pre-norm transformer for Llama, Mistral, Mixtral, Qwen, OLMoE and DeepSeek.

The residual stream is float32; blocks compute in bfloat16 or float32; logits are float32. Whole
prompts, chunks of prompts, batched decode steps and captured graphs all run this one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fastllm.models.config import ModelConfig
from fastllm.models.rope_scaling import rope_tables
from fastllm.nn.attention import Attention
from fastllm.nn.batch import Batch, Documents
from fastllm.nn.embedding import Embedding
from fastllm.nn.linear import Linear, ParallelLinear
from fastllm.nn.mla import MultiHeadLatentAttention
from fastllm.nn.mlp import MLP
from fastllm.nn.moe import Experts, MoE, Router
from fastllm.nn.norm import RMSNorm, empty_norm
from fastllm.nn.rows import take_rows
from fastllm.nn.scalar_head import ScalarHead
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.linear_logprob import linear_logprob
from fastllm.ops.paged_cache import KvCache
from fastllm.quantize.packed import PackedWeight
from fastllm.quantize.rule import QuantReport

Used = TypeVar("Used")


class DecoderLayer(nn.Module):
    """Attention and feed-forward; the norms run fused with the additions before them."""

    def __init__(self, config: ModelConfig, layer: int, activation: str) -> None:
        super().__init__()
        self.self_attn = make_attention(config, layer, activation)
        self.mlp = make_feed_forward(config, layer, activation)
        self.input_layernorm = empty_norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = empty_norm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(
        self, y: Tensor, residual: Tensor, next_norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """From attention's output to the next layer: (its normed input, the residual stream)."""
        x, residual = self.post_attention_layernorm.after_add(y, residual)
        return next_norm.after_add(self.mlp(x), residual)

    def over_documents(
        self, x: Tensor, residual: Tensor, next_norm: RMSNorm, documents: Documents,
        tables: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The whole layer without a cache, differentiable; as `feed_forward` returns."""
        y = self.self_attn.over_documents(x, documents, tables)
        return self.feed_forward(y, residual, next_norm)


def make_attention(
    config: ModelConfig, layer: int, activation: str
) -> Attention | MultiHeadLatentAttention:
    """The attention of a layer, without weights."""
    if config.mla is None:
        return Attention(
            config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window_left=config.window_left(layer),
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            norm_eps=config.rms_norm_eps if config.qk_norm or config.qk_norm_whole else None,
            norm_whole=config.qk_norm_whole,
            activation=activation,
        )
    return MultiHeadLatentAttention(
        config.hidden_size,
        heads=config.num_attention_heads,
        q_rank=config.mla.q_lora_rank,
        kv_rank=config.mla.kv_lora_rank,
        nope_dim=config.mla.qk_nope_head_dim,
        rope_dim=config.mla.qk_rope_head_dim,
        value_dim=config.mla.v_head_dim,
        softmax_scale=config.softmax_scale,
        bias=config.attention_bias,
        activation=activation,
    )


def make_feed_forward(config: ModelConfig, layer: int, activation: str) -> MLP | MoE:
    """The MLP or the mixture of experts of a layer, without weights."""
    experts = config.experts_of(layer)
    if experts is None:
        return MLP(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            activation=activation,
        )
    return MoE(
        config.hidden_size,
        experts.moe_intermediate_size,
        experts.num_experts,
        experts.routing,
        shared_inner=experts.shared_intermediate_size,
        bias_correction=experts.bias_correction,
        bias=config.mlp_bias,
        activation=activation,
    )


class DecoderBody(nn.Module):
    """Embedding, layers, final norm: everything that Hugging Face names `model.*`."""

    def __init__(self, config: ModelConfig, activation: str) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, i, activation) for i in range(config.num_hidden_layers)]
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = empty_norm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; its weights are empty (device meta) until a loader fills them.

    dtype: what blocks compute in. max_positions: length of the rotary tables, thus of a sequence.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, activation: str, max_positions: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.activation = activation
        self.max_positions = max_positions
        self.model = DecoderBody(config, activation)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, activation)
        if config.scalar_head:
            self.score = ScalarHead(config.hidden_size)
        cos, sin = rope_tables(config, max_positions)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", cos.to(device), persistent=False)
        self.register_buffer("rope_sin", sin.to(device), persistent=False)
        self._caches: list[tuple[int, int]] | None = None  # what the packed caches were made from
        self.caches_stale = False
        self.weight_changes = 0  # how often somebody has said so
        self.quantization: QuantReport | None = None  # what a loader has quantized
        self.register_load_state_dict_post_hook(lambda *_: self.weights_changed())

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.rope_cos.device

    def parallel_linears(self) -> Iterator[tuple[str, ParallelLinear]]:
        """Every group of linears that may run as one product, with its module's name."""
        for i, layer in enumerate(self.model.layers):
            yield f"model.layers.{i}.self_attn", layer.self_attn.qkv
            if isinstance(layer.mlp, MLP):
                yield f"model.layers.{i}.mlp", layer.mlp.gate_up
            elif layer.mlp.shared_experts is not None:
                yield f"model.layers.{i}.mlp.shared_experts", layer.mlp.shared_experts.gate_up

    def weights(self) -> dict[str, Tensor]:
        """The live tensors of a model of plain weights, under the names of `weight_shapes`.

        Parameters, a tied LM head once, and the buffers that are weights (biases of routers).
        """
        kept = self.state_dict(keep_vars=True)
        shapes = self.config.weight_shapes()
        return {name: tensor for name, tensor in kept.items() if name in shapes}

    def pack_(self) -> None:
        """Make packed caches of the parameters, for generation on live weights.

        They take the parameters' memory once more. Caches that are there are written in place, so
        that captured graphs read the new values. GPUs read parameters as they lie: nothing is made.
        """
        self.caches_stale = False
        self._caches = self._parameter_states()
        if self.device.type != "cpu":
            return
        grouped: set[Linear] = set()
        for _, group in self.parallel_linears():
            if all(member.weight is not None for member in group.members):
                group.pack_()
                grouped.update(group.members)
        for module in self.modules():
            if isinstance(module, Linear) and module not in grouped and module.weight is not None:
                module.pack_()
            elif isinstance(module, Experts) and module.gate_up_proj is not None:
                module.pack_()

    def weights_changed(self) -> None:
        """Say that weights have changed: packed caches are made again before they are next used.

        Whoever writes parameters calls it: an optimizer step, adapters, FSDP. `load_state_dict`
        does so by itself.
        """
        self.weight_changes += 1
        if self._caches is not None:
            trained = any(p.requires_grad for p in self._packed_parameters())
            self.caches_stale |= trained or self._caches != self._parameter_states()

    def refresh_caches(self) -> None:
        """Pack again if the weights have changed since, said or seen (writes through torch are)."""
        if self._caches is not None and (
            self.caches_stale or self._caches != self._parameter_states()
        ):
            self.pack_()

    def served_tensors(self) -> Iterator[Tensor]:
        """Every tensor that holds weights and that a forward pass may read: to see them move."""
        yield from self.parameters()
        for module in self.modules():
            if isinstance(module, Experts):
                for packed in module.packs():
                    yield from (packed.data, packed.scales)
            elif isinstance(module, Router) and module.e_score_correction_bias is not None:
                yield module.e_score_correction_bias
        owners: list[Linear | ParallelLinear | Embedding] = [
            group for _, group in self.parallel_linears()
        ]
        owners += [m for m in self.modules() if isinstance(m, Linear | Embedding)]
        for owner in owners:
            if owner.packed is not None:
                yield from (owner.packed.data, owner.packed.scales)
            if isinstance(owner, ParallelLinear) and owner.bias is not None:
                yield owner.bias

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in whatever form, shared ones once."""
        return sum({t.data_ptr(): t.nbytes for t in self.served_tensors()}.values())

    def _parameter_states(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self._packed_parameters()]

    def _packed_parameters(self) -> Iterator[Tensor]:
        """All but those of adapters, which are read as they lie: a frozen base stays packed."""
        for name, parameter in self.named_parameters():
            if ".lora_" not in name:
                yield parameter

    def forward(self, batch: Batch, cache: Sequence[KvCache | Tensor]) -> Tensor:
        """Logits of every token, float32 [T, vocab]."""
        return self.logits(self.hidden(batch, cache))

    def hidden(self, batch: Batch, cache: Sequence[KvCache | Tensor]) -> Tensor:
        """The final norm's output, [T, hidden] in the compute dtype.

        cache: pages of every layer; what the batch's tokens leave behind is written to them.
        """
        if self.caches_stale:
            self.pack_()
        tables = (self.rope_cos, self.rope_sin)
        x, residual = self._embed(batch.ids)
        for layer, next_norm, pages in zip(
            self.model.layers, self._next_norms(), cache, strict=True
        ):
            y = layer.self_attn(x, batch, tables, pages)
            x, residual = layer.feed_forward(y, residual, next_norm)
        return x

    def train_hidden(self, documents: Documents, *, checkpoint: bool = False) -> Tensor:
        """The final norm's output, [T, hidden] in the compute dtype; differentiable.

        The bits are those of `hidden` for the same tokens (latent attention excepted, which trains
        in its expanded form).

        checkpoint: keep only what enters each layer and compute its inside again in the backward
            pass: about a third more time, and memory that hardly grows with the number of layers.
        """
        if self.caches_stale and not torch.is_grad_enabled():  # products then read the caches
            self.pack_()
        tables = (self.rope_cos, self.rope_sin)
        x, residual = self._embed(documents.ids)
        for layer, next_norm in zip(self.model.layers, self._next_norms(), strict=True):
            args = (x, residual, next_norm, documents, tables)
            if checkpoint:
                x, residual = recomputed(layer.over_documents, *args, use_reentrant=False)
            else:
                x, residual = layer.over_documents(*args)
        return x

    def _embed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's input in the compute dtype, and the residual stream, float32."""
        residual = self.model.embed_tokens(ids)
        return self.model.layers[0].input_layernorm(residual, self.dtype), residual

    def _next_norms(self) -> list[RMSNorm]:
        """For each layer the norm that follows it: the next layer's first, at last the final."""
        return [layer.input_layernorm for layer in self.model.layers[1:]] + [self.model.norm]

    def logits(self, x: Tensor) -> Tensor:
        """x [R, hidden], from `hidden` -> float32 [R, vocab]."""
        return self.lm_head(x, torch.float32)

    def loss(
        self, documents: Documents, targets: Tensor, reduction: str = "sum", *,
        checkpoint: bool = False,
    ) -> Tensor:  # fmt: skip
        """Cross entropy of the next tokens, float32.

        Args:
            documents: T tokens.
            targets: `[T]` int64, the id to predict at each place; -100: none.
            reduction: "sum", "mean" over the targets that count, or "none" (`[T]`).
            checkpoint: see `train_hidden`.
        """
        x = self.train_hidden(documents, checkpoint=checkpoint)
        return linear_cross_entropy(
            x, self._head(), targets, reduction=reduction, activation=self.activation
        )

    def log_probs(
        self, documents: Documents, targets: Tensor, *, rows: Tensor | None = None,
        temperature: float = 1.0, checkpoint: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probabilities of given next tokens, as generation reports them bit for bit.

        Args:
            documents: T tokens.
            targets: `[T]` int64, the id at the next place; -100: none, both results are then 0.
            rows: `[N]` int64, the places that targets `[N]` follow, any of them more than once
                (`Documents.pack_shared`); default all.
            temperature: what logits are divided by.
            checkpoint: see `train_hidden`.

        Returns:
            `(log_prob, entropy)`, float32 in the shape of `targets`, differentiable.
        """
        x = self.train_hidden(documents, checkpoint=checkpoint)
        if rows is not None:
            x = take_rows(x, rows)
        return linear_logprob(
            x, self._head(), targets, temperature=temperature, activation=self.activation
        )

    def with_head(
        self, documents: Documents, use: Callable[[Tensor, Tensor | PackedWeight], Used], *,
        checkpoint: bool = False,
    ) -> Used:  # fmt: skip
        """`use(x, weight)` of the final norm's output, `[T, hidden]`, and the LM head's weight.

        For losses that the ops of the LM-head family make of one forward pass. Differentiable; a
        sharded model's weights are whole while `use` runs.
        """
        return use(self.train_hidden(documents, checkpoint=checkpoint), self._head(judges=True))

    def _head(self, judges: bool = False) -> Tensor | PackedWeight:
        head = self.lm_head
        if self.config.scalar_head and not judges:
            raise ValueError("a model with a scalar head gives scores, and predicts no tokens")
        if head.low_rank is not None and head.low_rank.enabled:
            raise ValueError("losses read the LM head as it is: adapters on lm_head have no loss")
        weight = head.packed if head.weight is None else head.weight
        assert weight is not None, "a loader sets the weight or packs it"
        return weight

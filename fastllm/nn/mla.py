"""Multi-head latent attention of DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.1).

A token's keys and values are linear in a small latent, c = norm(x W_a), which is all that is cached
beside one rotated key k_r that every head shares. With W_k and W_v the head's rows of `kv_b_proj`:

    expanded   k = [W_k c, k_r],  v = W_v c,  o = attention([q_n, q_r], k, v)
    absorbed   [W_k^T q_n, q_r] against the cached rows [c, k_r]; o = W_v (weighted sum of c)

The two are equal but for rounding. Expanded is 3.4 times cheaper a pair of query and key (320
against 1,088 columns with DeepSeek's sizes) and has a backward: it is the form of training.
Absorbed reads 576 numbers a cached position where expanded keys and values of 128 heads are 40,960.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastllm.nn.batch import Batch, Documents
from fastllm.nn.linear import DenseLinear, Linear, ParallelLinear
from fastllm.nn.norm import empty_norm
from fastllm.ops.attention import attention
from fastllm.ops.head_linear import head_linear
from fastllm.ops.mla_attention import append_mla, mla_attention
from fastllm.ops.registry import batch_invariant
from fastllm.ops.rope import rope

NORM_EPS = 1e-6  # of the norms of both latents, whatever rms_norm_eps says

Tables = tuple[Tensor, Tensor]


class MultiHeadLatentAttention(nn.Module):
    """`heads` heads of nope_dim + rope_dim key and value_dim value columns over one latent.

    q_rank: columns of the query's latent, None: queries come from x directly. kv_rank: columns of
    the cached latent. Rotated columns are in half-split order.

    prefill: the form in which prompts attend that begin in this step. "absorbed" is the form of
    all other steps: a token's bits then do not depend on how its prompt was cut nor on what else
    is in the batch, and prompt and decode agree bit for bit. "expanded" is faster for long prompts
    and keeps neither promise. "auto": expanded on a GPU outside batch-invariant mode.
    """

    def __init__(
        self, hidden: int, *, heads: int, q_rank: int | None, kv_rank: int, nope_dim: int,
        rope_dim: int, value_dim: int, softmax_scale: float, bias: bool = False,
        activation: str = "bf16", prefill: Literal["auto", "absorbed", "expanded"] = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_rank, self.nope_dim = heads, kv_rank, nope_dim
        self.softmax_scale = softmax_scale
        self.prefill = prefill
        q_size = heads * (nope_dim + rope_dim)
        self.q_proj = self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        if q_rank is None:
            self.q_proj = first = Linear(hidden, q_size, False, activation)
        else:
            self.q_a_proj = first = Linear(hidden, q_rank, bias, activation)
            self.q_a_layernorm = empty_norm(q_rank, NORM_EPS)
            self.q_b_proj = Linear(q_rank, q_size, False, activation)
        self.kv_a_proj_with_mqa = Linear(hidden, kv_rank + rope_dim, bias, activation)
        self.kv_a_layernorm = empty_norm(kv_rank, NORM_EPS)
        self.kv_b_proj = DenseLinear(kv_rank, heads * (nope_dim + value_dim), False, activation)
        self.o_proj = Linear(heads * value_dim, hidden, bias, activation)
        names = ("q_proj" if q_rank is None else "q_a_proj", "kv_a_proj_with_mqa")
        self.qkv = ParallelLinear((first, self.kv_a_proj_with_mqa), names)

    def forward(self, x: Tensor, batch: Batch, rope_tables: Tables, cache: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the tokens' latents and keys are appended to `cache`.

        cache: [num_pages, page_size, kv_rank + rope_dim].
        """
        q_nope, q_rope, latent, rope_key = self._project(x, batch.positions, rope_tables)
        places = (batch.block_table, batch.cu_seqlens_q, batch.cache_seqlens)
        append_mla(latent, rope_key, cache, *places)
        if batch.fresh and self._expands(x):
            o = self._attend(*self._expand(q_nope, q_rope, latent, rope_key), batch.cu_seqlens_q)
        else:
            keys, values = self._maps()
            q = head_linear(q_nope, keys.mT, q_rope)
            o = mla_attention(q, cache, *places, self.kv_rank, self.softmax_scale)
            o = head_linear(o, values)
        return self.o_proj(o.flatten(1))

    def over_documents(self, x: Tensor, documents: Documents, rope_tables: Tables) -> Tensor:
        """Causal attention within each document, without a cache; differentiable.

        x: `[T, hidden]`. rope_tables: cos and sin, `[positions, rope_dim / 2]`. Returns
        `[T, hidden]` in the dtype of `x`.
        """
        q, k, v = self._expand(*self._project(x, documents.positions, rope_tables))
        edges = (documents.cu_seqlens, documents.cu_seqlens_seen)
        o = self._attend(q, documents.keys(k), documents.keys(v), *edges)
        return self.o_proj(o.flatten(1))

    def _expands(self, x: Tensor) -> bool:
        if self.prefill == "auto":
            return x.is_cuda and not batch_invariant()
        return self.prefill == "expanded"

    def _project(
        self, x: Tensor, positions: Tensor, rope_tables: Tables
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per head the plain and the rotated part of q; the latent and the rotated key."""
        q, kv = self.qkv(x)
        if self.q_b_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (self.heads, -1))  # [T, H, nope + rope]
        q_rope = rope(q[..., self.nope_dim :], positions, *rope_tables)
        rope_key = rope(kv[:, None, self.kv_rank :], positions, *rope_tables)[:, 0]
        return q[..., : self.nope_dim], q_rope, self.kv_a_layernorm(kv[:, : self.kv_rank]), rope_key

    def _maps(self) -> tuple[Tensor, Tensor]:
        """Views of `kv_b_proj`: every head's key rows [H, nope, R] and value rows [H, v, R]."""
        assert self.kv_b_proj.weight is not None, "a loader sets the weight"
        rows = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        return rows[:, : self.nope_dim], rows[:, self.nope_dim :]

    def _expand(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [T, H, nope + rope] and v [T, H, v]."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))  # [T, H, nope + v]
        q = torch.cat((q_nope, q_rope), dim=-1)
        shared = rope_key[:, None].expand(-1, self.heads, -1)
        k = torch.cat((kv[..., : self.nope_dim], shared), dim=-1)
        return q, k, kv[..., self.nope_dim :]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        o = attention(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=True,
            softmax_scale=self.softmax_scale,
        )  # fmt: skip
        assert isinstance(o, Tensor), "without return_lse there is one result"
        return o

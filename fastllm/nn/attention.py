"""Grouped-query attention with rotary positions and optional QK-norm.

Over the paged cache (`forward`) and over whole documents with gradients (`over_documents`): only
the middle differs, and a token's bits are the same.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastllm.nn.batch import Batch, Documents
from fastllm.nn.linear import Linear, ParallelLinear
from fastllm.nn.norm import empty_norm
from fastllm.ops.append_kv import rope_append_kv
from fastllm.ops.attention import attention
from fastllm.ops.paged_attention import paged_attention
from fastllm.ops.paged_cache import KvCache
from fastllm.ops.rope import rope


class Attention(nn.Module):
    """Grouped queries: `heads` of q for `kv_heads` of k and v.

    window_left: keys before its own that a query sees, -1 = all. norm_eps: of the RMSNorm over
    each head of q and k, or with `norm_whole` over all heads of q and over all of k; None: there
    is none.
    """

    def __init__(
        self, hidden: int, *, heads: int, kv_heads: int, head_dim: int, window_left: int = -1,
        bias: bool = False, output_bias: bool = False, norm_eps: float | None = None,
        norm_whole: bool = False, activation: str = "bf16",
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.softmax_scale = float(head_dim**-0.5)
        self.window_left = window_left
        q_size, kv_size = heads * head_dim, kv_heads * head_dim
        self.q_proj = Linear(hidden, q_size, bias, activation)
        self.k_proj = Linear(hidden, kv_size, bias, activation)
        self.v_proj = Linear(hidden, kv_size, bias, activation)
        self.o_proj = Linear(q_size, hidden, output_bias, activation)
        self.norm_whole = norm_whole
        self.q_norm = self.k_norm = None
        if norm_eps is not None:
            self.q_norm = empty_norm(q_size if norm_whole else head_dim, norm_eps)
            self.k_norm = empty_norm(kv_size if norm_whole else head_dim, norm_eps)
        members = (self.q_proj, self.k_proj, self.v_proj)
        self.qkv = ParallelLinear(members, ("q_proj", "k_proj", "v_proj"))

    def forward(
        self, x: Tensor, batch: Batch, rope_tables: tuple[Tensor, Tensor], cache: KvCache
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; K and V of the tokens are appended to `cache`."""
        q, k, v = self._project(x)
        places = (batch.block_table, batch.cu_seqlens_q, batch.cache_seqlens)
        k_cache, v_cache, k_scales, v_scales = cache
        pages = (k_cache, v_cache, *places)
        q = rope_append_kv(q, k, v, batch.positions, *rope_tables, *pages, k_scales, v_scales)
        o = paged_attention(
            q, *pages, self.softmax_scale, window_size=(self.window_left, 0),
            k_scales=k_scales, v_scales=v_scales,
        )  # fmt: skip
        return self.o_proj(o.flatten(1))

    def over_documents(
        self, x: Tensor, documents: Documents, rope_tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]: causal within each document, no cache; differentiable."""
        q, k, v = self._project(x)
        q = rope(q, documents.positions, *rope_tables)
        k = rope(k, documents.positions, *rope_tables)
        o = attention(
            q, documents.keys(k), documents.keys(v), cu_seqlens_q=documents.cu_seqlens,
            cu_seqlens_k=documents.cu_seqlens_seen, causal=True,
            softmax_scale=self.softmax_scale, window_size=(self.window_left, 0),
        )  # fmt: skip
        assert isinstance(o, Tensor), "without return_lse there is one result"
        return self.o_proj(o.flatten(1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, D], k and v [T, kv_heads, D], before the rotation."""
        q, k, v = self.qkv(x)
        if self.norm_whole and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if not self.norm_whole and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

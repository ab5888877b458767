"""The paged KV cache: one block of pages per layer.

A page holds the K and V (or latents) of `PAGE_SIZE` positions of one sequence in every layer. Its
content is final once it is full, so sequences that share a prefix share its full pages.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from fastllm.engine.page_pool import PagePool
from fastllm.models.config import ModelConfig
from fastllm.ops.paged_cache import PAGE_SIZE, KvCache
from fastllm.ops.pages import lazy_zeros


class PagedCache:
    """`layers[i]` holds layer i's K and V, each `[num_pages, kv_heads, page_size, head_dim]`; with
    latent attention it is one tensor, `[num_pages, page_size, width]`. `pool` says who has a page.

    An int8 cache has scales beside them. On the CPU memory is reserved, not touched: a page costs
    nothing until it is written.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device,
        most_kept: int | None = None,
    ) -> None:  # fmt: skip
        layers = config.num_hidden_layers
        self.layers: list[KvCache | Tensor]
        if config.mla is not None:
            pages = lazy_zeros(
                (layers, 1, num_pages, PAGE_SIZE, config.mla.cache_width),
                dtype,
                device,
                parts=layers,
            )
            self._blocks = [pages]
            self.layers = [layer[0] for layer in pages]
        else:
            rows = (layers, 2, num_pages, config.num_key_value_heads, PAGE_SIZE)
            pages = lazy_zeros((*rows, config.head_dim), dtype, device, parts=2 * layers)
            self._blocks = [pages]
            if dtype == torch.int8:
                self._blocks.append(lazy_zeros(rows, torch.float32, device, parts=2 * layers))
            # [k, v] of each block, side by side
            self.layers = [KvCache(*chain(*of)) for of in zip(*self._blocks, strict=True)]
        self.num_pages = num_pages
        self.pool = PagePool(num_pages, most_kept)

    @property
    def free_pages(self) -> int:
        """How many pages nobody uses."""
        return self.pool.free_pages

    def copy_page(self, target: int, source: int) -> None:
        """Copy a page in every layer."""
        for block in self._blocks:
            block[:, :, target].copy_(block[:, :, source])


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one page in all layers, scales included."""
    per_token = config.cache_values * dtype.itemsize
    if dtype == torch.int8:
        per_token += 2 * config.num_key_value_heads * torch.float32.itemsize
    return config.num_hidden_layers * PAGE_SIZE * per_token


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // PAGE_SIZE)

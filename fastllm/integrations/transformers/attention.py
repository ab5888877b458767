"""The attention function: transformers' attention interface on our attention op.

Whatever the op does not do (dropout, position biases, arbitrary dense masks, other devices) goes to
what transformers would have run: its own sdpa, or for a model that sdpa cannot serve (soft-capped
logits, sinks) the model's own eager function.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.checks import MAX_HEAD_DIM
from ...ops.registry import FLOATS, is_transformed
from . import registry
from .implementations import NAME
from .lazy_mask import LazyMask


class View(NamedTuple):
    """What the op is to hide: keys from `end` on are cut off, the rest are its arguments."""

    end: int | None = None
    left: int = -1
    right: int = -1
    key_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


ALL = View()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface.

    Args:
        module: the attention module.
        query: `[B, H, Tq, D]`; key `[B, Hk, Tk, D]`, value `[B, Hk, Tk, Dv]`: not repeated.
        attention_mask: from `make_mask`, or any dense mask of a user.
        dropout, scaling, is_causal, position_bias: as transformers' sdpa takes them.
        cache: the paged cache of continuous batching, which is updated.
        kwargs: `softcap`, `s_aux` (sinks, `[H]`), `sliding_window`, `cu_seq_lens_q` and others.

    Returns:
        `[B, Tq, H, Dv]`, contiguous, and None; with `output_attentions` the weights
        `[B, H, Tq, Tk]` too, from the model's own eager function.
    """
    if _faster_there(module, query, key, attention_mask, cache, kwargs):
        return registry.original("attention")(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, **kwargs,
        )  # fmt: skip
    paged = cache is not None and type(cache).__name__ == "PagedAttentionCache"
    if paged:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    view = None
    if dropout == 0 and position_bias is None and _ours(query, key, value, scaling):
        if paged:
            view = _paged_view(query, kwargs)
        else:
            view = _view(module, query, key, attention_mask, is_causal, kwargs)
    if view is None or _weights_wanted(module, kwargs):
        return _theirs(
            module, query, key, value, attention_mask, dropout, scaling, is_causal,
            position_bias, kwargs,
        )  # fmt: skip
    return _attend(query, key, value, view, scaling, kwargs), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, view: View, scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    if _autocasting(query):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    end, left, right, key_mask, starts_q, starts_k = view
    if end is not None and end < key.shape[2]:
        key, value = key[:, :, :end], value[:, :, :end]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, T, H, D]
    if starts_q is not None:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    o = ops.attention(
        q, k, v,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        softmax_scale=scaling,
        window_size=(left, right),
        softcap=kwargs.get("softcap") or 0.0,
        sinks=kwargs.get("s_aux"),
        key_mask=key_mask,
    )  # fmt: skip
    assert isinstance(o, Tensor)  # the pair comes with return_lse
    return o if starts_q is None else o.view(query.shape[0], -1, *o.shape[1:])


def _ours(query: Tensor, key: Tensor, value: Tensor, scaling: Any) -> bool:
    """Whether dtypes, devices and shapes are the op's."""
    batch, heads, queries, dim = query.shape
    key_batch, kv_heads, keys, _ = key.shape
    dtype = query.dtype
    return (
        type(query) is Tensor
        and (query.is_cpu or query.is_cuda)
        and dtype in FLOATS
        and ((dtype is key.dtype and dtype is value.dtype) or _autocasting(query))
        and batch == key_batch
        and dim <= MAX_HEAD_DIM
        and value.shape[3] <= MAX_HEAD_DIM
        and batch * queries * keys * kv_heads > 0
        and heads % kv_heads == 0
        and not isinstance(scaling, Tensor)
        and not is_transformed()
    )


def _faster_there(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, cache: Any, kwargs: dict[str, Any]
) -> bool:
    """One float32 query a sequence, on the CPU, whose keys are few or not shared by query heads.

    Measured on Zen 5, one thread, 64 wide: 9 heads on 9 of keys, 512 keys, 43 us there and 84 here;
    9 on 3, 32 keys, 10 and 16; 512 keys, 39 and 41, cold 125 and 153; four sequences, 149 and 119.
    (In bfloat16 ours is 2 to 25 times faster.) It is asked first: any more shows in such a step.
    """
    batch, heads, queries, dim = query.shape
    if queries != 1 or query.dtype is not torch.float32 or not query.is_cpu:
        return False
    _, kv_heads, keys, _ = key.shape
    return (
        (heads == kv_heads or batch * heads * keys * dim < 2**19)
        and cache is None
        and (mask is None or type(mask) is Tensor)
        and kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
        and not _weights_wanted(module, kwargs)
    )


def _autocasting(query: Tensor) -> bool:
    return torch.is_autocast_enabled(query.device.type)


def _view(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, is_causal: bool | None,
    kwargs: dict[str, Any],
) -> View | None:  # fmt: skip
    """What a mask lets be seen; None: only its booleans say it."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if not causal:
            return ALL
        starts = kwargs.get("cu_seq_lens_q")
        if starts is not None and query.shape[0] == 1 and queries == keys > 1:
            window = kwargs.get("sliding_window") or 0
            return View(None, window - 1, 0, None, starts, starts)
        # None stands for causal from key 0: a static cache's places after the prompt are cut off.
        # The op aligns the ends: fewer keys than queries would be seen from elsewhere.
        if queries == 1:
            return ALL
        return View(queries, right=0) if queries <= keys else None
    if isinstance(mask, LazyMask):
        return _lazy_view(queries, keys, mask)
    if mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and queries == 1:
        hidden = mask[:, 0, 0, :]
        if hidden.shape[-1] != keys:
            return None
        return View(key_mask=hidden.expand(query.shape[0], keys))
    return None


def _lazy_view(queries: int, keys: int, mask: LazyMask) -> View | None:
    if mask.shape[2] != queries or mask.shape[3] != keys:
        return None
    if not torch.compiler.is_compiling() and mask.overwritten():
        return None
    if mask.kind == "documents":
        return View(None, mask.left, mask.right, None, mask.held, mask.held)
    hidden = mask.held if mask.kind == "keys" else None
    if mask.left < 0 and mask.right < 0:
        return View(key_mask=hidden)
    # The op aligns the ends: the last query stands at the last key.
    end = mask.offset + queries
    if mask.right == 0 and 0 < end <= keys:
        return View(end, mask.left, 0, None if hidden is None else hidden[:, :end])
    return View(None, mask.left, mask.right, hidden) if end == keys else None


def _paged_view(query: Tensor, kwargs: dict[str, Any]) -> View | None:
    """Continuous batching: one row of tokens, of all requests, each with its own keys."""
    starts_q, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if kwargs.get("block_table") is not None or query.shape[0] != 1:
        return None
    if not isinstance(starts_q, Tensor) or not isinstance(starts_k, Tensor):
        return None
    window = kwargs.get("sliding_window") or 0
    return View(None, window - 1, 0, None, starts_q.to(torch.int32), starts_k.to(torch.int32))


def _theirs(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float,
    scaling: float | None, is_causal: bool | None, position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers would have run with this mask's booleans."""
    if isinstance(mask, LazyMask):
        mask = mask.dense()
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    weights = eager is not None and _weights_wanted(module, kwargs) and _by_our_name(module)
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None and not weights:
        return registry.original("attention")(
            module, query, key, value, mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, **kwargs,
        )  # fmt: skip
    if eager is None:
        raise ValueError(
            f"{type(module).__name__} wants soft-capped logits or sinks, with a mask or dropout "
            "that our attention does not do, and its file has no eager attention: use "
            'attn_implementation="eager"'
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    mask = _additive(mask, query, key, causal)
    return eager(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
    )  # fmt: skip


def _weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller wants attention weights, which only eager attention makes."""
    wanted = kwargs.get("output_attentions")
    return getattr(getattr(module, "config", None), "output_attentions", False) or bool(wanted)


def _by_our_name(module: nn.Module) -> bool:
    """Whether "fastllm" was asked for: under the name "sdpa" weights stay unknown, as they were."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """A mask as eager attention adds it to the logits; None with `causal` is from key 0."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype is not torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)

"""The ops: `fastllm.ops.<op>` are public functions on tensors; one file per stem."""

from __future__ import annotations

from . import (  # noqa: F401 (they add their rows to the tables)
    lm_head_cpu,
    lm_head_cuda,
    moe_backward,
    quant_moe_backward,
)
from .adamw import adamw_step_
from .append_kv import append_kv, rope_append_kv
from .attention import attention
from .dequantize import dequantize
from .embedding import embedding, quant_embedding
from .grouped_matmul import grouped_matmul, grouped_weight_grad
from .head_linear import head_linear
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import linear_kl
from .linear_logprob import linear_logprob
from .log_probs import log_probs, top_log_probs
from .lora_add import lora_add
from .mla_attention import append_mla, mla_attention, new_mla_cache
from .moe import moe
from .moe_dispatch import moe_dispatch
from .moe_gate import Gate, moe_gate
from .moe_route import moe_route
from .paged_attention import paged_attention
from .paged_cache import KvCache, new_cache
from .quant_matmul import quant_matmul
from .quant_matmul_input_grad import quant_matmul_input_grad
from .quant_moe import quant_moe
from .quantize import quantize
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .sampling import sampling
from .sdpa import sdpa
from .sum_of_squares import sum_of_squares
from .swiglu import swiglu

__all__ = [
    "Gate",
    "KvCache",
    "adamw_step_",
    "add_rms_norm",
    "append_kv",
    "append_mla",
    "attention",
    "dequantize",
    "embedding",
    "grouped_matmul",
    "grouped_weight_grad",
    "head_linear",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "log_probs",
    "lora_add",
    "mla_attention",
    "moe",
    "moe_dispatch",
    "moe_gate",
    "moe_route",
    "new_cache",
    "new_mla_cache",
    "paged_attention",
    "quant_embedding",
    "quant_matmul",
    "quant_matmul_input_grad",
    "quant_moe",
    "quantize",
    "rms_norm",
    "rope",
    "rope_append_kv",
    "sampling",
    "sdpa",
    "sum_of_squares",
    "swiglu",
    "top_log_probs",
]

"""ModelConfig: everything that the decoder needs to know about a model.

Configuration is data. Only the keys that config_hf*.py and config_gguf.py name are read from a
file, and every value is checked here, once, whatever file it came from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastllm.models.mla_config import MlaConfig
from fastllm.models.moe_config import MoeConfig
from fastllm.models.rope_scaling import RopeConfig, yarn_scale

if TYPE_CHECKING:
    from fastllm.models.gguf import GGUFTensor

LATENT_TYPES = ("deepseek_v2", "deepseek_v3")  # with latent attention
SPARSE_TYPES = ("mixtral", "qwen3_moe", "olmoe")  # always with experts; LATENT_TYPES may have them
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", *SPARSE_TYPES, *LATENT_TYPES)

# Far above every published model, and low enough that a hostile file cannot ask for much memory.
_BOUNDS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 18),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 1 << 27),
    "rms_norm_eps": (1e-12, 1e-1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder: grouped-query or latent attention, RMSNorm, MLPs or experts, rotary positions.

    Raises ValueError if a value is out of range or values contradict each other.
    """

    model_type: str  # one of MODEL_TYPES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation
    qk_norm_whole: bool = False  # or over all heads of q together, and of k
    mla: MlaConfig | None = None  # latent attention; head_dim is then that of queries and keys
    experts: MoeConfig | None = None  # mixtures of experts instead of MLPs; None: no layer has one
    sliding_window: tuple[int | None, ...] = ()  # per layer: keys a query sees, itself included
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # an id outside the vocabulary never comes up
    dtype: torch.dtype | None = None  # what the file says; None: as the weights are stored
    scalar_head: bool = False  # one score a token (`score.weight`) instead of logits
    pad_token_id: int | None = None  # of a scalar head: what transformers pads documents with

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, is {value}")
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.num_hidden_layers)
        self._check_choices()
        self._check_heads()
        self._check_experts()
        self._check_rope()
        for window in self.sliding_window:
            if window is not None and not 1 <= window <= 1 << 27:
                raise ValueError(f"sliding_window must be from 1 to {1 << 27}, is {window}")
        if len(self.sliding_window) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_window has {len(self.sliding_window)} entries for "
                f"{self.num_hidden_layers} layers"
            )
        if self.bos_token_id is not None and not 0 <= self.bos_token_id < self.vocab_size:
            raise ValueError(
                f"bos_token_id {self.bos_token_id} is outside the vocabulary of {self.vocab_size}"
            )

    def _check_choices(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type {self.model_type!r:.80} is not supported; supported: "
                f"{', '.join(MODEL_TYPES)}"
            )
        if self.hidden_act != "silu":
            raise ValueError(
                f"hidden_act {self.hidden_act!r:.80} is not supported; only silu (a SwiGLU MLP) is"
            )
        if self.scalar_head and not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true where a scalar head replaces logits")
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype {self.dtype} is not float32, bfloat16 or float16")

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd and cannot be rotated in pairs")
        if (self.mla is None) == (self.model_type in LATENT_TYPES):
            raise ValueError(
                f"{self.model_type} {'needs' if self.mla is None else 'has no'} latent attention"
            )
        if self.mla is not None and any(window is not None for window in self.sliding_window):
            raise ValueError("sliding_window and latent attention do not go together")
        if self.mla is not None and (
            self.head_dim != self.mla.qk_head_dim
            or self.num_key_value_heads != self.num_attention_heads
        ):
            raise ValueError(
                f"latent attention with {self.num_attention_heads} heads of "
                f"{self.mla.qk_head_dim} cannot have {self.num_key_value_heads} key heads of "
                f"{self.head_dim}"
            )
        if self.qk_norm and self.qk_norm_whole:
            raise ValueError("qk_norm and qk_norm_whole exclude each other")
        width = self.num_attention_heads * self.head_dim
        if width > 16 * self.hidden_size + 4096:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.head_dim} do not fit a hidden_size "
                f"of {self.hidden_size}"
            )

    def _check_experts(self) -> None:
        experts, can = self.experts, self.model_type in (*SPARSE_TYPES, *LATENT_TYPES)
        if experts is None and self.model_type in SPARSE_TYPES:
            raise ValueError(f"{self.model_type} needs experts")
        if experts is not None and not can:
            raise ValueError(f"{self.model_type} has no experts")
        if experts is not None and experts.dense_layers[-1:] >= (self.num_hidden_layers,):
            raise ValueError(
                f"dense_layers names layer {experts.dense_layers[-1]} of {self.num_hidden_layers}"
            )

    def _check_rope(self) -> None:
        dim = self.rotary_dim
        if dim < 2 or dim % 2:
            raise ValueError(f"the rotary dimension must be even and at least 2, is {dim}")
        if self.rope.type == "dynamic" and dim < 4:
            raise ValueError("rope type dynamic needs a rotary dimension of at least 4")
        for name in ("short_factor", "long_factor", "factors"):
            values = getattr(self.rope, name)
            if values is not None and len(values) != dim // 2:
                raise ValueError(
                    f"rope parameter {name} needs {dim // 2} values, has {len(values)}"
                )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head are rotated."""
        if self.mla is not None:
            return self.mla.qk_rope_head_dim
        # 1e-6: a factor made by dividing two integers must give the integer back
        return int(self.head_dim * self.rope.partial_rotary_factor + 1e-6)

    @property
    def softmax_scale(self) -> float:
        """What q . k is multiplied with: 1 / sqrt(head_dim), with YaRN's factor in DeepSeek's."""
        scale = float(self.head_dim**-0.5)
        rope = self.rope
        if self.mla is None or rope.type == "default" or not rope.mscale_all_dim:
            return scale
        return scale * yarn_scale(rope.factor or 1.0, rope.mscale_all_dim) ** 2

    @property
    def cache_values(self) -> int:
        """Values that one position takes in the cache of one layer."""
        if self.mla is not None:
            return self.mla.cache_width
        return 2 * self.num_key_value_heads * self.head_dim

    def window_left(self, layer: int) -> int:
        """Keys before its own that a query of `layer` sees; -1 = all of them.

        Kernels count the keys to the left, configurations count the query's own key too.
        """
        window = self.sliding_window[layer]
        return -1 if window is None else window - 1

    def experts_of(self, layer: int) -> MoeConfig | None:
        """The experts of `layer`, or None where it has a plain MLP."""
        experts = self.experts
        return None if experts is None or layer in experts.dense_layers else experts

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model under its Hugging Face name, in the model's order.

        The experts of a layer are two tensors, `mlp.experts.gate_up_proj` and `down_proj`, as
        transformers has them in memory; see `fastllm.models.expert_files` for how files hold them.
        """
        hidden = self.hidden_size
        norms = self._attention_norms()
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            experts = self.experts_of(layer)
            inner = self.intermediate_size if experts is None else 0
            linears = [*self._attention_linears(), *self._mlp_linears("mlp", inner)]
            if experts is not None:
                shared = experts.shared_intermediate_size
                linears += self._mlp_linears("mlp.shared_experts", shared)
                shapes |= {prefix + name: shape for name, shape in self._routed(experts)}
            for name, rows, columns, bias in linears:
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            for name, size in norms:
                shapes[f"{prefix}{name}.weight"] = (size,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if self.scalar_head:
            shapes["score.weight"] = (1, hidden)
        elif not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _mlp_linears(self, name: str, inner: int) -> list[tuple[str, int, int, bool]]:
        """(name, rows, columns, bias) of the linears of an MLP; of none if it has no columns."""
        hidden, bias = self.hidden_size, self.mlp_bias
        if not inner:
            return []
        return [
            (f"{name}.gate_proj", inner, hidden, bias),
            (f"{name}.up_proj", inner, hidden, bias),
            (f"{name}.down_proj", hidden, inner, bias),
        ]

    def _routed(self, experts: MoeConfig) -> list[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the router's and the experts' tensors of a layer."""
        count, inner, hidden = experts.num_experts, experts.moe_intermediate_size, self.hidden_size
        bias = [("mlp.gate.e_score_correction_bias", (count,))] if experts.bias_correction else []
        return [
            ("mlp.gate.weight", (count, hidden)),
            *bias,
            ("mlp.experts.gate_up_proj", (count, 2 * inner, hidden)),
            ("mlp.experts.down_proj", (count, hidden, inner)),
        ]

    def _attention_linears(self) -> list[tuple[str, int, int, bool]]:
        """(name, rows, columns, bias) of every linear of a layer's attention."""
        hidden, bias, out_bias = self.hidden_size, self.attention_bias, self.attention_output_bias
        heads, mla = self.num_attention_heads, self.mla
        q, kv = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        if mla is None:
            return [
                ("self_attn.q_proj", q, hidden, bias),
                ("self_attn.k_proj", kv, hidden, bias),
                ("self_attn.v_proj", kv, hidden, bias),
                ("self_attn.o_proj", hidden, q, out_bias),
            ]
        queries = [("self_attn.q_proj", q, hidden, False)]
        if mla.q_lora_rank is not None:
            queries = [
                ("self_attn.q_a_proj", mla.q_lora_rank, hidden, bias),
                ("self_attn.q_b_proj", q, mla.q_lora_rank, False),
            ]
        expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return [
            *queries,
            ("self_attn.kv_a_proj_with_mqa", mla.cache_width, hidden, bias),
            ("self_attn.kv_b_proj", expanded, mla.kv_lora_rank, False),
            ("self_attn.o_proj", hidden, heads * mla.v_head_dim, out_bias),
        ]

    def _attention_norms(self) -> list[tuple[str, int]]:
        """(name, size) of every norm of a layer's attention."""
        if self.mla is None:
            if self.qk_norm_whole:
                q, kv = self.num_attention_heads, self.num_key_value_heads
                sizes = (q * self.head_dim, kv * self.head_dim)
                return list(zip(("self_attn.q_norm", "self_attn.k_norm"), sizes, strict=True))
            names = ("self_attn.q_norm", "self_attn.k_norm") if self.qk_norm else ()
            return [(name, self.head_dim) for name in names]
        norms = [("self_attn.kv_a_layernorm", self.mla.kv_lora_rank)]
        if self.mla.q_lora_rank is not None:
            norms.append(("self_attn.q_a_layernorm", self.mla.q_lora_rank))
        return norms

    @classmethod
    def from_hf(
        cls,
        values: Mapping[str, Any],
        path: str | os.PathLike[str] = "config.json",
        generation: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """From the object in config.json; eos ids of generation_config.json are added.

        Raises ModelFileError naming `path` and the field.
        """
        from fastllm.models.config_hf import config_from_hf

        return config_from_hf(values, path, generation)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> ModelConfig:
        """From config.json, and generation_config.json if it is there."""
        from fastllm.models.config_hf import config_from_hf
        from fastllm.models.fields import MAX_CONFIG_BYTES, read_json_object

        path = Path(directory) / "config.json"
        generation_path = path.with_name("generation_config.json")
        generation = None
        if generation_path.exists():
            generation = read_json_object(generation_path, MAX_CONFIG_BYTES)
        return config_from_hf(read_json_object(path, MAX_CONFIG_BYTES), path, generation)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, GGUFTensor],
        path: str | os.PathLike[str] = "GGUF",
    ) -> ModelConfig:
        """From an opened GGUF file. Raises ModelFileError naming `path` and the field."""
        from fastllm.models.config_gguf import config_from_gguf

        return config_from_gguf(metadata, tensors, path)

    def to_hf(self) -> dict[str, Any]:
        """The object to save as config.json, which transformers 5 loads.

        Raises ValueError for a combination that no supported Hugging Face class has.
        """
        from fastllm.models.config_hf import config_to_hf

        return config_to_hf(self)

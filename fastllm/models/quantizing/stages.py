"""Which linear layers of a decoder layer share an input, and what makes that input."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear layers of one input, named within their decoder layer.

    norm: the norm whose output the input is, where nothing else reads that. rows: the linear layer
    whose output channels become the input's, each scaled independently of the others; `repeats`
    channels of the input are made from each of them (grouped queries share their values).
    """

    linears: tuple[str, ...]
    norm: str | None = None
    rows: str | None = None
    repeats: int = 1


def stages(config: ModelConfig, layer: int) -> list[list[Stage]]:
    """The stages of a layer in the order of the forward pass, attention's and the MLP's.

    The experts of a mixture are none of them: every expert has inputs of its own.
    """
    return [_attention(config), _feed_forward(config, layer)]


def _attention(config: ModelConfig) -> list[Stage]:
    norm = "input_layernorm"
    if config.mla is None:
        repeats = config.num_attention_heads // config.num_key_value_heads
        return [
            Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm),
            Stage(("self_attn.o_proj",), rows="self_attn.v_proj", repeats=repeats),
        ]
    output = Stage(("self_attn.o_proj",))  # its input's maker is read in parts and stays dense
    if config.mla.q_lora_rank is None:
        return [Stage(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), norm), output]
    return [
        Stage(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), norm),
        Stage(("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
        output,
    ]


def _feed_forward(config: ModelConfig, layer: int) -> list[Stage]:
    experts = config.experts_of(layer)
    if experts is None:
        return _mlp("mlp", "post_attention_layernorm")
    if not experts.shared_intermediate_size:
        return []
    # The router reads the norm's output too, and keeps its own numbers: the norm stays as it is.
    return _mlp("mlp.shared_experts", None)


def _mlp(name: str, norm: str | None) -> list[Stage]:
    return [
        Stage((f"{name}.gate_proj", f"{name}.up_proj"), norm),
        Stage((f"{name}.down_proj",), rows=f"{name}.up_proj"),
    ]

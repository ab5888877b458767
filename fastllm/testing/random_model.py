"""Models of random weights for measurements where no real file is at hand, made on the spot.

`random-135m` and `random-1b` are Hugging Face directories in bfloat16 with the shapes of
SmolLM2-135M and Llama-3.2-1B; `random-135m-q4_1` and so on are GGUF files of that format, or of
what rows get that are no whole blocks of it (`fastllm.ops.quant_format.fit`). They have no
tokenizer. Speed depends on shapes and formats, not on what the weights say.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..models.gguf_writer import write_gguf
from ..models.names import resolve
from ..models.rope_scaling import RopeConfig
from ..models.safetensors_files import save_directory
from ..models.stored_tensor import StoredTensor
from ..ops.quant_format import fit
from ..quantize.gguf_blocks import QUANTIZED_FORMATS, quantize
from .opinfo import generator

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def model_config(
    layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int
) -> ModelConfig:
    """A tied Llama with heads of 64 columns, of these sizes."""
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope=RopeConfig(theta=100000.0),
        bos_token_id=1,
        dtype=torch.bfloat16,
    )


SIZES = {
    "random-135m": model_config(30, 576, 1536, 9, 3, 49152),
    "random-1b": model_config(16, 2048, 8192, 32, 8, 128256),
}


def model_path(name: str) -> Path:
    """The files of a model: of a random one, made at first use, or what `name` resolves to.

    Raises ModelNotFoundError if there is no such model.
    """
    size, _, format = name.partition("-q")
    if size not in SIZES or (format and f"q{format}" not in QUANTIZED_FORMATS):
        return resolve(name)
    folder = Path(tempfile.gettempdir()) / "fastllm-random-models"
    path = folder / (f"{name}.gguf" if format else name)
    if not path.exists():
        folder.mkdir(exist_ok=True)
        if format:
            _write_gguf(path, SIZES[size], f"q{format}")
        else:
            save_directory(path, random_weights(SIZES[size]), SIZES[size].to_hf())
    return path


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Weights in bfloat16 under Hugging Face names; activations stay of order one."""
    g = generator(7)
    weights = {}
    for name, shape in config.weight_shapes().items():
        noise = torch.randn(shape, generator=g)
        values = 1 + 0.02 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
        weights[name] = values.bfloat16()
    return weights


def _write_gguf(path: Path, config: ModelConfig, format: str) -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tensors = {}
    for name, weight in random_weights(config).items():
        kind = fit(format, weight.shape[1]) if weight.ndim == 2 else "f32"
        data = quantize(kind, weight.float()) if weight.ndim == 2 else weight.float()
        tensors[_gguf_name(name)] = StoredTensor(kind, tuple(weight.shape), data)
    write_gguf(path, metadata, tensors)


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        stem, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{_NAMES[stem]}.{kind}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[
        name.removesuffix(".weight")
    ] + ".weight"

"""Small models for the engine's tests: random ones, and one whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.safetensors_files import save_directory
from fastllm.models.stored_tensor import StoredTensor
from fastllm.ops.quant_format import fit
from fastllm.quantize.gguf_blocks import DENSE_DTYPES, quantize

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 192, 2, 4, 2, 32, 400
FORMATS = ("f32", "bf16", "q4_0", "q4_1", "q8_0")
_GGUF_NAMES = {
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
# Every byte once, so that each token has one successor; "END" is a stop string over three tokens.
CHAIN_TEXT = "中🎉é END.quick*"
EOS_TEXT = "<|end|>"


def _config() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def _random_weights(config: ModelConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in config.weight_shapes().items():
        scale = 0.02 if len(shape) == 1 else 3.0 * shape[-1] ** -0.5
        weights[name] = torch.randn(shape, generator=g) * scale + (len(shape) == 1)
    return weights


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[stem]}.{kind}"


def _write_gguf(path: Path, format: str) -> Path:
    config = _config()
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": VOCAB,
    }
    tensors = {}
    for name, weight in _random_weights(config).items():
        kind = "f32"
        if weight.ndim == 2:
            kind = format if format in DENSE_DTYPES else fit(format, weight.shape[1])
        dense = kind in DENSE_DTYPES
        data = weight.to(DENSE_DTYPES[kind]) if dense else quantize(kind, weight)
        tensors[_gguf_name(name)] = StoredTensor(kind, tuple(weight.shape), data)
    write_gguf(path, metadata, tensors)
    return path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`random_model(format)`: a GGUF file of random weights, 2 layers, without a tokenizer."""
    made: dict[str, Path] = {}

    def get(format: str) -> Path:
        if format not in made:
            folder = tmp_path_factory.mktemp("random")
            made[format] = _write_gguf(folder / f"{format}.gguf", format)
        return made[format]

    return get


def _byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, and an end of sequence."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(EOS_TEXT, special=True)])
    return backend


def _write_chain(folder: Path, edit: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """A model that continues "*" with CHAIN_TEXT, again and again, and "~" with the end: attention
    and MLP add nothing, the hidden state is the token, the LM head maps it to its successor."""
    backend = _byte_tokenizer()
    hidden = 288  # at least the vocabulary, one direction for each token
    config = ModelConfig(
        model_type="llama",
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        eos_token_ids=(256,),
        dtype=torch.float32,
    )
    weights = {n: torch.zeros(shape) for n, shape in config.weight_shapes().items()}
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name].fill_(1.0)
    weights["model.embed_tokens.weight"].fill_diagonal_(1.0)
    chain = backend.encode(CHAIN_TEXT).ids
    for token, successor in zip(chain, [*chain[1:], chain[0]], strict=True):
        weights["lm_head.weight"][successor, token] = 4.0
    weights["lm_head.weight"][256, backend.encode("~").ids[0]] = 4.0
    if edit is not None:
        edit(weights)
    save_directory(
        folder,
        weights,
        config.to_hf(),
        files={
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps({"eos_token": EOS_TEXT}).encode(),
        },
    )
    return folder


@pytest.fixture(scope="session")
def chain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Continues "*" with CHAIN_TEXT for ever: "中🎉é END.quick*中🎉é END.quick*..."."""
    return _write_chain(tmp_path_factory.mktemp("chain") / "model")


@pytest.fixture(scope="session")
def nan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain, but the logits after "q" are NaN."""
    q = _byte_tokenizer().encode("q").ids[0]

    def edit(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][q] = float("nan")

    return _write_chain(tmp_path_factory.mktemp("nan") / "model", edit)

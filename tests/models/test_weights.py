"""Weights by Hugging Face name from both kinds of model, as transformers itself reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.safetensors_files import save_directory
from fastllm.models.stored_tensor import StoredTensor
from fastllm.models.weights import half_split_rows, open_weights
from fastllm.quantize.gguf_blocks import quantize

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, head_dim=32, attention_bias=True),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
GGUF_NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers": "blk", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.token_embd": "token_embd",
}  # fmt: skip


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    for parameter in model.parameters():  # norms and biases too: ones and zeros would hide errors
        parameter.data.normal_()
    return model


def to_gguf(model: Any, path: Path, format: str = "f32", **metadata: Any) -> None:
    """Write what llama.cpp's converter would: its names, and for llama its order of rows."""
    config, arch = model.config, model.config.model_type
    values = {
        "general.architecture": arch, "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": model_head_dim(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    } | metadata  # fmt: skip
    values = {k if k.startswith(("general", "tokenizer")) else f"{arch}.{k}": v
              for k, v in values.items()}  # fmt: skip
    tensors = {}
    for name, parameter in model.named_parameters():
        data = parameter.data
        for heads, part in ((config.num_attention_heads, "q_proj"),
                            (config.num_key_value_heads, "k_proj")):  # fmt: skip
            if arch == "llama" and part in name:
                rows = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
                data = rows.swapaxes(1, 2).reshape(data.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        kind = format if data.dim() == 2 else "f32"
        data = data.contiguous() if kind == "f32" else quantize(kind, data)
        tensors[name] = StoredTensor(kind, tuple(parameter.shape), data)
    write_gguf(path, values, tensors)


def model_head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_saved_by_transformers_gives_its_weights(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    source = open_weights(tmp_path)
    theirs = dict(model.named_parameters())
    assert set(source.names) == set(theirs)
    for key in source.names:
        stored = source.get(key)
        assert stored.format == "f32"
        assert torch.equal(stored.data, theirs[key].data)
    source.release()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_saved_here_is_loaded_by_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    random_model(name).to(dtype).save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto").eval()
    source = open_weights(tmp_path / "theirs")
    tensors = {key: source.get(key).data for key in source.names}
    save_directory(tmp_path / "ours", tensors, source.config.to_hf(), max_shard_bytes=50_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert again.dtype == dtype
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert open_weights(tmp_path / "ours").config == source.config


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mistral"])
@pytest.mark.parametrize("format", ["f32", "q4_0", "q4_1", "q8_0"])
def test_gguf_weights_are_the_model_again(name: str, format: str, tmp_path: Path) -> None:
    model = random_model(name)
    to_gguf(model, tmp_path / "m.gguf", format)
    source = open_weights(tmp_path / "m.gguf")
    theirs = dict(model.named_parameters())
    assert set(source.names) == set(theirs)
    assert source.config.tie_word_embeddings == model.config.tie_word_embeddings
    for key in source.names:
        stored, expected = source.get(key), theirs[key].data
        if format != "f32" and expected.dim() == 2:
            packed = quantize(format, expected)  # rows in a new order pack to the same bytes
            assert stored.format == format
            assert torch.equal(stored.data, packed)
        else:
            assert torch.equal(stored.data, expected)
        assert stored.shape == tuple(expected.shape)
    source.release("model.layers.0.mlp.up_proj.weight")
    source.release()
    assert source.get("model.norm.weight").data.sum() == theirs["model.norm.weight"].sum()


def test_transformers_reads_the_same_weights_from_our_gguf(tmp_path: Path) -> None:
    """An independent reading of the row order of llama files."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = random_model("llama tied")
    to_gguf(model, tmp_path / "m.gguf")
    loaded = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=model)
    source = open_weights(tmp_path / "m.gguf")
    for layer in range(2):
        for part in ("q_proj", "k_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{part}.weight"
            assert torch.equal(source.get(key).data, loaded["tensors"][key].float())


def test_half_split_order_of_one_head() -> None:
    assert half_split_rows(1, 6, 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert half_split_rows(2, 4, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert half_split_rows(1, 6, 4).tolist() == [0, 2, 1, 3, 4, 5]  # what is not rotated stays


def test_rotating_in_either_order_gives_the_same_scores(tmp_path: Path) -> None:
    """The reason for the new order: pairs (2j, 2j + 1) of a llama file become (j, j + R/2)."""
    heads, dim = 2, 8
    rows = half_split_rows(heads, dim, dim)
    x = torch.randn(heads * dim, dtype=torch.float64)
    angle = torch.arange(dim // 2, dtype=torch.float64) + 0.3
    even, odd = x.view(heads, -1, 2).unbind(-1)
    neighbours = torch.stack(
        [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1
    )
    first, second = x[rows].view(heads, 2, -1).unbind(1)
    half_split = torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )
    assert torch.equal(neighbours.reshape(-1)[rows], half_split.reshape(-1))


def small_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in config.weight_shapes().items()}


def test_missing_extra_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).to_dict())
    good = small_tensors(config)
    key = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in good.items() if k != key}, f"{key}: the weight is missing"),
        (good | {key: torch.ones(3, 4)}, rf"{key}: has shape \[3, 4\], .* says \[96, 64\]"),
        (good | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias: is not a"),
        (good | {"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "layers.2.mlp.*is not a"),
    ]
    for number, (tensors, message) in enumerate(cases):
        save_directory(tmp_path / str(number), tensors, config.to_hf())
        with pytest.raises(ModelFileError, match=message):
            open_weights(tmp_path / str(number))
    derived = good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_directory(tmp_path / "derived", derived, config.to_hf())
    assert set(open_weights(tmp_path / "derived").names) == set(good)


def gguf_file(path: Path, changes: dict[str, StoredTensor | None], **metadata: Any) -> None:
    from fastllm.models.gguf import GGUFFile
    from fastllm.models.weights import _stored

    to_gguf(random_model("qwen2"), path, **metadata)
    file = GGUFFile.open(path)
    tensors: dict[str, StoredTensor | None] = {n: _stored(t) for n, t in file.tensors.items()}
    tensors |= changes
    write_gguf(path, file.metadata, {n: t for n, t in tensors.items() if t is not None})


def test_gguf_tensors_that_do_not_belong_are_named(tmp_path: Path) -> None:
    one = StoredTensor("f32", (4,), torch.ones(4))
    for changes, message in [
        ({"blk.0.attn_sinks.weight": one}, r"m\.gguf: blk\.0\.attn_sinks\.weight: is not part"),
        ({"blk.00.attn_q.weight": one}, r"blk\.00\.attn_q\.weight: is not part"),
        ({"vision.weight": one}, "vision.weight: is not part"),
        ({"blk.7.attn_q.weight": one}, r"blk\.7\.attn_q\.weight: is not a weight"),
        ({"blk.1.ffn_up.weight": one}, r"blk\.1\.ffn_up\.weight: has shape \[4\]"),
        ({"blk.1.ffn_up.weight": None}, r"layers\.1\.mlp\.up_proj\.weight: the weight is missing"),
        ({"token_embd.weight": None}, r"token_embd\.weight: the embedding matrix is missing"),
    ]:
        gguf_file(tmp_path / "m.gguf", changes)  # type: ignore[arg-type]
        with pytest.raises(ModelFileError, match=message):
            open_weights(tmp_path / "m.gguf")


def test_a_format_without_kernels_is_named_with_the_remedy(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    from fastllm.models.gguf import GGUFFile

    to_gguf(random_model("qwen2"), tmp_path / "m.gguf")
    file = GGUFFile.open(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen2")
    for key, value in file.metadata.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for tensor in file.tensors.values():
        if tensor.name == "output.weight":
            packed = np.zeros((96, 18 * 2), np.uint8)  # 64 columns in blocks of 32
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
        else:
            array = tensor.data.view(torch.float32).reshape(tensor.shape).numpy()
            writer.add_tensor(tensor.name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelFileError, match=r"k\.gguf: output\.weight: is stored as IQ4_NL.*Use a file with"
    ):
        open_weights(tmp_path / "k.gguf")


def test_rope_factors_of_a_gguf_reach_the_config(tmp_path: Path) -> None:
    factors = StoredTensor("f32", (8,), torch.arange(1.0, 9.0))
    gguf_file(tmp_path / "m.gguf", {"rope_freqs.weight": factors})
    source = open_weights(tmp_path / "m.gguf")
    assert source.config.rope.factors == tuple(range(1, 9))
    assert not any("rope" in name for name in source.names)


def test_a_stored_tensor_checks_itself() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.uint8 \(2, 18\), got .* \(2, 20\)"):
        StoredTensor("q4_0", (2, 32), torch.zeros(2, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be torch\.float32 .* got torch\.bfloat16"):
        StoredTensor("f32", (2,), torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="q9"):
        StoredTensor("q9", (2, 32), torch.zeros(2, 20, dtype=torch.uint8))
    x = torch.randn(2, 32)
    stored = StoredTensor("q8_0", (2, 32), quantize("q8_0", x))
    assert stored.nbytes == 68
    torch.testing.assert_close(stored.to_float32(), x, atol=0.02, rtol=0)


def test_the_config_of_a_directory_must_be_there(tmp_path: Path) -> None:
    save_directory(tmp_path / "m", {"w": torch.ones(1)}, {})
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"config\.json: file: does not exist"):
        open_weights(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelFileError, match=r"config\.json: \w+: is missing"):
        open_weights(tmp_path / "m")


def test_the_other_kind_of_path_is_explained(tmp_path: Path) -> None:
    to_gguf(random_model("qwen2"), tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match=r"Give the GGUF file: .*m\.gguf"):
        open_weights(tmp_path)
    save_directory(tmp_path / "m", {"w": torch.ones(1)}, {})
    with pytest.raises(ModelFileError, match=r"the directory that holds config\.json"):
        open_weights(tmp_path / "m" / "model.safetensors")


def test_the_real_model_opens_quickly_and_dequantizes_as_defined(real_model: Path) -> None:
    import time

    import gguf
    import numpy as np

    path = real_model
    times = []
    for _ in range(5):
        start = time.process_time()  # of this process alone: other work cannot disturb it
        source = open_weights(path)
        times.append(time.process_time() - start)
    assert min(times) < 0.12
    assert (source.config.num_hidden_layers, source.config.tie_word_embeddings) == (30, True)
    assert {source.get(name).format for name in source.names} == {"f32", "q4_1", "q8_0"}
    for name, theirs in [("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v")]:
        tensor = source.file.tensors[f"blk.7.{theirs}.weight"]
        rows = tensor.data.numpy().reshape(tensor.shape[0], -1)
        expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.type_name])
        ours = source.get(f"model.layers.7.{name}.weight").to_float32()
        np.testing.assert_array_equal(ours.numpy(), expected)

"""Hugging Face directories whose matrices others have quantized: read, served, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllm import LLM, SamplingParams
from fastllm.cli.main import main
from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import to_files as expert_matrices
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.mla_config import MlaConfig
from fastllm.models.moe_config import MoeConfig
from fastllm.models.weights import SafetensorsWeights, open_weights
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import format_of
from fastllm.quantize import (
    awq_files,
    bitsandbytes_files,
    compressed_tensors,
    fastllm_files,
    gptq_files,
)
from fastllm.quantize.coded import CodedWeight, coded

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 256, 4, 2, 32, 96
IDS = [3, 14, 15, 92, 65, 35]


def dense_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def moe_config() -> ModelConfig:
    experts = MoeConfig(num_experts=3, per_token=2, moe_intermediate_size=64, renormalize=True)
    return dense_config(model_type="qwen3_moe", qk_norm=True, experts=experts)


def random_codes(format: str, n: int, k: int, seed: int) -> CodedWeight:
    """A weight of about the size that layers have."""
    kind, g = format_of(format), torch.Generator().manual_seed(seed)
    groups = kind.scale_records(k)
    top = 1 << kind.bits
    codes = torch.randint(0, min(top, 120), (n, k), generator=g).to(torch.uint8)
    size = {"nf4": 1.0, "e4m3": 20.0, "int8": 70.0}.get(kind.codes, 4.5)
    scales = (0.5 + torch.rand(n, groups, generator=g)) * (1.5 * k**-0.5 / size)
    if format == "fp8_block":
        scales = scales[::128].repeat_interleave(128, 0)[:n]
    zeros = None
    if kind.scales == "half_zero":
        zeros = torch.randint(6, 10, (n, groups), generator=g).to(torch.uint8)
    if kind.codes == "int8":
        codes = (codes.short() * 2 - 120).to(torch.int8)
    return CodedWeight(format, codes, scales.to(kind.scale_dtype), zeros)


Write = Callable[[CodedWeight], Mapping[str, Tensor]]


def own_files(weight: CodedWeight) -> Mapping[str, Tensor]:
    return fastllm_files.to_files(*weight.canonical())


def write(
    directory: Path, config: ModelConfig, format: str, to_files: Write,
    quantization: Mapping[str, Any], *, skip: tuple[str, ...] = ("lm_head",),
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> dict[str, Tensor]:  # fmt: skip
    """Write a model whose layers are quantized. Returns the values of all of its weights."""
    g = torch.Generator().manual_seed(5)
    tensors, values = {}, {}
    weights = {name: torch.randn(shape, generator=g) * 0.05 + (len(shape) == 1)
               for name, shape in config.weight_shapes().items()}  # fmt: skip
    for number, (name, weight) in enumerate(expert_matrices(weights, config).items()):
        module = name.removesuffix(".weight")
        plain = weight.dim() != 2 or "embed" in name or ".mlp.gate." in name
        if plain or any(part in module for part in skip):
            tensors[name] = values[name] = weight.half().float().contiguous()
            continue
        made = random_codes(format, *weight.shape, seed=number)
        tensors |= {f"{module}.{part}": t.contiguous() for part, t in to_files(made).items()}
        values[name] = made.values()
    change(tensors)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    text = json.dumps(config.to_hf() | {"quantization_config": dict(quantization)})
    (directory / "config.json").write_text(text)
    return values


def formats_of(config: ModelConfig, format: str) -> dict[str, str]:
    names = expert_matrices({n: torch.empty(s) for n, s in config.weight_shapes().items()}, config)
    return {name.removesuffix(".weight"): format for name in names}


CASES: dict[str, tuple[str, Write, Mapping[str, Any]]] = {
    "gptq": ("int4_g64", gptq_files.to_files, gptq_files.config(4, 64, True)),
    "gptq asymmetric": (
        "int4_asym_g32", lambda w: gptq_files.to_files(w, version=2),
        gptq_files.config(4, 32, False) | {"checkpoint_format": "gptq_v2"},
    ),
    "gptq 8 bits": ("int8", gptq_files.to_files, gptq_files.config(8, -1, True)),
    "awq": ("int4_asym_g128", awq_files.to_files, awq_files.config(128)),
    "bitsandbytes": ("nf4", bitsandbytes_files.to_files, bitsandbytes_files.config()),
    "pack-quantized": (
        "int4_g32", compressed_tensors.to_files,
        compressed_tensors.config({"x": "int4_g32"}, ["lm_head"]),
    ),
    "float-quantized": (
        "fp8", compressed_tensors.to_files, compressed_tensors.config({"x": "fp8"}),
    ),
    "fp8": (
        "fp8_block",
        lambda w: {n.replace("weight_scale", "weight_scale_inv"): t
                   for n, t in compressed_tensors.to_files(w).items()},
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "fastllm": ("q8_0", own_files, fastllm_files.config(formats_of(dense_config(), "q8_0"))),
}  # fmt: skip


def with_float16(to_files: Write) -> Write:
    """GPTQ files hold scales as float16: those of int8 are made to fit."""

    def write_files(weight: CodedWeight) -> Mapping[str, Tensor]:
        scales = weight.scales.half().to(weight.scales.dtype)
        return to_files(CodedWeight(weight.format, weight.codes, scales, weight.zeros))

    return write_files


@pytest.mark.parametrize("case", CASES)
def test_a_directory_is_read_exactly_and_answers(case: str, tmp_path: Path) -> None:
    format, to_files, quantization = CASES[case]
    if case == "gptq 8 bits":
        to_files = with_float16(to_files)
    config = dense_config()
    values = write(tmp_path / "m", config, format, to_files, quantization)
    source = open_weights(tmp_path / "m")
    kinds = set()
    for name in source.names:
        stored = source.get(name)
        kinds.add(stored.format)
        expected = values[name]
        if case == "gptq 8 bits":
            torch.testing.assert_close(stored.to_float32(), expected, rtol=1e-3, atol=0)
            values[name] = stored.to_float32()
        else:
            assert torch.equal(stored.to_float32(), expected), name
    assert kinds == {"f32", format}
    assert source.format("model.layers.0.mlp.up_proj.weight") == format
    assert source.format("lm_head.weight") == "f32"
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(values, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config.to_hf()))
    served = LLM(
        tmp_path / "m", dtype="float32", activation="fp32", enforce_eager=True, max_model_len=16
    )
    expected = LLM(plain, dtype="float32", enforce_eager=True, max_model_len=16).logits(IDS)
    torch.testing.assert_close(served.logits(IDS), expected, rtol=1e-3, atol=1e-3)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
    answer = served.generate([IDS], params)[0].outputs[0].token_ids
    assert answer[0] == int(expected[-1].argmax())
    if case in ("awq", "bitsandbytes", "float-quantized"):  # one of each kind of codes
        modes = [
            LLM(tmp_path / "m", enforce_eager=eager, max_model_len=16) for eager in (False, True)
        ]
        assert modes[0].model.activation == "int8"
        answers = [llm.generate([IDS], params)[0].outputs[0].token_ids for llm in modes]
        assert answers[0] == answers[1]


def test_experts_one_by_one_and_modules_left_out(tmp_path: Path) -> None:
    config, skip = moe_config(), ("lm_head", "layers.0.self_attn", "layers.1.mlp.experts.2.down")
    quantization = compressed_tensors.config({"x": "int4_asym_g32"}, skip)
    values = write(tmp_path / "m", config, "int4_asym_g32", compressed_tensors.to_files,
                   quantization, skip=skip[:2])  # fmt: skip
    source = open_weights(tmp_path / "m")
    assert source.get("model.layers.0.self_attn.q_proj.weight").format == "f32"
    assert source.get("model.layers.1.self_attn.q_proj.weight").format == "int4_asym_g32"
    name = "model.layers.1.mlp.experts."
    gate_up = source.get(f"{name}gate_up_proj")
    assert gate_up.format == "int4_asym_g32" == source.format(f"{name}gate_up_proj")
    for e in range(3):
        parts = [values[f"{name}{e}.{part}.weight"] for part in ("gate_proj", "up_proj")]
        assert torch.equal(gate_up.to_float32()[e], torch.cat(parts))
        one = source.get_expert(f"{name}down_proj", e)
        assert torch.equal(one.to_float32(), values[f"{name}{e}.down_proj.weight"])
    llm = LLM(tmp_path / "m", dtype="float32", activation="fp32", enforce_eager=True)
    assert llm.model.model.layers[0].mlp.experts.packed_down.format == "int4_asym_g32"  # type: ignore[union-attr]
    assert bool(torch.isfinite(llm.logits(IDS)).all())
    mixed = write(tmp_path / "mixed", config, "int4_asym_g32", compressed_tensors.to_files,
                  quantization, skip=skip)  # fmt: skip
    assert mixed
    with pytest.raises(ModelFileError, match=r"expert 2 is stored as f32.*experts have one format"):
        LLM(tmp_path / "mixed")


def test_latent_attention_in_blocks_of_fp8(tmp_path: Path) -> None:
    mla = MlaConfig(
        q_lora_rank=64, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
    )  # fmt: skip
    config = dense_config(model_type="deepseek_v3", mla=mla, head_dim=64, num_key_value_heads=HEADS)
    format, to_files, quantization = CASES["fp8"]
    values = write(tmp_path / "m", config, format, to_files, quantization)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(values, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config.to_hf()))
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 16}
    served = LLM(tmp_path / "m", activation="fp32", **options)
    assert served.model.model.layers[0].self_attn.o_proj.packed.format == format
    expected = LLM(plain, **options).logits(IDS)
    torch.testing.assert_close(served.logits(IDS), expected, rtol=1e-3, atol=1e-3)


def test_biases_of_zeros_that_the_model_has_not_are_passed_over(tmp_path: Path) -> None:
    def add(value: float) -> Callable[[dict[str, Tensor]], None]:
        name = "model.layers.1.mlp.up_proj.bias"
        return lambda tensors: tensors.update({name: torch.full((INNER,), value)})

    args = dense_config(), "int4_g64", gptq_files.to_files, gptq_files.config(4, 64, True)
    write(tmp_path / "zeros", *args, change=add(0.0))
    assert isinstance(open_weights(tmp_path / "zeros"), SafetensorsWeights)
    write(tmp_path / "ones", *args, change=add(1.0))
    with pytest.raises(ModelFileError, match=r"up_proj\.bias: is not a weight of the configured"):
        open_weights(tmp_path / "ones")


def test_scales_of_activations_and_caches_are_passed_over(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    quantization = compressed_tensors.config({"x": "fp8"})
    write(tmp_path / "m", dense_config(), "fp8", compressed_tensors.to_files, quantization,
          change=add)  # fmt: skip
    assert open_weights(tmp_path / "m").format("model.layers.0.mlp.up_proj.weight") == "fp8"


GPTQ = gptq_files.config(4, 64, True)
BAD_CONFIG: list[tuple[Mapping[str, Any], str]] = [
    ({"quant_method": "hqq"}, r"quant_method: 'hqq' is not supported\. Supported: gptq, awq,"),
    ({}, r"quant_method: None is not supported"),
    (GPTQ | {"bits": 3}, r"bits: 3 is not supported\. Supported: 4 and 8"),
    (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format: 'marlin'.*gptq_v2"),
    (GPTQ | {"bits": "four"}, r"bits: must be an integer"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"version: 'gemv'.*Supported: gemm"),
    ({"load_in_8bit": True}, r"load_in_8bit: 8-bit checkpoints.*fastllm quantize"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, r"bnb_4bit_quant_type: 'fp4'.*nf4"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, r"format: 'nvfp4"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 3}}}},
     r"config_groups\.g\.weights\.num_bits: 3 of type 'int'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, r"fmt: 'e5m2'.*e4m3"),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size: \[64, 64\]"),
    ({"quant_method": "fastllm", "version": 2}, r"version: 2 is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("quantization", "message"), BAD_CONFIG)
def test_methods_that_are_not_supported_are_named_with_what_is(
    quantization: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "m", dense_config(), "int4_g64", gptq_files.to_files, quantization)
    with pytest.raises(ModelFileError, match=r"config\.json: quantization_config\." + message):
        open_weights(tmp_path / "m")


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(name)] and None


def _set(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    full = f"model.layers.0.mlp.up_proj.{name}"
    return lambda tensors: tensors.update({full: make(tensors[full]).contiguous()})


BAD_FILES: list[tuple[str, Callable[[dict[str, Tensor]], None], str]] = [
    ("gptq", _drop(".scales"), r"_proj\.weight: scales is missing"),
    ("gptq", _set("scales", lambda t: t[:1]), r"up_proj\.weight: scales have shape"),
    ("gptq", _set("scales", lambda t: t * float("nan")), r"up_proj\.weight: \(gptq\) .*NaN"),
    ("gptq", _set("g_idx", lambda t: t * 0), r"up_proj\.weight: g_idx does not put 64 columns in"),
    ("gptq", _set("qweight", lambda t: t[:-1]), r"g_idx has shape \[128\], \[120\]"),
    ("awq", _drop(".qzeros"), r"qzeros is missing"),
    ("bitsandbytes", _drop(".quant_map"), r"weight\.quant_map is missing"),
    ("bitsandbytes", _set(f"weight.{bitsandbytes_files.STATE}", lambda t: t[:9]), "valid JSON"),
    ("pack-quantized", _drop("weight_shape"), r"weight_shape is missing"),
    (
        "pack-quantized",
        _set("weight_scale", lambda t: t[:, :2].contiguous()),
        r"up_proj\.weight: there are scales for 2 groups in rows of 128 columns; group_size of "
        r"config\.json is 32",
    ),
    ("float-quantized", _set("weight_scale", lambda t: t / 0), r"NaN or infinity"),
    ("fp8", _set("weight_scale_inv", lambda t: t[:1]), r"up_proj\.weight: .*scales of shape"),
    ("fastllm", _drop("weight_scales"), r"weight_scales is missing"),
    ("fastllm", _set("weight_scales", lambda t: t[:, :2]), r"weight_scales has shape"),
]


def test_groups_of_gptq_are_those_that_the_config_names(tmp_path: Path) -> None:
    format, to_files, quantization = CASES["gptq"]
    other = {**quantization, "group_size": 128}
    write(tmp_path / "m", dense_config(), format, to_files, other)
    with pytest.raises(ModelFileError, match=r"groups in rows of .* config\.json is 128"):
        open_weights(tmp_path / "m")
    write(tmp_path / "d", dense_config(), format, to_files, {**other, "dynamic": {"+:x": {}}})
    assert open_weights(tmp_path / "d").names


@pytest.mark.parametrize(("case", "change", "message"), BAD_FILES)
def test_damaged_tensors_are_named_with_their_file(
    case: str, change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    format, to_files, quantization = CASES[case]
    write(tmp_path / "m", dense_config(), format, to_files, quantization, change=change)
    with pytest.raises(ModelFileError, match=r"model\.safetensors.*" + message):
        source = open_weights(tmp_path / "m")
        for name in source.names:
            source.get(name)


@pytest.mark.parametrize("case", ["gptq", "pack-quantized"])
def test_columns_out_of_order_are_served_dequantized_with_a_warning(
    case: str, tmp_path: Path
) -> None:
    format, to_files, quantization = CASES[case]
    orders = iter(range(100))

    def shuffled(weight: CodedWeight) -> Mapping[str, Tensor]:
        g = torch.Generator().manual_seed(next(orders))
        order = torch.randperm(weight.k, generator=g)
        ordered.append(CodedWeight(weight.format, weight.codes, weight.scales, None, order))
        return to_files(ordered[-1])

    ordered: list[CodedWeight] = []
    names = list(write(tmp_path / "m", dense_config(), format, shuffled, quantization))
    layers = [name for name in names if "_proj" in name]
    with pytest.warns(UserWarning, match=r"14 matrices, .* out of order \(act-order, desc_act"):
        llm = LLM(tmp_path / "m", dtype="float32", enforce_eager=True)
    with pytest.warns(UserWarning, match="act-order"):
        source = open_weights(tmp_path / "m")
    for name, weight in zip(layers, ordered, strict=True):
        assert source.format(name) == "f32"
        assert torch.equal(source.get(name).to_float32(), weight.values())
    assert bool(torch.isfinite(llm.logits(IDS)).all())


def test_a_directory_without_the_method_says_where_it_belongs(tmp_path: Path) -> None:
    write(tmp_path / "m", dense_config(), *CASES["float-quantized"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="weight_scale: is not a weight of the configured"):
        open_weights(tmp_path / "m")


def test_inspect_tells_the_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    format, to_files, quantization = CASES["awq"]
    write(tmp_path / "m", dense_config(), format, to_files, quantization)
    assert main(["inspect", str(tmp_path / "m")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.*.mlp.up_proj.weight", "256", "x", "128", format, "2"] in [
        line[:6] for line in lines
    ]
    assert not any("qweight" in word for line in lines for word in line)


def test_inspect_shows_what_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    format, to_files, _ = CASES["awq"]
    write(tmp_path / "m", dense_config(), format, to_files, {"quant_method": "hqq"})
    assert main(["inspect", str(tmp_path / "m")]) == 0
    printed = capsys.readouterr().out
    assert "up_proj.qweight" in printed and "'hqq' is not supported" in printed


def test_codes_of_a_loaded_layer_are_those_of_the_files(tmp_path: Path) -> None:
    format, to_files, quantization = CASES["bitsandbytes"]
    write(tmp_path / "m", dense_config(), format, to_files, quantization)
    packed = LLM(tmp_path / "m", enforce_eager=True).model.model.layers[0].mlp.down_proj.packed
    assert packed is not None and packed.format == "nf4"
    stored = open_weights(tmp_path / "m").get("model.layers.0.mlp.down_proj.weight")
    assert stored.scales is not None
    own = coded(packed.data, packed.scales, "nf4", packed.n, packed.k)
    theirs = coded(stored.data, stored.scales, "nf4", packed.n, packed.k)
    assert torch.equal(own.codes, theirs.codes) and torch.equal(own.scales, theirs.scales)
    assert layout.rows_of(stored.data, "nf4") == 1


def test_directories_are_exported_dequantized(tmp_path: Path) -> None:
    config = moe_config()
    quantization = compressed_tensors.config({"x": "int4_asym_g32"})
    values = write(tmp_path / "m", config, "int4_asym_g32", compressed_tensors.to_files,
                   quantization)  # fmt: skip
    source = open_weights(tmp_path / "m")
    export_gguf(weights_of(source), tmp_path / "m.gguf", "f32", None)
    exported = open_weights(tmp_path / "m.gguf")
    for name in source.names:
        assert torch.equal(exported.get(name).to_float32(), source.get(name).to_float32()), name
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert torch.equal(
        exported.get("model.layers.1.mlp.experts.down_proj").to_float32()[2], values[name]
    )

"""QuantConfig: arguments, directories and weights that cannot be are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_loading import load, saved
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastllm.integrations.transformers import QuantConfig, quantizer

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"format": "int5"}, r"format: format 'int5' does not exist; did you mean"),
        ({"format": "bf16"}, r"format: format 'bf16' is not quantized"),
        ({"format": None}, r"format is missing: name one, such as 'int4'"),
        ({"activation": "int4"}, r"activation must be one of int8, bf16, fp32, got 'int4'"),
        ({"overrides": {"mlp": "q9"}}, r"overrides\['mlp'\]: format 'q9' does not exist"),
        ({"overrides": {"(": "q8_0"}}, r"overrides '\(' is no regular expression"),
        ({"embeddings": "bf16"}, r"embeddings names no quantized format"),
        ({"modules_to_not_convert": "["}, r"modules_to_not_convert '\[' is no regular"),
        ({"formats": {"a": "q9_0"}}, r"formats\['a'\]: format 'q9_0' does not exist"),
        ({"version": 9}, r"version 9 of fastllm's quantized files is not supported"),
        ({"quant_method": "gptq"}, r"quant_method must be 'fastllm', got 'gptq'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        QuantConfig(**arguments)


def test_damaged_directories_and_impossible_placements_are_named(tmp_path: Path) -> None:
    folder = saved("qwen3", tmp_path)
    with pytest.raises(
        ValueError, match=r"nothing of Qwen3ForCausalLM is quantized \(model\.layers\.0"
    ):
        load(folder, format="q8_0", modules_to_not_convert=["model", "lm_head"])
    check = quantizer.FastllmQuantizer(QuantConfig("q8_0")).validate_environment
    with pytest.raises(ValueError, match="device_map places modules on cpu, disk"):
        check(device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ValueError, match="device_map asks for mps"):
        check(device_map={"": "mps"})
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        config = QuantConfig("q8_0")
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float64
        )
    load(folder, format="q8_0").save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_codes"
    for broken in (None, tensors[name][:-1].clone()):
        kept = {n: t for n, t in tensors.items() if n != name or broken is not None}
        if broken is not None:
            kept[name] = broken
        save_file(kept, file, {"format": "pt"})
        # transformers itself refuses a tensor of another shape, and says which in its report
        with pytest.raises((ValueError, RuntimeError), match=r"up_proj\.weight_codes|mismatch"):
            load(tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"]["formats"]["model.layers.0.self_attn.q_norm"] = "q8_0"
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"q_norm, q8_0 in config\.json: a Qwen3RMSNorm is neither"
    ):
        load(tmp_path / "packed")


def test_a_weight_that_cannot_be_rounded_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved("qwen3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # transformers' own words
        with caplog.at_level("WARNING", logger="transformers"):
            transformers.utils.logging.enable_propagation()
            try:
                load(folder, format="q8_0")
            finally:
                transformers.utils.logging.disable_propagation()
    assert "model.layers.0.mlp.up_proj" in caplog.text and "NaN" in caplog.text


def test_files_and_config_that_disagree_are_refused(tmp_path: Path) -> None:
    load(saved("qwen3", tmp_path), format="q4_0").save_pretrained(tmp_path / "packed")
    name, file = "model.layers.0.mlp.up_proj", tmp_path / "packed/model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight_format"] = torch.tensor(list(b"q5_0"), dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}\.weight_format in the files is 'q5_0', and"):
        load(tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    del config["quantization_config"]["formats"][name]
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json gives {name} no format in"):
        load(tmp_path / "packed")

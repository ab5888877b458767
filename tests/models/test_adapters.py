"""Adapters on disk: PEFT reads what is written here, and the reverse, with equal logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm import LLM
from fastllm.errors import ModelFileError
from fastllm.models.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from fastllm.models.config import ModelConfig
from fastllm.models.gguf_export import export_gguf, export_hf, weights_of
from fastllm.models.loader import save_pretrained
from fastllm.models.trainable import initialize, load_trainable
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters

# PEFT asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    eos_token_ids=(0,),
)
IDS = [5, 17, 33, 2, 90, 41, 41, 8]
PARTS = LoraConfig(r=4, alpha=8, target_modules=("q_proj", "k_proj", "down_proj"))


def _fill(model: nn.Module, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.logits(model.train_hidden(Documents.pack([IDS])))


def _close(mine: Tensor, theirs: Tensor) -> None:
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a small random model in float32."""
    folder = tmp_path_factory.mktemp("adapters") / "base"
    save_pretrained(initialize(CONFIG, dtype=torch.float32, seed=3), folder)
    return folder


def _adapter(base: Path, folder: Path, config: LoraConfig) -> Tensor:
    """Save a random adapter of the base model; returns the adapted model's logits."""
    model = load_trainable(base)
    plain = _logits(model)
    add_lora(model, config)
    _fill(model)
    save_adapter(model, folder, str(base))
    logits = _logits(model)
    assert (logits - plain).abs().max() > 0.05 * plain.abs().max()
    return logits


def _transformers_logits(model: object) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()  # type: ignore[operator]


@pytest.mark.parametrize(
    "config",
    [PARTS, LoraConfig(r=3, alpha=5, rslora=True, target_modules="all-linear"),
     LoraConfig(r=2, target_modules=("layers.1.self_attn.v_proj",))],
    ids=["parts", "rslora-all", "one-layer"],
)  # fmt: skip
def test_peft_gives_the_logits_of_a_saved_adapter(
    config: LoraConfig, base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    mine = _adapter(base, tmp_path / "adapter", config)
    names = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight" in names or (
        config is PARTS
    )
    reference = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    _close(mine, _transformers_logits(adapted))


def test_an_adapter_that_peft_saved_loads_with_its_logits(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=5, lora_alpha=10, target_modules=["q_proj", "o_proj", "gate_proj"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(reference, config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    adapted.save_pretrained(tmp_path / "theirs")
    model = load_trainable(base)
    load_adapter(model, tmp_path / "theirs")
    _close(_logits(model), _transformers_logits(adapted))
    served = LLM(base, dtype="float32", adapter=tmp_path / "theirs").logits(IDS)
    _close(served, _transformers_logits(adapted))


def test_an_adapter_trained_on_a_packed_file_fits_the_dequantized_model(
    base: Path, tmp_path: Path
) -> None:
    """Rows of q and k lie in another order in the file: the adapter must not notice."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    file = tmp_path / "base.gguf"
    export_gguf(weights_of(open_weights(base)), file, "q8_0", None)
    model = load_trainable(file, dtype="float32")
    add_lora(model, PARTS)
    _fill(model)
    save_adapter(model, tmp_path / "adapter", "base")
    export_hf(weights_of(open_weights(file)), tmp_path / "plain", "f32", None)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    theirs = _transformers_logits(peft.PeftModel.from_pretrained(reference, tmp_path / "adapter"))
    _close(_logits(model), theirs)
    _close(LLM(file, activation="fp32", adapter=tmp_path / "adapter").logits(IDS), theirs)


def test_a_saved_adapter_loads_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    mine = _adapter(base, tmp_path / "adapter", PARTS)
    model = load_trainable(base)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(_logits(model), mine)
    with pytest.raises(ValueError, match="has an adapter"):
        load_adapter(model, tmp_path / "adapter")


def test_without_an_adapter_there_is_nothing_to_save(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(load_trainable(base), tmp_path / "adapter")


def _edit(folder: Path, **fields: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: .*IA3.* not supported"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": "8"}, "r: .*not a number"),
        ({"r": 8}, "the configuration says rank 8"),
        ({"lora_alpha": math.nan}, "NaN"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_a_configuration_that_is_not_plain_lora_is_named(
    fields: dict[str, object], message: str, base: Path, tmp_path: Path
) -> None:
    _adapter(base, tmp_path, PARTS)
    _edit(tmp_path, **fields)
    with pytest.raises(ModelFileError, match=message):
        load_adapter(load_trainable(base), tmp_path)


@pytest.mark.parametrize("damage", ["missing B", "other shape", "unknown layer", "NaN", "no file"])
def test_damaged_factors_are_named(damage: str, base: Path, tmp_path: Path) -> None:
    _adapter(base, tmp_path, PARTS)
    path = tmp_path / WEIGHTS_FILE
    tensors = load_file(path)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    b = f"{prefix}.lora_B.weight"
    if damage == "missing B":
        del tensors[b]
    elif damage == "other shape":
        tensors[b] = torch.zeros(32, 4)
    elif damage == "unknown layer":
        tensors |= {n.replace("layers.1", "layers.7"): t.clone() for n, t in tensors.items()}
    elif damage == "NaN":
        tensors[b][0, 0] = math.nan
    path.unlink()
    if damage != "no file":
        save_file(tensors, path)
    with pytest.raises(ModelFileError, match=r"q_proj|layers\.7|does not exist"):
        load_adapter(load_trainable(base), tmp_path)

"""Two processes with gloo: adapters on quantized weights, sharded by FSDP2, step as in one."""

from __future__ import annotations

from typing import Any

import pytest

START = """
import copy, warnings
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import fastllm
from fastllm.nn import QuantLinear
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.train import distributed

torch.set_num_threads(1)


def run(model, loss):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses
"""

# What follows makes `alone`, a quantized model with adapters, its `layers`, and its `loss`.
OURS = """
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 160), nn.Linear(160, 64)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))

torch.manual_seed(0)
alone = nn.Sequential(Layer(), Layer())
fastllm.quantize_model(alone, "q4_1")
add_lora(alone, LoraConfig(r=4, target_modules="all-linear"))
x, y = torch.randn(2, 24, 64)
layers, base = list, lambda model: model[0].up
loss = lambda model: (model(x) - y).square().mean()
"""
PEFT = """
import peft, transformers

warnings.filterwarnings("ignore", category=FutureWarning)
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
alone = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
))
fastllm.quantize_model(alone, "q4_1")
alone = peft.get_peft_model(alone, peft.LoraConfig(r=4, target_modules="all-linear"))
ids = torch.randint(0, 96, (2, 24))
layers = lambda model: model.base_model.model.model.layers
base = lambda model: layers(model)[0].mlp.up_proj.base_layer
loss = lambda model: model(ids, labels=ids).loss
"""

# Both processes have the same batch, so that the mean of their gradients is that of one.
COMPARE = """
with distributed.process_group():
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    sharded, fresh = copy.deepcopy(alone), copy.deepcopy(alone)
    for layer in layers(sharded):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [run(model, loss) for model in (alone, sharded)]
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    one, both = (dict(m.named_parameters()) for m in (alone, sharded))
    assert one.keys() == both.keys()
    for name, p in both.items():
        assert isinstance(p, DTensor), name
        torch.testing.assert_close(p.full_tensor(), one[name], rtol=1e-4, atol=1e-4)
    codes = [p for name, p in both.items() if name.endswith("weight_codes")]
    assert codes and all(p.to_local().shape[0] * 2 == p.shape[0] for p in codes)
    layer = base(sharded)
    assert isinstance(layer, QuantLinear) and layer.weight.shape == (160, 64)
    try:
        layer.weight.dequantize()
    except RuntimeError as error:
        assert "sharded among processes" in str(error)
    else:
        raise AssertionError("a part of the weight was shown as all of it")
    saved = sharded.state_dict()
    assert all(isinstance(saved[name], DTensor) for name in both)
    sharded.load_state_dict(saved)
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(whole)
    for name, p in fresh.named_parameters():
        torch.testing.assert_close(p, one[name], rtol=1e-4, atol=1e-4)
"""

# Goes on in the same group. Gradients of a decoder are summed over processes.
DECODER = """
    from fastllm.testing.quantized_models import decoder
    from fastllm.testing.small_models import batch_of, random_documents

    documents, found = batch_of(random_documents((9, 12))), []
    for parts in (1, 2):
        model = decoder("qwen3 moe", torch.float32)
        fastllm.quantize_model(model, "q4_1")
        add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
        model = distributed.shard(model) if parts == 2 else model
        found.append(run(model, lambda m: m.loss(*documents, "mean") / parts))
    assert found[0][2] < found[0][0]
    torch.testing.assert_close([2 * x for x in found[1]], found[0], rtol=1e-4, atol=0)
"""


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(OURS + COMPARE + DECODER, id="fastllm's adapters"),
        pytest.param(PEFT + COMPARE, id="PEFT's adapters", marks=pytest.mark.full),
    ],
)
def test_sharded_adapters_on_quantized_weights_step_as_in_one_process(
    steps: str, group: Any
) -> None:
    group(START + steps)

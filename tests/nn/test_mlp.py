"""The feed-forward over packed weights: fused or not, with gradients or without, the same bits."""

from __future__ import annotations

import pytest
import torch

from fastllm.nn import mlp
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.nn.mlp import MLP
from fastllm.nn.quantize_model import quantize_model


def quantized(format: str, activation: str, bias: bool) -> MLP:
    g = torch.Generator().manual_seed(0)
    layer = MLP(96, 160, bias=bias, activation=activation)
    dtype = torch.float32 if activation == "fp32" else torch.bfloat16
    for module in (layer.gate_proj, layer.up_proj, layer.down_proj):
        for name, parameter in list(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=g) / 8
            setattr(module, name, torch.nn.Parameter(values.to(dtype), requires_grad=False))
    quantize_model(layer, format)
    assert layer.gate_up.packed is not None and layer.gate_up.packed.format == format
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("format", "activation"),
    [("q4_1", "int8"), ("q4_1", "bf16"), ("q8_0", "fp32"), ("fp8", "int8"), ("int4_g32", "bf16")],
)
def test_the_product_that_goes_on_with_the_activation_has_the_bits_of_the_two_ops(
    format: str, activation: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = quantized(format, activation, bias)
    dtype = torch.float32 if activation == "fp32" else torch.bfloat16
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    apart, calls = mlp.swiglu, []
    monkeypatch.setattr(mlp, "swiglu", lambda *args: (calls.append(1), apart(*args))[1])
    with torch.no_grad():
        fused = layer(x)
        assert not calls, "40 rows are not fused"
        few = torch.cat([layer(part) for part in x.split(5)])
    recorded = layer(x.clone().requires_grad_())
    assert recorded.grad_fn is not None and len(calls) == 8 + 1
    assert torch.equal(fused, few) and torch.equal(fused, recorded)


def test_an_adapter_keeps_the_two_products_apart() -> None:
    layer = quantized("q8_0", "bf16", False)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        before = layer(x)
    layer.dtype, layer.device = torch.bfloat16, torch.device("cpu")  # as a decoder says them
    add_lora(layer, LoraConfig(r=4, target_modules=["up_proj"]))
    with torch.no_grad():
        assert torch.equal(layer(x), before)  # B is zero
        layer.up_proj.low_rank.b.weight.fill_(1.0)
        assert not torch.equal(layer(x), before)

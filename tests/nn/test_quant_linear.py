"""QuantLinear: an `nn.Linear` to whoever asks; nothing casts or overwrites its packed weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastllm
from fastllm.nn import QuantLinear
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import QUANT_FORMATS, format_of
from fastllm.quantize.packed import canonical, quantize_weight, unpack

FORMATS = tuple(name for name in QUANT_FORMATS if name in layout.QUANTIZED)
N, K = 40, 256  # rows that fill no whole group of 16


def linear(dtype: torch.dtype = torch.bfloat16, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias).to(dtype)


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_multiplies_shows_and_saves_the_same_weight(
    format: str, tmp_path: Path
) -> None:
    plain, x = linear(), inputs()
    layer = QuantLinear.from_linear(plain, format)
    values = unpack(quantize_weight(plain.weight.detach(), format))
    assert torch.equal(layer.weight.float(), values.bfloat16().float())
    exact = x.double() @ values.double().T + plain.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-7, atol=2e-2)
    state = layer.state_dict()
    data, scales = canonical(layer.packed_weight())
    assert state["weight_codes"].shape == (N, data[0].nbytes)
    assert state["weight_scales"].shape == (N, scales[0].nbytes)
    save_file(state, tmp_path / "layer.safetensors")
    other = QuantLinear.from_linear(linear(seed=5), format)
    assert not torch.equal(other(x), layer(x))
    assert other.load_state_dict(load_file(tmp_path / "layer.safetensors")).missing_keys == []
    assert torch.equal(other(x), layer(x))


def test_gradients_are_those_of_the_dequantized_layer() -> None:
    plain, x = linear(torch.float32), inputs(torch.float32).requires_grad_()
    layer = QuantLinear.from_linear(plain, "q4_0", "fp32")
    dy = torch.randn(5, N, generator=torch.Generator().manual_seed(2))
    dx, db = torch.autograd.grad((layer(x) * dy).sum(), [x, layer.bias])
    y = x @ layer.weight.dequantize().T + plain.bias
    wanted = torch.autograd.grad((y * dy).sum(), [x, plain.bias])
    torch.testing.assert_close((dx, db), wanted, rtol=1e-5, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_casts_and_moves_leave_the_codes_alone() -> None:
    layer = QuantLinear.from_linear(linear(), "q4_1")
    before, x = {k: t.clone() for k, t in layer.state_dict().items()}, inputs()
    for cast, dtype in (("half", torch.float16), ("float", torch.float32)):
        other = getattr(copy.deepcopy(layer), cast)()
        assert other.weight.dtype == other.bias.dtype == dtype
        assert other(x.to(dtype)).dtype == dtype
        for name in ("weight_codes", "weight_scales", "weight_format"):
            assert torch.equal(other.state_dict()[name], before[name])
    empty = copy.deepcopy(layer).to("meta")
    assert empty.weight.is_meta and empty.weight.shape == (N, K)
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(before)
    empty.load_state_dict(before, assign=True)
    copied = copy.deepcopy(layer)
    layer.weight_codes.zero_()
    for other in (filled, empty, copied):
        assert torch.equal(other(x), copied(x)) and not torch.equal(other(x), layer(x))


def test_a_device_of_another_layout_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear.from_linear(linear(), "q4_1")
    before = {name: t.clone() for name, t in layer.named_parameters()}
    y, state = layer(inputs()), layer.state_dict()
    with monkeypatch.context() as patch:
        patch.setitem(layout.ROWS_PER_GROUP, "cpu", 1)  # as a GPU reads weights
        empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        layer.to("cpu")
        for name in ("weight_codes", "weight_scales"):
            assert torch.equal(getattr(layer, name), state[name])
            assert getattr(empty, name).shape == state[name].shape
    torch.testing.assert_close(layer(inputs()), y, rtol=2**-7, atol=1e-3)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    layer.to("cpu")
    assert all(torch.equal(t, before[name]) for name, t in layer.named_parameters())


def test_inputs_of_other_dtypes_are_rounded_to_the_activation() -> None:
    plain, x = linear(torch.float32), inputs(torch.float32)
    rounded = QuantLinear.from_linear(plain, "q8_0", "bf16")
    assert rounded(x).dtype == torch.float32
    assert torch.equal(rounded(x), rounded(x.bfloat16().float()))
    precise = QuantLinear.from_linear(plain, "q8_0", "fp32")
    wanted = torch.nn.functional.linear(x, rounded.weight.dequantize(), plain.bias)
    torch.testing.assert_close(precise(x), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(rounded(x), precise(x))
    assert QuantLinear.from_linear(plain, "q8_0", "int8")(x).dtype == torch.float32


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: setattr(layer.weight, "data", torch.zeros(N, K)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(N, K))),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: setattr(layer.weight, "requires_grad", True),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: torch.mul(layer.weight, 2, out=layer.weight),
        lambda layer: nn.Parameter(layer.weight),
        lambda layer: layer.requires_grad_(),
    ],
)
def test_nothing_writes_to_the_weight_or_trains_it(write: Callable[[QuantLinear], object]) -> None:
    layer = QuantLinear.from_linear(linear(), "q8_0")
    before = layer.weight.dequantize()
    with pytest.raises(RuntimeError, match=r"dequantize_model|floating point"):
        write(layer)
    assert torch.equal(layer.weight.dequantize(), before)


def test_what_does_not_fit_is_named_when_a_state_is_loaded() -> None:
    layer, model = QuantLinear.from_linear(linear(), "q8_0"), nn.Sequential(linear())
    model[0] = QuantLinear.from_linear(model[0], "q4_0")
    with pytest.raises(RuntimeError, match=r"0.weight is a plain weight and this layer is q4_0"):
        model.load_state_dict(nn.Sequential(linear()).state_dict())
    state = {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0.weight_format is 'q8_0' and this layer is 'q4_0'"):
        model.load_state_dict(state)
    del state["0.weight_format"]
    with pytest.raises(RuntimeError, match=r"0.weight_codes must be uint8 \[40, 128\]"):
        model.load_state_dict(state)
    state = model.state_dict()
    del state["0.weight_scales"]
    with pytest.raises(RuntimeError, match=r"0.weight_scales is missing"):
        model.load_state_dict(state, strict=False)
    state = model.state_dict() | {"0.weight_format": torch.full((4,), 0.5)}
    with pytest.raises(RuntimeError, match=r"0.weight_format is .* and this layer is 'q4_0'"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight_codes", "0.weight_scales"'):
        model.load_state_dict({})
    state = model.state_dict() | {"0.extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.extra"'):
        model.load_state_dict(state)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        QuantLinear.from_linear(linear(), "nf")
    with pytest.raises(ValueError, match="in_features 48 is no multiple of 64"):
        QuantLinear.from_linear(nn.Linear(48, 8), "nf4")
    with pytest.raises(ValueError, match="activation 'int4' is not one of"):
        QuantLinear.from_linear(linear(), "q8_0", "int4")
    broken = linear()
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        QuantLinear.from_linear(broken, "q8_0")
    with pytest.raises(ValueError, match="columns"):
        QuantLinear.from_linear(linear(), "q8_0")(torch.ones(2, 32, dtype=torch.bfloat16))
    for shape in ((K, 0), (0, N)):
        empty = linear()
        empty.weight = nn.Parameter(torch.empty(shape[::-1]))
        with pytest.raises(ValueError, match="is empty: keep the plain module"):
            QuantLinear.from_linear(empty, "q8_0")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("grad", [True, False])
def test_whole_numbers_are_no_input(dtype: torch.dtype, grad: bool) -> None:
    layer = QuantLinear.from_linear(linear(), "q8_0")
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"input must be.*{dtype}"):
        layer(torch.ones(2, K, dtype=dtype))


def test_torch_export_takes_it_and_torch_jit_says_so() -> None:
    layer, x = QuantLinear.from_linear(linear(), "q4_0"), inputs()
    with torch.no_grad():
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
        with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot .* use torch.export"):
            torch.jit.trace(layer, x)


def test_it_compiles_into_one_graph() -> None:
    layer, x = QuantLinear.from_linear(linear(), "q4_0"), inputs().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(
        torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_our_adapters_train_on_it_with_the_bits_of_inference(dtype: torch.dtype) -> None:
    model = nn.Sequential(linear(dtype), nn.GELU(), nn.Linear(N, 8).to(dtype))
    activation = "bf16" if dtype == torch.bfloat16 else "fp32"
    model[0] = QuantLinear.from_linear(model[0], "q4_0", activation)
    x = inputs(dtype)
    before = model(x)
    parameters = add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
    assert list(lora_parameters(model)) == ["0.lora_A.weight", "0.lora_B.weight"]
    assert torch.equal(model(x), before) and {p.dtype for p in parameters} == {dtype}
    model(x).float().square().sum().backward()
    assert parameters[0].grad is not None and parameters[1].grad is not None
    assert not parameters[0].grad.any() and parameters[1].grad.any()
    with torch.no_grad():
        parameters[1].copy_(torch.randn(N, 4))
        without_graph = model(x)
    assert torch.equal(model(x), without_graph) and not torch.equal(without_graph, before)
    with pytest.raises(ValueError, match="0 holds a packed weight alone"):
        merge_lora(model)


def test_it_prints_what_it_is() -> None:
    layer = QuantLinear.from_linear(linear(), "Q4_0")
    assert isinstance(layer, nn.Linear) and layer.format == format_of("q4_0").name
    assert repr(layer) == (
        "QuantLinear(in_features=256, out_features=40, bias=True, format=q4_0, activation=bf16)"
    )
    assert repr(layer.weight) == "QuantizedValues(40 x 256, torch.bfloat16, cpu, read only)"
    plain = layer.dequantize()
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.weight.dequantize())
    assert fastllm.dequantize_model(nn.Sequential(layer)) == 1

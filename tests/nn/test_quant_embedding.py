"""QuantEmbedding, and the product that a QuantLinear binds to its weight for calls without grad."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm.nn import QuantLinear
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.nn.quant_embedding import QuantEmbedding
from fastllm.ops import packed_layout as layout
from fastllm.ops.bound_product import BoundProduct, bound_product
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_matmul import quant_matmul
from fastllm.quantize.fastllm_files import PARTS
from fastllm.quantize.packed import quantize_weight, unpack

V, K, N = 37, 256, 40
IDS = torch.tensor([[0, 36, 5], [7, 7, 1]])


def table(format: str = "q8_0", dtype: torch.dtype = torch.bfloat16) -> QuantEmbedding:
    torch.manual_seed(0)
    return QuantEmbedding(quantize_weight(torch.randn(V, K), format), dtype)


def linear(format: str = "q8_0", activation: str = "bf16", bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(K, N, bias).bfloat16(), format, activation)


@pytest.mark.parametrize("format", ["q4_0", "q4_k", "int4_g64", "nf4", "fp8", "q6_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_dequantized_table(format: str, dtype: torch.dtype) -> None:
    embedding = table(format, dtype)
    values = unpack(embedding.packed_weight())
    assert torch.equal(embedding(IDS), values[IDS].to(dtype))
    assert torch.equal(embedding.dequantize()(IDS), embedding(IDS))
    assert isinstance(embedding, nn.Embedding) and embedding.weight.shape == (V, K)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 37\), found 37"):
        embedding(torch.tensor([37]))


def test_it_is_saved_row_by_row_and_loads_again(tmp_path: Path) -> None:
    embedding = table("q4_1")
    save_file(embedding.state_dict(), tmp_path / "table.safetensors")
    state = load_file(tmp_path / "table.safetensors")
    assert state["weight_codes"].shape[0] == V
    assert bytes(state["weight_format"].tolist()) == b"q4_1"
    torch.manual_seed(1)
    other = QuantEmbedding(quantize_weight(torch.randn(V, K), "q4_1"), torch.bfloat16)
    assert not torch.equal(other(IDS), embedding(IDS))
    other.load_state_dict(state)
    assert torch.equal(other(IDS), embedding(IDS))
    with pytest.raises(ValueError, match="format 'bf16' is not quantized: keep the plain module"):
        QuantEmbedding(quantize_weight(torch.randn(V, K), "bf16"), torch.bfloat16)


@pytest.mark.parametrize("format", [f for f in QUANT_FORMATS if f in layout.QUANTIZED])
def test_a_bound_product_has_the_bits_of_the_op(format: str) -> None:
    packed = quantize_weight(torch.randn(N, K), format)
    for mode in QUANT_FORMATS[format].modes:
        bound = bound_product(packed.data, packed.scales, format, N, None, mode)
        assert bound is not None
        for dtype in bound.dtypes:
            for shape in ((K,), (1, 1, K), (3, 5, K), (0, K), (40, K)):
                x = torch.randn(shape).to(dtype)
                wanted = quant_matmul(x, packed.data, packed.scales, format, N, None, mode)
                assert torch.equal(bound(x), wanted) and bound(x).shape == wanted.shape
    with pytest.raises(ValueError, match="x has 255 columns, the weight 256"):
        bound(torch.randn(2, 255).to(bound.dtypes[0]))


def both(layer: QuantLinear, x: Tensor) -> Tensor:
    """The output without grad, which is that of the recorded product."""
    with torch.no_grad():
        quick = layer(x)
    assert torch.equal(quick, layer(x.clone().requires_grad_()).detach())
    return quick


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("bf16", torch.bfloat16), ("bf16", torch.float32), ("fp32", torch.float32),
     ("int8", torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("format", ["q4_0", "q6_k"])
def test_an_adapters_term_has_the_bits_of_the_recorded_one(
    format: str, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    quick = BoundProduct.with_term

    def counted(self: BoundProduct, x: Tensor, *term: Any) -> Tensor:
        taken.append(1)
        return quick(self, x, *term)

    monkeypatch.setattr(BoundProduct, "with_term", counted)
    for rank, shape in ((16, (1, 1, K)), (3, (K,)), (16, (3, 5, K)), (16, (0, K)), (8, (300, K))):
        layer, x = linear(format, activation), torch.randn(shape).to(dtype)
        add_lora(nn.ModuleDict({"layer": layer}), LoraConfig(r=rank, target_modules=["layer"]))
        assert layer.low_rank is not None
        nn.init.normal_(layer.low_rank.b.weight)
        both(layer, x)
        matching = layer.low_rank.a.weight.dtype == dtype
        assert len(taken) == matching
        factor = layer.low_rank.a.weight
        layer.low_rank.a.weight = nn.Parameter(factor.detach().T.contiguous().T)
        both(layer, x)  # whose rows are strided: the usual road
        assert len(taken) == matching
        taken.clear()
    product = linear(format, activation)._quick_product()
    assert product is not None
    x, a, b = torch.randn(2, K - 1), torch.randn(3, K - 1), torch.randn(N, 3)
    with pytest.raises(ValueError, match="x has 255 columns, the weight 256"):
        product.with_term(x, a, b, 1.0)


def test_what_is_bound_follows_the_layer() -> None:
    layer, x = linear(), torch.randn(2, K).bfloat16()
    first = both(layer, x)
    layer.activation = "int8"
    assert not torch.equal(both(layer, x), first)
    layer.activation = "bf16"
    assert torch.equal(both(layer, x), first)
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias += 1
    shifted = both(layer, x)
    assert not torch.equal(shifted, first)
    layer.bias = nn.Parameter(layer.bias.detach() - 1)
    assert not torch.equal(both(layer, x), shifted)
    torch.manual_seed(7)
    other = QuantLinear.from_linear(nn.Linear(K, N).bfloat16(), "q8_0")
    wanted = both(other, x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(both(layer, x), wanted)
    layer.weight_codes.data = linear().weight_codes.data.clone()
    assert not torch.equal(both(layer, x), wanted)
    layer.float()
    assert both(layer, x.float()).dtype == torch.float32
    layer.bias.data = torch.randn(2 * N).half()[::2]  # the same parameter, another kind
    assert both(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K)])
def test_outputs_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    layer, x = linear(), torch.randn(shape).bfloat16().requires_grad_()
    y = layer(x)
    y += 1
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K)])
def test_outputs_made_without_grad_may_be_changed_in_place_with_it(shape: tuple[int, ...]) -> None:
    layer, bias = linear(), torch.nn.Parameter(torch.zeros(N, dtype=torch.bfloat16))
    with torch.no_grad():
        y = layer(torch.randn(shape).bfloat16())
    y += bias
    y.sum().backward()
    assert bias.grad is not None and y.shape == (*shape[:-1], N)


def test_training_the_codes_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"QuantEmbedding \(q8_0\): the weight of a QuantLinear"):
        table().requires_grad_()
    assert not any(p.requires_grad for p in linear(bias=False).requires_grad_(False).parameters())


def test_a_tied_table_stays_tied_between_devices_of_different_layouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedding = table()
    head = QuantLinear.from_packed(embedding.packed_weight())
    head.weight_codes, head.weight_scales = embedding.weight_codes, embedding.weight_scales
    model, x = nn.ModuleDict({"embedding": embedding, "head": head}), torch.randn(2, K).bfloat16()
    rows, logits, codes = embedding(IDS), both(head, x), embedding.weight_codes.clone()

    def tied() -> bool:
        return all(getattr(embedding, part) is getattr(head, part) for part in PARTS)

    with monkeypatch.context() as patch:
        patch.setitem(layout.ROWS_PER_GROUP, "cpu", 1)  # as a GPU reads weights
        model.to("cpu")
        assert tied() and len(list(model.parameters())) == 2
        assert head.weight_codes.shape[0] == V != codes.shape[0]
    with torch.no_grad():
        torch.testing.assert_close(head(x), logits, rtol=2**-7, atol=1e-3)
    model.to("cpu")
    assert tied() and torch.equal(head.weight_codes, codes)
    assert torch.equal(embedding(IDS), rows) and torch.equal(both(head, x), logits)
    with torch.no_grad():
        quick = head._quick_product()
    assert quick is not None and torch.equal(quick(x), logits)


def test_copies_and_pickles_do_not_share_what_is_bound() -> None:
    layer, x = linear(), torch.randn(2, K).bfloat16()
    wanted = both(layer, x)
    assert "_bound" in layer.__dict__ and "_bound" not in layer.__getstate__()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(both(other, x), wanted)
        other.weight_codes.data.zero_()
        assert not torch.equal(both(other, x), wanted)
    assert torch.equal(both(layer, x), wanted)


def test_views_and_other_dtypes_take_the_usual_road() -> None:
    layer = linear()
    x = torch.randn(4, 2 * K).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x[:, ::2]), layer(x[:, ::2].contiguous()))
        assert torch.equal(layer(x[:, :K]), layer(x[:, :K].contiguous()))
        assert layer(x[:, :K].half()).dtype == torch.float16
        assert torch.equal(torch.vmap(layer)(x[:, :K]), layer(x[:, :K]))

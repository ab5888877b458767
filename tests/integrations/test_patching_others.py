"""Patched models in other hands: exported, traced, sharded, differentiated in other ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import inputs, tiny
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, vmap
from transformers import PreTrainedModel

import fastllm
from fastllm.integrations.transformers import mlp

TIGHT = 1e-5


def near(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max()) < TIGHT * float(wanted.abs().max())


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_an_exported_model_computes_what_the_patched_one_does() -> None:
    plain, model = tiny("llama"), tiny("llama")
    fastllm.patch(model)
    ids = inputs((20, 20))["input_ids"]
    exported = torch.export.export(Logits(model), (ids,)).module()
    other = ids.flip(1)
    assert near(exported(other), plain(input_ids=other).logits)


@torch.no_grad()
@pytest.mark.filterwarnings(  # of torch.jit itself, and a property of transformers that it reads
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
)
def test_a_trace_of_torch_jit_holds_no_result_of_its_example() -> None:
    plain, model = tiny("llama"), tiny("llama")
    fastllm.patch(model)
    ids = inputs((20, 20))["input_ids"]
    traced = torch.jit.trace(Logits(model), (ids,), check_trace=False)
    other = ids.flip(1)
    assert near(traced(other), plain(input_ids=other).logits)


class Int8Linear(nn.Linear):
    """Weights of another library: int8 with a scale for each row."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).T


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if type(module) is nn.Linear:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.__class__ = Int8Linear
            module.weight = nn.Parameter(codes, requires_grad=False)
            module.register_buffer("scale", scale)
    return model


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral"])
@torch.no_grad()
def test_layers_that_another_library_has_quantized_stay_and_the_rest_is_served(
    family: str,
) -> None:
    plain, model = quantized(tiny(family)), quantized(tiny(family))
    report = fastllm.patch(model)
    assert report.replaced("attention") and report.replaced("norm") and report.replaced("rope")
    (loss,) = (row for row in report.rows if row.part == "loss")
    assert not loss.replaced and "Int8Linear" in loss.reason
    batch = inputs((20, 14), padding="right")
    wanted, found = plain(**batch), model(**batch)
    valid = batch["attention_mask"].bool()
    assert near(found.logits[valid], wanted.logits[valid]) and near(found.loss, wanted.loss)


def per_sample_gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        given = {"labels": row[None], "use_cache": False}
        return functional_call(model, parameters, (row[None],), given).loss

    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    return found


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own
def test_torch_func_and_forward_mode_take_the_models_own_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlp, "_FROM", dict.fromkeys(mlp._FROM, (0, 0)))
    plain, model = (tiny("llama", attn_implementation="eager").train() for _ in range(2))
    assert fastllm.patch(model, strict=True)
    ids = inputs((12, 12))["input_ids"]
    wanted, found = per_sample_gradients(plain, ids), per_sample_gradients(model, ids)
    for name, gradient in wanted.items():
        assert gradient.shape[0] == 2 and near(found[name], gradient), name
    model.set_attn_implementation("eager")  # torch's own fused attention has no forward mode
    tangents = []
    for one in (plain, model):
        embedded = one.get_input_embeddings()(ids).detach()
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
            tangents.append(forward_ad.unpack_dual(one(inputs_embeds=dual).logits).tangent)
    assert near(tangents[1], tangents[0])


@pytest.mark.parametrize("op", ["attention", "experts", "norm", "mlp", "loss"])
def test_second_derivatives_are_refused_where_there_are_none(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "_FROM", dict.fromkeys(mlp._FROM, (0, 0)))
    family = "mixtral" if op == "experts" else "llama"
    model = tiny(family, attn_implementation="eager").train()
    fastllm.patch(model, ops=(op,))
    batch = inputs((12, 12))
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=batch["labels"]).loss
    with pytest.raises(RuntimeError, match=r"fastllm\.ops\.\w+"):
        torch.autograd.grad(loss, embedded, create_graph=True)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def test_a_patched_model_is_sharded_and_trained_by_fsdp(one_process: None) -> None:
    plain, model = tiny("llama"), tiny("llama")
    fastllm.patch(model)
    sharded(model)
    batch = inputs((20, 20))
    wanted, found = plain(**batch).loss, model(**batch).loss
    wanted.backward()
    found.backward()
    assert near(found, wanted)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        assert near(ours.grad.full_tensor(), theirs.grad)
    with pytest.raises(RuntimeError, match="wrapped by another library"):
        fastllm.unpatch(model)


def test_a_sharded_model_is_patched_as_far_as_its_parameters_allow(one_process: None) -> None:
    plain, model = tiny("llama"), sharded(tiny("llama"))
    report = fastllm.patch(model)
    assert report.replaced("attention") and report.replaced("norm")
    batch = inputs((20, 20))
    wanted = plain(**batch).loss
    assert near(model(**batch).loss, wanted)
    fastllm.unpatch(model)
    assert near(model(**batch).loss, wanted)

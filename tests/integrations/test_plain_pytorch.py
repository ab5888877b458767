"""fastllm.nn in plain PyTorch models: values, gradients, state, copies, compile, odd inputs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastllm
from fastllm import ops

BF16_ULP = 2.0**-8  # half a step of bfloat16, relative


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(found: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The design's bound: twice the peer's own error, or a step of the dtype at the largest value.

    found, reference: ours and torch's in one dtype; exact: float64.
    """
    assert found.dtype == reference.dtype and found.shape == reference.shape
    peer = (reference.double() - exact).abs().max()
    step = torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= max(2 * peer, step)


# RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "normalized", "eps", "affine"),
    [
        ((3, 5, 64), 64, None, True),
        ((2, 3, 4, 40), 40, 1e-5, True),
        ((7, 3, 8), (3, 8), 1e-6, True),
        ((1, 33), (33,), 1e-6, False),
        ((24,), 24, 1e-5, True),
        ((0, 16), 16, 1e-5, True),
    ],
)
def test_rms_norm_has_the_values_and_gradients_of_torch(
    shape: tuple[int, ...], normalized: Any, eps: float | None, affine: bool, dtype: torch.dtype
) -> None:
    ours = fastllm.nn.RMSNorm(normalized, eps, affine, dtype=dtype)
    torchs = nn.RMSNorm(normalized, eps, affine, dtype=dtype)
    exact = nn.RMSNorm(normalized, eps, affine, dtype=torch.float64)
    if eps is None:
        exact.eps = torch.finfo(torch.float32).eps
    if affine:
        with torch.no_grad():
            ours.weight.copy_(1 + 0.1 * randn(*ours.weight.shape, seed=3))
        assert torchs.load_state_dict(ours.state_dict())
        exact.load_state_dict(ours.state_dict())
    x, dy = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    results = []
    for norm, kind in ((ours, dtype), (torchs, dtype), (exact, torch.float64)):
        leaf = x.to(kind).requires_grad_()
        y = norm(leaf)
        wanted = [leaf, norm.weight] if affine else [leaf]
        results.append([y, *torch.autograd.grad(y, wanted, dy.to(kind))])
    if x.numel():
        for found, reference, right in zip(*results, strict=True):
            within(found, reference, right)


def test_rms_norm_is_torchs_in_everything_but_the_kernel() -> None:
    ours = fastllm.nn.RMSNorm(8, eps=1e-5, device="cpu", dtype=torch.bfloat16)
    assert isinstance(ours, nn.RMSNorm) and list(ours.state_dict()) == ["weight"]
    assert repr(ours) == repr(nn.RMSNorm(8, eps=1e-5)) and ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.weight, torch.ones(8, dtype=torch.bfloat16)) and ours.training
    assert fastllm.nn.RMSNorm(8, elementwise_affine=False).weight is None
    assert fastllm.nn.RMSNorm(8, device="meta").weight.is_meta
    # a float32 weight beside bfloat16 activations, as mixed models have it
    mixed = fastllm.nn.RMSNorm(8)(randn(3, 8, dtype=torch.bfloat16))
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_rms_norm_hands_other_dtypes_to_torch(dtype: torch.dtype) -> None:
    x = randn(3, 8, dtype=dtype)
    ours, torchs = fastllm.nn.RMSNorm(8, dtype=dtype), nn.RMSNorm(8, dtype=dtype)
    assert torch.equal(ours(x), torchs(x))


def test_rms_norm_takes_strided_inputs_and_refuses_wrong_ones() -> None:
    norm = fastllm.nn.RMSNorm(6, eps=1e-5)
    x = randn(6, 5).t()
    torch.testing.assert_close(norm(x), nn.RMSNorm(6, eps=1e-5)(x))
    with pytest.raises(ValueError, match=r"last sizes of x must be \[6\], got \[2, 5\]"):
        norm(randn(2, 5))


# MoE


def exact_moe(state: dict[str, Tensor], x: Tensor, k: int, renormalize: bool) -> Tensor:
    """A softmax-routed layer, expert by expert, in the dtype of the state."""
    scores = (x @ state["gate.weight"].T).softmax(-1)
    chosen = scores.topk(k, -1)
    gate = torch.zeros_like(scores).scatter(-1, chosen.indices, chosen.values)
    if renormalize:
        gate = gate / gate.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(scores.shape[-1]):
        a, b = (x @ state["experts.gate_up_proj"][e].T).chunk(2, -1)
        y = y + gate[..., e, None] * ((F.silu(a) * b) @ state["experts.down_proj"][e].T)
    if "shared_experts.gate_proj.weight" in state:
        a = x @ state["shared_experts.gate_proj.weight"].T
        b = x @ state["shared_experts.up_proj.weight"].T
        y = y + (F.silu(a) * b) @ state["shared_experts.down_proj.weight"].T
    return y


@pytest.mark.parametrize(("renormalize", "shared"), [(True, 0), (False, 24)])
def test_moe_has_the_values_and_gradients_of_a_loop_over_experts(
    renormalize: bool, shared: int
) -> None:
    torch.manual_seed(0)
    layer = fastllm.nn.MoE(16, 8, 5, 2, renormalize=renormalize, shared_intermediate=shared)
    names = list(layer.state_dict())
    assert names[:3] == ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    assert all(p.requires_grad for p in layer.parameters()) and len(names) == 3 + 3 * bool(shared)
    x, dy = randn(2, 7, 16, seed=1).requires_grad_(), randn(2, 7, 16, seed=2)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    state = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    exact = exact_moe(state, exact_x, 2, renormalize)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    for got, want in zip(
        found, torch.autograd.grad(exact, [exact_x, *state.values()], dy.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_moe_gives_router_logits_and_transformers_load_balancing_loss() -> None:
    load_balancing_loss_func = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral"
    ).load_balancing_loss_func
    torch.manual_seed(0)
    layer, x = fastllm.nn.MoE(16, 8, 6, 2), randn(3, 5, 16, seed=1)
    y, router = layer(x, return_router=True)
    assert torch.equal(y, layer(x)) and router.logits.shape == (15, 6)
    torch.testing.assert_close(router.logits, x.view(15, 16) @ layer.gate.weight.T)
    wanted = load_balancing_loss_func((router.logits,), num_experts=6, top_k=2)
    torch.testing.assert_close(router.load_balancing_loss, wanted)
    torch.testing.assert_close(router.z_loss, router.logits.logsumexp(-1).square().mean())
    (router.load_balancing_loss + router.z_loss).backward()
    assert layer.gate.weight.grad.abs().sum() > 0 and layer.experts.down_proj.grad is None


def test_moe_takes_mixtral_weights_of_transformers() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = mixtral.MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    layer, x = fastllm.nn.MoE(16, 8, 4, 2), randn(2, 5, 16, seed=1)
    layer.load_state_dict(block.state_dict())
    torch.testing.assert_close(layer(x), block(x), rtol=1e-4, atol=1e-5)


def test_moe_routes_as_deepseek_and_keeps_its_bias_in_the_state() -> None:
    torch.manual_seed(0)
    layer = fastllm.nn.MoE(
        16, 8, 8, 2, scoring="sigmoid", groups=4, kept_groups=2, group_score="top2", scale=2.5,
        bias_correction=True, dtype=torch.bfloat16,
    )  # fmt: skip
    x = randn(9, 16, dtype=torch.bfloat16)
    bias = layer.gate.e_score_correction_bias
    assert "gate.e_score_correction_bias" in layer.state_dict() and bias.dtype == torch.float32
    bias[5] = 10.0  # chosen by everyone, where its group is
    _, router = layer(x, return_router=True)
    assert bool((router.topk_ids == 5).any(1).all())
    assert layer(x).dtype == torch.bfloat16 and layer.gate.weight.dtype == torch.bfloat16


def test_moe_keeps_its_selection_bias_in_float32_when_it_is_cast() -> None:
    torch.manual_seed(0)
    layer = fastllm.nn.MoE(16, 8, 4, 2, scoring="sigmoid", bias_correction=True)
    bias = randn(4)
    layer.gate.e_score_correction_bias.copy_(bias)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.gate.e_score_correction_bias, bias)
    made = fastllm.nn.MoE(
        16, 8, 4, 2, scoring="sigmoid", bias_correction=True, dtype=torch.bfloat16
    )
    made.load_state_dict(layer.state_dict())
    x = randn(5, 16, dtype=torch.bfloat16)
    assert torch.equal(layer(x), made(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": 5}, r"top_k must be from 1 to num_experts \(4\), got 5"),
        ({"hidden": 0}, "hidden must be positive"),
        ({"shared_intermediate": -1}, "shared_intermediate must not be negative"),
        ({"scoring": "tanh"}, "scoring must be one of"),
        ({"groups": 3}, "groups must divide the 4 experts"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16"),
    ],
)
def test_moe_refuses_what_it_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastllm.nn.MoE(**{"hidden": 16, "intermediate": 8, "num_experts": 4, "top_k": 2, **given})


def test_moe_takes_no_tokens_and_refuses_other_widths_and_dtypes() -> None:
    layer = fastllm.nn.MoE(16, 8, 4, 2)
    y, router = layer(torch.zeros(2, 0, 16), return_router=True)
    assert y.shape == (2, 0, 16) and router.load_balancing_loss.item() == 0.0
    assert layer(randn(16)).shape == (16,)
    for x in (randn(3, 15), randn(3, 16, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"x must be torch.float32 of shape \[..., 16\]"):
            layer(x)


# LinearCrossEntropyLoss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "none"},
        {"ignore_index": 3, "softcap": 5.0, "z_loss": 1e-2},
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_cross_entropy_is_torchs_of_the_logits(
    options: dict[str, Any], biased: bool
) -> None:
    loss = fastllm.nn.LinearCrossEntropyLoss(**options)
    x, weight = randn(2, 9, 16).requires_grad_(), randn(40, 16, seed=1).requires_grad_()
    bias = randn(40, seed=2).requires_grad_() if biased else None
    target = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
    target[0, :4] = loss.ignore_index
    leaves = [t for t in (x, weight, bias) if t is not None]
    found = loss(x, weight, target, bias)
    z = F.linear(x, weight, bias)
    z = loss.softcap * torch.tanh(z / loss.softcap) if loss.softcap else z
    plain = nn.CrossEntropyLoss(
        ignore_index=loss.ignore_index, reduction="none", label_smoothing=loss.label_smoothing
    )(z.flatten(0, 1), target.flatten()).view(2, 9)
    counted = target != loss.ignore_index
    rows = plain + loss.z_loss * z.logsumexp(-1).square() * counted
    exact = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counted.sum()}[loss.reduction]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    g = torch.ones_like(exact)
    for got, want in zip(
        torch.autograd.grad(found, leaves, g), torch.autograd.grad(exact, leaves, g), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_says_what_is_wrong() -> None:
    made = fastllm.nn.LinearCrossEntropyLoss
    for options, message in (
        ({"reduction": "avg"}, "reduction 'avg' is not one of none, sum, mean"),
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
        ({"softcap": -1.0}, "softcap must be a finite number from 0"),
        ({"z_loss": float("nan")}, "z_loss must be a finite number from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)
    with pytest.raises(ValueError, match="outside the vocabulary of 4"):
        made()(randn(2, 8), randn(4, 8), torch.tensor([1, 4]))
    assert bool(made()(randn(2, 8), randn(4, 8), torch.full((2,), -100)).isnan())


# All of them


class Block(nn.Module):
    """A model that somebody else wrote, on our modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.norm = fastllm.nn.RMSNorm(32, eps=1e-5)
        self.qkv = nn.Linear(32, 96)
        self.moe = fastllm.nn.MoE(32, 16, 4, 2)
        self.loss = fastllm.nn.LinearCrossEntropyLoss()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = x + ops.sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.moe(x)
        return self.loss(x[:, :-1], self.embed.weight, ids[:, 1:])


def block() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block(), torch.randint(48, (2, 11), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_model_of_these_modules_trains() -> None:
    model, ids = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_model_of_these_modules_compiles_whole() -> None:
    model, ids = block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(ids)
    loss = compiled(ids)
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients(model, loss), gradients(model, eager), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_copies_pickles_and_loaded_states_are_the_same_model() -> None:
    model, ids = block()
    torch.manual_seed(1)
    loaded = Block()
    assert not torch.equal(loaded(ids), model(ids))
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(ids), model(ids))
        with torch.no_grad():
            other.moe.experts.down_proj.mul_(2)
        assert not torch.equal(other(ids), model(ids))  # nothing is shared or cached


def test_a_quantized_block_keeps_training_what_is_left() -> None:
    model, ids = block()
    model.qkv = fastllm.nn.QuantLinear.from_linear(model.qkv, "int8", activation="fp32")
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    loss = model(ids)
    assert torch.equal(again(ids), loss) and "qkv.weight_codes" in model.state_dict()
    torch.testing.assert_close(loss, block()[0](ids), rtol=2e-2, atol=2e-2)
    loss.backward()
    assert model.norm.weight.grad is not None and model.embed.weight.grad is not None


def test_layers_under_autocast_take_what_linears_give() -> None:
    torch.manual_seed(0)
    first, moe = nn.Linear(16, 16), fastllm.nn.MoE(16, 8, 4, 2)
    norm, loss = fastllm.nn.RMSNorm(16), fastllm.nn.LinearCrossEntropyLoss()
    head, ids, x = randn(20, 16), torch.tensor([3, 4, 5]), randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(norm(moe(first(x))), head, ids)
        assert loss(first(x), head, ids).dtype == torch.float32
    torch.testing.assert_close(found, loss(norm(moe(first(x))), head, ids), rtol=2e-2, atol=2e-2)
    found.backward()
    assert moe.experts.down_proj.grad.dtype == first.weight.grad.dtype == torch.float32


def test_moe_waits_for_its_weights_on_meta() -> None:
    with torch.device("meta"):
        layer = fastllm.nn.MoE(16, 8, 4, 2, bias_correction=True)
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    wanted = fastllm.nn.MoE(16, 8, 4, 2, bias_correction=True)
    layer.load_state_dict(wanted.state_dict())
    assert torch.equal(layer(randn(3, 16)), wanted(randn(3, 16)))

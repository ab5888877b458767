"""moe_gate: the routers of transformers; rows, threads and graphs; gradients; hostile input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastllm import _C
from fastllm.graph import capture
from fastllm.ops import Gate, moe_gate
from fastllm.ops.moe_gate import _moe_gate
from fastllm.ops.moe_gate_backward import moe_gate_backward
from fastllm.testing.infos.moe_gate import ROUTINGS, Routing, draw_logits
from fastllm.testing.opinfo import generator

V2 = {"scoring": "softmax", "groups": 4, "kept_groups": 2, "group_score": "max", "scale": 16.0}
V3: dict[str, Any] = {
    "scoring": "sigmoid",
    "groups": 4,
    "kept_groups": 2,
    "group_score": "top2",
    "renormalize": True,
    "scale": 2.5,
}


def _routers() -> dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]]:
    """Routers of transformers over 32 experts, 6 a token, and the options that do the same."""
    from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3
    from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
    from transformers.models.mixtral import configuration_mixtral, modeling_mixtral
    from transformers.models.olmoe import configuration_olmoe, modeling_olmoe
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    few: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_experts_per_tok": 6}
    groups = {"n_group": 4, "topk_group": 2}
    v2 = configuration_deepseek_v2.DeepseekV2Config(
        **few, **groups, n_routed_experts=32, routed_scaling_factor=16.0
    )
    v2.num_experts, v2.topk_method = 32, "group_limited_greedy"
    v3 = configuration_deepseek_v3.DeepseekV3Config(
        **few, **groups, n_routed_experts=32, routed_scaling_factor=2.5, norm_topk_prob=True
    )
    mixtral = configuration_mixtral.MixtralConfig(**few, num_local_experts=32)
    qwen = configuration_qwen3_moe.Qwen3MoeConfig(**few, num_experts=32, norm_topk_prob=True)
    olmoe = configuration_olmoe.OlmoeConfig(**few, num_experts=32, norm_topk_prob=False)
    gpt_oss = configuration_gpt_oss.GptOssConfig(**few, num_local_experts=32)
    return {
        "mixtral": (
            lambda: modeling_mixtral.MixtralTopKRouter(mixtral),
            {"renormalize": True},
        ),
        "qwen3_moe": (
            lambda: modeling_qwen3_moe.Qwen3MoeTopKRouter(qwen),
            {"renormalize": True},
        ),
        "olmoe": (lambda: modeling_olmoe.OlmoeTopKRouter(olmoe), {}),
        "gpt_oss": (
            lambda: modeling_gpt_oss.GptOssTopKRouter(gpt_oss),
            {"renormalize": True},
        ),
        "deepseek_v2": (lambda: modeling_deepseek_v2.DeepseekV2TopkRouter(v2), V2),
        "deepseek_v3": (lambda: modeling_deepseek_v3.DeepseekV3TopkRouter(v3), V3),
    }


NAMES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("name", NAMES)
def test_choices_weights_and_gradients_are_those_of_transformers(name: str) -> None:
    make, options = _routers()[name]
    router, g = make(), generator(3)
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor, std=0.3, generator=g)
    x = torch.randn(70, 24, generator=g)
    logits, weights, ids = router(x)
    bias = dict(router.named_buffers()).get("e_score_correction_bias")
    ours = logits.detach().clone().requires_grad_()
    gate = moe_gate(ours, 6, bias=bias, **options)
    order = ids.argsort(1)
    mine = gate.topk_ids.long().argsort(1)
    assert torch.equal(gate.topk_ids.long().gather(1, mine), ids.gather(1, order))
    theirs = weights.gather(1, order)
    torch.testing.assert_close(gate.topk_weights.gather(1, mine), theirs, rtol=1e-5, atol=1e-6)
    if not name.startswith("deepseek"):  # theirs are not sorted
        assert torch.equal(gate.topk_ids.long(), ids)
    d = torch.randn(70, 6, generator=g)
    want = torch.autograd.grad((theirs * d).sum(), router.weight)[0]
    (gate.topk_weights.gather(1, mine) * d).sum().backward()
    torch.testing.assert_close(ours.grad.T @ x, want, rtol=1e-4, atol=1e-5)


def _gate(routing: Routing, logits: Tensor, bias: Tensor | None, k: int) -> Gate:
    scoring, groups, kept_groups, group_score, renormalize, scale = routing.options
    return moe_gate(
        logits,
        k,
        scoring=scoring,
        bias=bias,
        groups=groups,
        kept_groups=kept_groups,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
    )


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.name)
def test_a_row_does_not_depend_on_others_nor_sums_on_threads(routing: Routing) -> None:
    logits, bias = draw_logits(generator(), routing, 1000, 64)
    for isa in _C.isas():
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = _gate(routing, logits, bias, 6)
        torch.set_num_threads(2)
        for _ in range(3):
            for a, b in zip(alone, _gate(routing, logits, bias, 6), strict=True):
                assert torch.equal(a, b), isa
        for rows in (slice(0, 1), slice(999, 1000), slice(31, 97)):
            part = _gate(routing, logits[rows], bias, 6)
            assert torch.equal(part.topk_ids, alone.topk_ids[rows])
            assert torch.equal(part.topk_weights, alone.topk_weights[rows])


@pytest.mark.parametrize("n_experts", [1, 3, 16, 17, 48, 512])
def test_equal_choices_go_to_the_lower_id(n_experts: int) -> None:
    for isa in _C.isas():
        _C.set_isa(isa)
        k = min(16, n_experts)
        logits = torch.zeros(3, n_experts)
        logits[1, ::2] = -0.0  # equal to 0
        want = torch.arange(k, dtype=torch.int32).expand(3, k)
        assert torch.equal(moe_gate(logits, k).topk_ids, want)
        bias = torch.full((n_experts,), 0.25)
        assert torch.equal(moe_gate(logits, k, scoring="sigmoid", bias=bias).topk_ids, want)


def test_barred_experts_are_chosen_only_where_others_run_out() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0], [0.0, -math.inf, 3.0, -math.inf]])
    gate = moe_gate(logits, 3, renormalize=True)
    assert gate.topk_ids.tolist() == [[3, 1, 0], [2, 0, 1]]
    assert gate.topk_weights[:, 2].tolist() == [0.0, 0.0]
    # Never one of a group that is left out, though its choice is greater.
    grouped = moe_gate(logits, 2, groups=2, kept_groups=1)
    assert grouped.topk_ids.tolist() == [[3, 2], [2, 3]]
    bias = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    assert moe_gate(torch.ones(1, 4), 3, bias=bias).topk_ids.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.name)
def test_every_routing_has_native_and_triton_rows(routing: Routing) -> None:
    logits, bias = draw_logits(generator(), routing, 5, 32)
    args = (logits, bias, 4, *routing.options)
    assert _moe_gate.select(args) is _moe_gate.tables["cpu"][0].fn
    gate = _moe_gate(*args)
    sums = gate[0], gate[3], gate[4]
    chosen = (logits, gate[1], *sums, routing.scoring, routing.renormalize, routing.scale)
    assert moe_gate_backward.select(chosen) is moe_gate_backward.tables["cpu"][0].fn
    for op in (_moe_gate, moe_gate_backward):
        assert [row.name for row in op.tables["cuda"] if not row.opt_in] == ["triton"]


def test_a_graph_replays_the_router_and_marks_bad_rows() -> None:
    logits = torch.randn(70, 32, generator=generator())
    with capture() as graph:
        gate = moe_gate(logits, 4, groups=4, kept_groups=2, renormalize=True)
    logits.copy_(torch.randn(70, 32, generator=generator(1)))
    logits[3] = -math.inf
    graph.replay()
    want = moe_gate(logits[4:], 4, groups=4, kept_groups=2, renormalize=True)
    assert torch.equal(gate.topk_ids[4:], want.topk_ids)
    assert torch.equal(gate.topk_weights[4:], want.topk_weights)
    assert gate.topk_ids[3].tolist() == [-1] * 4 and not gate.topk_weights[3].any()
    assert gate.counts.sum() == 69 * 4


def test_fake_tensors_and_compiled_code_see_shapes_alone() -> None:
    with FakeTensorMode():
        gate = moe_gate(torch.empty(9, 64, requires_grad=True), 8, bias=torch.empty(64))
        assert [tuple(t.shape) for t in gate] == [(9, 8), (9, 8), (64,), (64,), ()]
        assert gate.topk_weights.requires_grad and not gate.topk_ids.requires_grad
        (gate.topk_weights.sum() + gate.z_sum).backward()

    def step(logits: Tensor) -> Tensor:
        gate = moe_gate(logits, 8, **V3)
        return (gate.topk_weights * gate.topk_ids).sum() + gate.score_sum.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 40):
        logits = torch.randn(tokens, 64, generator=generator(), requires_grad=True)
        torch.testing.assert_close(compiled(logits), step(logits))
        got, want = (torch.autograd.grad(f(logits), logits)[0] for f in (compiled, step))
        torch.testing.assert_close(got, want)


def test_between_the_passes_logits_and_ids_are_kept() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits = torch.randn(50, 64, generator=generator(), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_gate(logits, 8, renormalize=True)
    assert sum(t.nbytes for t in kept) == 50 * (4 * 64 + 4 * 8)


def test_losses_of_the_sums_reach_the_logits() -> None:
    """The aux loss and the z-loss, against autograd of their plain definition in float64."""
    logits = torch.randn(60, 16, generator=generator(), requires_grad=True)
    gate = moe_gate(logits, 2)
    aux = 16 * (gate.counts / 120 * gate.score_sum / 60).sum()
    got = torch.autograd.grad(0.01 * aux + 0.001 * gate.z_sum / 60, logits)[0]
    exact = logits.detach().double().requires_grad_()
    p = exact.softmax(1)
    share = torch.bincount(p.topk(2).indices.flatten(), minlength=16) / 120
    plain = 0.01 * 16 * (share * p.mean(0)).sum()
    loss = plain + 0.001 * exact.logsumexp(1).square().mean()
    want = torch.autograd.grad(loss, exact)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-9)


def test_the_gradient_of_a_row_without_choice_is_zero() -> None:
    logits = torch.randn(8, 16, generator=generator())
    logits[2, 5], logits[6] = math.nan, -math.inf
    leaf = logits.requires_grad_()
    weights, _, _, score_sum, z_sum = _moe_gate(leaf, None, 3, "softmax", 1, 1, "max", True, 1.0)
    (weights.square().sum() + score_sum.square().sum() + z_sum).backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[2].any() and not leaf.grad[6].any() and leaf.grad[3].any()


BAD: dict[str, Callable[[], object]] = {
    r"logits must be float32 of shape \[T, E\].*out_dtype": lambda: moe_gate(
        torch.ones(2, 8).bfloat16(), 2
    ),
    r"logits must be float32 of shape": lambda: moe_gate(torch.ones(8), 2),
    r"k must be in \[1, 8\]": lambda: moe_gate(torch.ones(2, 8), 9),
    r"k must be in \[1, 8\] .* got 0": lambda: moe_gate(torch.ones(2, 8), 0),
    r"k must be at most 4, the experts of the kept groups": lambda: moe_gate(
        torch.ones(2, 8), 5, groups=4, kept_groups=2
    ),
    "groups must divide the 8 experts": lambda: moe_gate(torch.ones(2, 8), 2, groups=3),
    r"kept_groups must be in \[1, 2\]": lambda: moe_gate(
        torch.ones(2, 8), 2, groups=2, kept_groups=3
    ),
    "scoring must be one of": lambda: moe_gate(torch.ones(2, 8), 2, scoring="relu"),
    "group_score must be one of": lambda: moe_gate(torch.ones(2, 8), 2, group_score="sum"),
    "'top2' needs 2 experts a group": lambda: moe_gate(
        torch.ones(2, 8), 2, groups=8, kept_groups=4, group_score="top2"
    ),
    "scale must be a finite number": lambda: moe_gate(torch.ones(2, 8), 2, scale=math.nan),
    r"bias must be float32 of shape \[8\]": lambda: moe_gate(
        torch.ones(2, 8), 2, bias=torch.zeros(7)
    ),
    "bias must be float32 of shape": lambda: moe_gate(
        torch.ones(2, 8), 2, bias=torch.zeros(8, dtype=torch.float64)
    ),
    r"bias must not hold NaN or \+inf": lambda: moe_gate(
        torch.ones(2, 8), 2, bias=torch.full((8,), math.nan)
    ),
    "logits has no distribution in row 1": lambda: moe_gate(
        torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), 1
    ),
    "logits has no distribution in row 0": lambda: moe_gate(torch.full((3, 4), -math.inf), 1),
    r"logits has no distribution in row 2: it holds NaN or \+inf": lambda: moe_gate(
        torch.tensor([[1.0], [2.0], [math.inf]]), 1, scoring="sigmoid"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_the_native_door_checks_again() -> None:
    f, i = torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.int32)
    rest = (torch.zeros(8, dtype=torch.int32), torch.zeros(8), torch.zeros(()), None)
    options = (False, 1, 1, False, False, 1.0)
    weights = torch.zeros(3, 2)
    _C.moe_gate(weights, i, *rest, f, None, *options)
    with pytest.raises(ValueError, match="ids must be"):
        _C.moe_gate(weights, i[:2], *rest, f, None, *options)
    with pytest.raises(ValueError, match="groups must divide"):
        _C.moe_gate(weights, i, *rest, f, None, False, 3, 1, False, False, 1.0)
    with pytest.raises(ValueError, match="partial is too small"):
        long = torch.zeros(100, 8), i.new_zeros(100, 2), torch.zeros(100, 2)
        _C.moe_gate(long[2], long[1], *rest, long[0], None, *options)
    with pytest.raises(ValueError, match="d_z_sum"):
        _C.moe_gate_backward(f, f, i, weights, rest[1], rest[1], False, False, 1.0)


def test_torchs_default_dtype_changes_nothing() -> None:
    logits = torch.randn(64, 8, generator=generator()).requires_grad_()
    wanted = moe_gate(logits, 2)
    (slope,) = torch.autograd.grad(wanted.topk_weights[:, 0].sum() + wanted.z_sum, logits)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = moe_gate(logits, 2)
        (again,) = torch.autograd.grad(found.topk_weights[:, 0].sum() + found.z_sum, logits)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip((*wanted, slope), (*found, again), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype

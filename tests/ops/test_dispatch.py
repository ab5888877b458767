"""The three roads of a call (traced, eager with and without gradients) agree; opcheck of all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm import _C
from fastllm.ops.registry import OPS, Op, is_eager, is_transformed
from fastllm.testing.check import case_arguments, copies, results
from fastllm.testing.opinfo import Args, OpInfo, all_infos, generator, outputs

INFOS = all_infos()
DIFFERENTIABLE = sorted(name for name in INFOS if OPS[name].backward is not None)


def small_cases(info: OpInfo, count: int = 2) -> list[Args]:
    """The first non-empty cases of every dtype."""
    found = []
    for dtype in info.dtypes:
        full = (case_arguments(info, case) for case in info.cases(dtype) if not case.full)
        filled = (a for a in full if all(x.numel() for x in a[:1] if isinstance(x, Tensor)))
        found += list(itertools.islice(filled, count))
    return found


class Traced(TorchDispatchMode):
    """Any dispatch mode sends calls down the traced road."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def leaves(info: OpInfo, args: Args) -> tuple[list[Any], list[Tensor]]:
    fresh = list(copies(args))
    given = [i for i in info.grad_args if fresh[i] is not None]
    for i in given:
        fresh[i].requires_grad_()
    return fresh, [fresh[i] for i in given]


def gradients(result: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    floats = [t for t in outputs(result) if t.requires_grad]
    weights = [
        torch.randn(t.shape, generator=generator(i)).to(t.dtype) for i, t in enumerate(floats)
    ]
    return torch.autograd.grad(floats, inputs, weights, allow_unused=True)


@pytest.mark.parametrize("name", sorted(INFOS))
def test_values_are_the_same_on_the_traced_and_the_direct_road(name: str) -> None:
    op, info = OPS[name], INFOS[name]
    for args in small_cases(info):
        with torch.no_grad():
            direct = results(op, op, args)

            def traced(*a: Any) -> Any:
                with Traced() as mode:
                    result = op(*a)
                assert f"fastllm.{name}.default" in mode.names
                return result

            for a, b in zip(direct, results(op, traced, args), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_and_gradients_are_the_same_on_all_roads(name: str) -> None:
    op, info = OPS[name], INFOS[name]
    assert info.grad_args, "a differentiable op needs grad_args in its OpInfo"
    for args in small_cases(info):
        with torch.no_grad():
            direct = outputs(op(*copies(args)))
        eager_args, eager_leaves = leaves(info, args)
        eager = op(*eager_args)
        library_args, library_leaves = leaves(info, args)
        library = op.overload(*library_args)
        for a, b, c in zip(direct, outputs(eager), outputs(library), strict=True):
            assert not a.requires_grad
            assert torch.equal(a, b) and torch.equal(a, c)
        pairs = zip(gradients(eager, eager_leaves), gradients(library, library_leaves), strict=True)
        for a, b in pairs:
            assert a is not None and torch.equal(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_code_holds_the_op_and_its_gradients(name: str) -> None:
    op, info = OPS[name], INFOS[name]
    args = small_cases(info, 1)[0]
    eager_args, eager_leaves = leaves(info, args)
    want = op(*eager_args)
    compiled_args, compiled_leaves = leaves(info, args)
    torch.compiler.reset()  # every op compiles the same line, which may be compiled 8 times
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    got = compiled(*compiled_args)
    for a, b in zip(outputs(want), outputs(got), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(want, eager_leaves), gradients(got, compiled_leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(INFOS))
def test_opcheck(name: str) -> None:
    op, info = OPS[name], INFOS[name]
    for args in small_cases(info, 1):
        plain = list(copies(args))
        torch.library.opcheck(op.overload, tuple(plain))
        if info.grad_args and op.backward is not None:
            torch.library.opcheck(op.overload, tuple(leaves(info, args)[0]))


@pytest.fixture(scope="module")
def probe_op() -> Op:
    """An op without backward whose rows the tests below may change."""
    op = Op("dispatch_probe(Tensor x, float a) -> Tensor", lambda x, a: x * a)
    del OPS["dispatch_probe"]  # not an op of the package
    return op


def test_rows_are_chosen_in_order_and_by_what_they_declare(probe_op: Op) -> None:
    x = torch.ones(3)
    rows = probe_op.tables["cpu"]
    rows.clear()
    probe_op._rows.clear()
    assert probe_op.select((x, 2.0)) is probe_op.ref
    probe_op.impl("never", "cpu", opt_in=True)(lambda x, a: x - 1)
    half = probe_op.impl("half", "cpu", dtypes=(torch.bfloat16,))(lambda x, a: x - 2)
    long = probe_op.impl("long", "cpu", when=lambda x, a: len(x) > 3)(lambda x, a: x - 3)
    last = probe_op.impl("any", "cpu")(lambda x, a: x - 4)
    assert probe_op.select((x, 2.0)) is last
    assert probe_op.select((x.bfloat16(), 2.0)) is half
    assert probe_op.select((torch.ones(4), 2.0)) is long
    assert probe_op.select((x.double(), 2.0)) is probe_op.ref
    assert torch.equal(probe_op(torch.ones(4), 2.0), torch.full((4,), -2.0))


def test_an_op_without_backward_refuses_a_gradient(probe_op: Op) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"dispatch_probe has no backward.*no_grad"):
        probe_op(x, 2.0)
    with torch.no_grad():
        assert not probe_op(x, 2.0).requires_grad


def test_a_fake_tensor_takes_the_traced_road() -> None:
    with FakeTensorMode():
        x, w = torch.empty(2, 8), torch.empty(8)
    y = OPS["rms_norm"](x, w, 1e-5, None)
    assert isinstance(y, FakeTensor) and y.shape == (2, 8)


def test_vmap_gives_the_rows_of_the_direct_call() -> None:
    x, w = torch.randn(3, 8, generator=generator()), torch.ones(8)
    batched = torch.func.vmap(lambda row: OPS["rms_norm"](row, w, 1e-5, None))(x)
    assert torch.equal(batched, OPS["rms_norm"](x, w, 1e-5, None))


def test_forward_mode_is_refused_and_no_tangent_is_dropped() -> None:
    x, w = torch.randn(3, 8, generator=generator()), torch.ones(8)
    assert not is_transformed() and is_eager(x)
    with torch.no_grad(), forward_ad.dual_level():
        assert is_transformed() and not is_eager(x)
        with pytest.raises(NotImplementedError, match="forward mode"):
            OPS["rms_norm"](forward_ad.make_dual(x, torch.ones_like(x)), w, 1e-5, None)
        assert OPS["rms_norm"](x, w, 1e-5, None).shape == x.shape  # not a tangent in sight
    seen: list[bool] = []
    torch.func.vmap(lambda row: (seen.append(is_transformed()), row)[1])(x)
    assert seen == [True]


@pytest.mark.parametrize("name", sorted(INFOS))
def test_no_derivative_of_torch_func_is_silently_zero(name: str) -> None:
    args = small_cases(INFOS[name], 1)[0]
    floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    if not floats:  # nothing to differentiate with respect to
        return
    at = floats[0]
    x = args[at].float().requires_grad_(False)

    def call(x: Tensor) -> Tensor:
        return outputs(OPS[name](*args[:at], x, *args[at + 1 :]))[0].sum()

    for differentiate in (
        torch.func.grad(call),
        torch.func.jacfwd(call),
        torch.func.vmap(torch.func.grad(call), in_dims=0),
        lambda x: torch.func.vjp(call, x),
        lambda x: torch.func.jvp(call, (x,), (x,)),
        lambda x: torch.func.jvp(torch.func.vmap(call), (x,), (x,)),
    ):
        with pytest.raises(NotImplementedError, match=rf"fastllm.ops.{name} has .* under torch"):
            differentiate(x)


def test_what_torch_func_does_not_differentiate_runs() -> None:
    x, w = torch.randn(3, 8, generator=generator()), torch.ones(8)
    norm = OPS["rms_norm"]
    want = norm(x * 2, w, 1e-5, None)

    def constant(y: Tensor) -> Tensor:
        return (norm(x * 2, w, 1e-5, None) * y).sum()

    def undifferentiated(y: Tensor) -> Tensor:
        with torch.no_grad():
            return (norm(y * 2, w, 1e-5, None) * torch.ones_like(y)).sum() * 0

    assert torch.equal(torch.func.grad(constant)(x), want)
    assert torch.equal(torch.func.jvp(constant, (x,), (torch.ones_like(x),))[1], want.sum())
    assert not torch.func.grad(lambda y: y.sum() * 0 + undifferentiated(y))(x).any()
    assert torch.equal(torch.func.functionalize(lambda y: norm(y * 2, w, 1e-5, None))(x), want)


def test_every_isa_takes_the_same_road() -> None:
    x, w = torch.ones(1, 64), torch.ones(64)
    chosen = set()
    for isa in _C.isas():
        _C.set_isa(isa)
        chosen.add(OPS["rms_norm"].select((x, w, 1e-5, None)))
    assert len(chosen) == 1

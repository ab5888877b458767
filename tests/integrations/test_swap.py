"""A swapped module: another forward, everything else as it was, and back again."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm.integrations.transformers import swap as swapping
from fastllm.integrations.transformers.swap import (
    original,
    rebind,
    swap,
    swapped,
    unswap,
    with_globals,
)

FACTOR = 2.0


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * FACTOR


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x * FACTOR


def negative(self: Any, x: Tensor) -> Tensor:
    return -x * self.weight


def shifted(self: Any, x: Tensor) -> Tensor:
    return x + self.fastllm_shift


def test_a_swapped_module_computes_anew_under_its_old_name_and_parameters() -> None:
    module, other = Scale(), Scale()
    keys, parameters = list(module.state_dict()), [id(p) for p in module.parameters()]
    swap(module, "norm", negative)
    x = torch.ones(3)
    assert module(x).tolist() == [-1, -1, -1] and other(x).tolist() == [2, 2, 2]
    assert isinstance(module, Scale) and original(module) is Scale
    assert type(module).__name__ == "Scale" and type(module).__qualname__ == "Scale"
    assert type(module).__module__ == Scale.__module__
    assert list(module.state_dict()) == keys and [id(p) for p in module.parameters()] == parameters
    assert swapped(module) == ("norm",) and repr(module) == repr(other)
    assert unswap(module) and type(module) is Scale and not unswap(module)
    assert module(x).tolist() == [2, 2, 2] and swapped(module) == ()


def test_parts_nest_a_part_is_swapped_once_and_attributes_leave_with_it() -> None:
    module = Scale()
    before = dict(module.__dict__)
    swap(module, "norm", negative)
    swap(module, "rope", shifted, fastllm_shift=5.0)
    cls = type(module)
    swap(module, "norm", shifted)
    assert type(module) is cls and swapped(module) == ("norm", "rope")
    assert module(torch.zeros(3)).tolist() == [5, 5, 5]
    unswap(module)
    assert type(module) is Scale and module.__dict__ == before


def test_modules_of_one_class_share_the_class_made_for_them() -> None:
    first, second = Scale(), Scale()
    swap(first, "norm", negative)
    swap(second, "norm", negative)
    assert type(first) is type(second)


def test_an_attribute_that_the_module_has_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="Scale already has weight"):
        swap(Scale(), "norm", negative, weight=1)


def test_a_deep_copy_is_swapped_and_goes_back_on_its_own() -> None:
    module = nn.Sequential(Scale(), Scale())
    swap(module[0], "norm", shifted, fastllm_shift=1.0)
    copied, shallow = copy.deepcopy(module), copy.copy(module[0])
    x = torch.zeros(3)
    assert torch.equal(copied(x), module(x)) and swapped(copied[0]) == ("norm",)
    assert copied[0].weight is not module[0].weight and shallow.weight is module[0].weight
    assert swapped(shallow) == ("norm",)
    unswap(copied[0])
    assert swapped(module[0]) == ("norm",) and "fastllm_shift" not in copied[0].__dict__


def test_a_pickled_module_is_what_it_was_before_the_swap() -> None:
    module = nn.Sequential(Scale())
    with torch.no_grad():
        module[0].weight.mul_(3)
    swap(module[0], "norm", shifted, fastllm_shift=1.0)
    swap(module[0], "rope", negative)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for again in (pickle.loads(pickle.dumps(module)), loaded):
        assert type(again[0]) is Scale and "fastllm" not in str(again[0].__dict__)
        assert again(torch.ones(3)).tolist() == [6, 6, 6]
    assert b"fastllm" not in pickle.dumps(module)
    assert swapped(module[0]) == ("norm", "rope")


def test_a_class_made_from_ours_by_another_library_is_not_undone_silently() -> None:
    module = Scale()
    swap(module, "norm", negative)
    module.__class__ = type("Wrapped", (type(module),), {})  # as FSDP does
    assert swapped(module) == ("norm",)
    with pytest.raises(RuntimeError, match="wrapped by another library"):
        unswap(module)


def test_swaps_from_many_threads_make_one_class() -> None:
    modules = [Scale() for _ in range(32)]
    start = threading.Barrier(8)

    def work(mine: list[Scale]) -> None:
        start.wait()
        for module in mine:
            swap(module, "threads", negative)

    threads = [threading.Thread(target=work, args=(modules[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({type(module) for module in modules}) == 1
    assert sum(part == "threads" for _, part, _ in swapping._CLASSES) == 1


def test_rebind_changes_a_global_for_one_function_only() -> None:
    forward = rebind(Scale.forward, {"FACTOR": 10.0})
    module, other = Scale(), Scale()
    swap(module, "norm", forward)
    x = torch.ones(3)
    assert module(x).tolist() == [10, 10, 10] and other(x).tolist() == [2, 2, 2]
    assert forward.__qualname__ == Scale.forward.__qualname__
    assert forward.__module__ == Scale.forward.__module__


def test_a_compiled_module_sees_the_globals_of_its_rebound_forward() -> None:
    module = Scale()
    swap(module, "norm", rebind(Scale.forward, {"FACTOR": 10.0}))
    outer = nn.Sequential(module)
    compiled = torch.compile(outer, fullgraph=True, backend="eager")
    assert compiled(torch.ones(3)).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("forward", "name", "message"),
    [
        (Scale.forward, "FACTORY", "reads no global FACTORY"),
        (Scale.forward, "weight", "reads no global weight"),
        (Decorated.forward, "FACTOR", "no plain function"),
        (len, "FACTOR", "no plain function"),
    ],
)
def test_rebind_refuses_what_it_could_not_change(forward: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebind(forward, {name: 1})


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def multiplied_by(factor: float) -> Any:
    def multiplied(x: Tensor) -> Tensor:
        return factor * x

    return multiplied


def wrapping(base: Tensor) -> Any:
    """A forward with everything that a function can have: defaults, a closure, attributes."""

    @functools.wraps(Scale.forward)
    def forward(self: Scale, x: Tensor, plus: float = 1.0, *, times: float = 2.0) -> Tensor:
        return doubled(x + base) * times + plus

    forward.mark = "kept"  # type: ignore[attr-defined]
    return forward


def test_a_copy_with_other_globals_keeps_all_else_of_a_wrapped_function() -> None:
    function = wrapping(torch.ones(3))
    copied = with_globals(function, {"doubled": multiplied_by(10)})
    x = torch.ones(3)
    assert copied(None, x).tolist() == [41] * 3 and function(None, x).tolist() == [9] * 3
    for name in functools.WRAPPER_ASSIGNMENTS:
        assert getattr(copied, name) == getattr(function, name), name
    assert vars(copied) == vars(function) and copied.__wrapped__ is Scale.forward
    copied.mark = "changed"
    assert function.mark == "kept"


def test_a_compiled_module_sees_the_globals_of_a_copied_method() -> None:
    module = Scale()
    copied = with_globals(wrapping(torch.ones(3)), {"doubled": multiplied_by(10)})
    module.forward = types.MethodType(copied, module)  # type: ignore[method-assign]
    compiled = torch.compile(nn.Sequential(module), fullgraph=True, backend="eager")
    assert compiled(torch.ones(3)).tolist() == [41] * 3

"""Ops and modules look at their inputs alone: not at torch's default device, nor its default dtype.

Code of a model runs inside `with torch.device("meta")` while transformers builds it, and with a
default dtype of bfloat16 where its configuration says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm.nn import QuantLinear
from fastllm.nn.batch import Documents
from fastllm.ops.registry import OPS
from fastllm.quantize.packed import canonical, gguf_rows, quantize_weight
from fastllm.testing.check import case_arguments, copies, results
from fastllm.testing.opinfo import Args, OpInfo, all_infos, outputs

INFOS = all_infos()


@contextmanager
def other_defaults() -> Iterator[None]:
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(usual)


def same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(
        g.is_cpu and g.dtype == w.dtype and torch.equal(as_bytes(g), as_bytes(w))
        for g, w in zip(got, wanted, strict=True)
    )


def as_bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def gradients(info: OpInfo, args: Args) -> tuple[Tensor, ...]:
    leaves: list[Any] = list(copies(args))
    at = [i for i in info.grad_args if args[i] is not None]
    for i in at:
        leaves[i] = leaves[i].detach().requires_grad_()
    recorded = [y for y in outputs(OPS[info.name](*leaves)) if y.requires_grad]
    ones = [torch.ones_like(y) for y in recorded]
    return torch.autograd.grad(recorded, [leaves[i] for i in at], ones)


@pytest.mark.parametrize("name", INFOS)
def test_an_op_gives_the_same_bits_under_any_default_device_and_dtype(name: str) -> None:
    info, op = INFOS[name], OPS[name]
    cases = [(dtype, case) for dtype in info.dtypes for case in info.cases(dtype)]
    for dtype, case in cases:
        if case.full:
            continue
        args = case_arguments(info, case)
        for fn in (op, op.ref) if dtype is info.dtypes[0] else (op,):
            wanted = results(op, fn, args)
            with other_defaults():
                got = results(op, fn, args)
            assert same_bits(got, wanted), case.label
        if info.grad_args and case.gradients:
            wanted = gradients(info, args)
            with other_defaults():
                got = gradients(info, args)
            assert same_bits(got, wanted), f"gradients of {case.label}"


@pytest.mark.parametrize("format", ["q4_1", "nf4", "q6_k"])
def test_weights_are_packed_and_layers_run_where_their_inputs_are(format: str) -> None:
    torch.manual_seed(0)
    linear, x, matrix = nn.Linear(256, 37), torch.randn(3, 256), torch.randn(37, 256)

    def run() -> tuple[Tensor, ...]:
        layer = QuantLinear.from_linear(linear, format, "fp32")
        with torch.no_grad():
            bound = layer(x)
        packed = quantize_weight(matrix, format)
        blocks = () if format == "nf4" else (gguf_rows(packed),)
        documents = Documents.pack([[1, 2, 3], [4]])
        places = documents.ids, documents.positions, documents.cu_seqlens
        return bound, layer(x), *layer.state_dict().values(), *canonical(packed), *blocks, *places

    wanted = run()
    with other_defaults():
        got = run()
    assert same_bits(got, wanted)

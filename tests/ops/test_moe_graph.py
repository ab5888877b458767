"""Experts in a captured graph, whose choices are read at replay; experts packed and unpacked."""

from __future__ import annotations

import pytest
import torch

from fastllm import graph
from fastllm.ops import moe, quant_moe
from fastllm.ops.packed_layout import DENSE
from fastllm.quantize.packed_experts import PackedExperts, pack_experts, repack_, unpack
from fastllm.testing.moe_problem import MoeProblem, draw_ids
from fastllm.testing.opinfo import generator


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_replay_follows_other_choices(packed: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    layer = MoeProblem(tokens=5, hidden=64, inner=32, experts=9, k=3, base="float32").layer()
    first, second = pack_experts("f32", layer.gate_up), pack_experts("f32", layer.down)

    def step() -> torch.Tensor:
        if packed:
            return quant_moe(
                layer.x, first.parts, second.parts, 32, layer.topk_ids, layer.topk_weights,
                base=layer.base,
            )  # fmt: skip
        return moe(**layer.arguments)

    with graph.capture("cpu") as captured:
        y = step()
    assert captured.names() == ["moe_dispatch", "quant_moe" if packed else "moe"]
    g = generator(3)
    for load in ("uniform", "one", "holes", "zipf"):
        layer.topk_ids.copy_(draw_ids(g, 5, 9, 3, load))
        layer.x.copy_(torch.randn(layer.x.shape, generator=g))
        layer.topk_weights.copy_(torch.rand(layer.topk_weights.shape, generator=g))
        captured.replay()
        assert torch.equal(y, step()), load


@pytest.mark.parametrize("format", sorted(DENSE))
def test_packed_experts_keep_their_values(format: str) -> None:
    g = generator(4)
    rows = torch.randn(3, 21, 37, generator=g).to(DENSE[format])
    packed = pack_experts(format, rows)
    assert torch.equal(unpack(packed), rows.float())
    assert torch.equal(packed.expert(1).data, packed.data[1])
    other = torch.randn(3, 21, 37, generator=g).to(DENSE[format])
    repack_(packed, other)
    assert torch.equal(unpack(packed), other.float())


def test_packing_experts_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="three dimensions"):
        pack_experts("f32", torch.zeros(4, 4))
    with pytest.raises(ValueError, match="whole blocks"):
        pack_experts("q4_0", torch.zeros(2, 4, 17, dtype=torch.uint8))
    packed = PackedExperts(
        *pack_experts("q8_0", torch.zeros(2, 4, 34, dtype=torch.uint8)).parts, 4, 32
    )
    with pytest.raises(ValueError, match="rows must be"):
        repack_(packed, torch.zeros(3, 4, 32))
    with pytest.raises(ValueError, match="dense packs"):
        repack_(packed, torch.zeros(2, 4, 32))

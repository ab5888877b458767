"""Properties of linear: packed ahead or on the fly, alone or in a batch, the bits are the same."""

from __future__ import annotations

import pytest
import torch

from fastllm import _C
from fastllm.ops import embedding, linear, quant_matmul
from fastllm.ops.linear import reads_in_place
from fastllm.quantize.packed import pack
from fastllm.testing.opinfo import generator


@pytest.mark.parametrize("format", ["bf16", "f32"])
@pytest.mark.parametrize(("n", "k"), [(100, 576), (17, 31), (33, 1), (64, 600), (80, 544)])
def test_packed_on_the_fly_and_alone_give_the_same_bits(format: str, n: int, k: int) -> None:
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    x = torch.randn(30, k, generator=generator()).to(dtype)
    weight = torch.randn(n, k, generator=generator(1)).to(dtype)
    packed = pack(format, weight, n, k)
    for isa in _C.isas():
        _C.set_isa(isa)
        whole = linear(x, weight, None, torch.float32)
        for count in (1, 2, 3, 5, 6, 8, 9, 12, 13, 20):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                rows = x[4 : 4 + count]
                got = linear(rows, weight, None, torch.float32)
                ahead = quant_matmul(
                    rows, packed.data, packed.scales, format, n, None, "int8", torch.float32
                )
                assert torch.equal(got, whole[4 : 4 + count])
                assert torch.equal(ahead, got)


def test_what_is_read_in_place_is_known_beforehand() -> None:
    def weight(k: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        return torch.empty(48, k, dtype=dtype, device=device)

    for isa in _C.isas():
        _C.set_isa(isa)
        assert reads_in_place(weight(96, torch.bfloat16)) == (isa == "avx512_bf16")
        assert reads_in_place(weight(16, torch.float32)) == isa.startswith("avx512")
        for other in (
            weight(40, torch.bfloat16),  # 80 bytes a row
            weight(24, torch.float32),
            weight(96, torch.float16),
            weight(96, torch.float32, "meta"),
            weight(96, torch.float32)[0],
        ):
            assert not reads_in_place(other)


def test_bad_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    for arguments, name in [
        ((x.double(), weight), "x"),
        ((x, weight[:, :7]), "weight"),
        ((x, weight.bfloat16()), "weight"),
        ((x, weight, torch.zeros(3)), "bias"),
        ((x, weight, None, torch.float16), "out_dtype"),
    ]:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            linear(*arguments)


def test_ids_outside_the_table_raise() -> None:
    table = torch.zeros(7, 4)
    for ids in ([7], [0, -1], [1 << 40]):
        with pytest.raises(ValueError, match="ids"):
            embedding(torch.tensor(ids), table)
    with pytest.raises(ValueError, match="ids"):
        embedding(torch.zeros(2), table)


@pytest.mark.parametrize("shape", [(1, 3, 4), (37, 17, 9), (0, 5, 6), (7, 0, 5), (530, 64, 40)])
def test_weight_gradients_that_add_up_in_fp32_are_not_rounded(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    weight = torch.nn.Parameter(torch.randn(n, k).bfloat16())
    weight.grad_dtype = torch.float32
    exact = dy.double().T @ x.double()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weight.grad = None
        linear(x, weight).backward(dy)
        assert weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-5, atol=1e-4)
        found.append(weight.grad)
    assert torch.equal(*found)

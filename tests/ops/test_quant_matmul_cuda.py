"""The CUDA C++ row of quant_matmul on a GPU: right, batch-invariant, and replayable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_matmul import _quant_matmul, quant_matmul_ref
from fastllm.ops.quant_matmul_cuda import CUDA_FORMATS, fits_cuda
from fastllm.testing.packed_weights import random_packed

pytestmark = pytest.mark.gpu


def row() -> object:
    """The function of the table's row; skips where the extension was built without CUDA."""
    found = [r.fn for r in _quant_matmul.tables["cuda"] if r.name == "cuda"]
    if not found:
        pytest.skip("the extension was built without CUDA kernels (nvcc was not found)")
    return found[0]


def problem(format: str, m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, data and scales on the GPU."""
    g = torch.Generator().manual_seed(m + n + k)
    data, scales = random_packed(g, format, n, k, 1)
    x = torch.randn(m, k, generator=g).bfloat16()
    return x.cuda(), data.cuda(), scales.cuda()


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (8, 1000, 512), (17, 8200, 768), (32, 33, 8192)]
)
def test_few_tokens_are_right_alone_and_together(format: str, m: int, n: int, k: int) -> None:
    fn = row()
    x, data, scales = problem(format, m, n, k)
    assert fits_cuda(x, data, scales, format)
    bias = torch.randn(n, device="cuda")
    y = fn(x, data, scales, format, n, bias, "bf16", torch.float32)
    again = fn(x, data, scales, format, n, bias, "bf16", torch.float32)
    assert torch.equal(y, again)
    alone = fn(x[m - 1 :], data, scales, format, n, bias, "bf16", torch.float32)
    assert torch.equal(alone[0], y[m - 1])
    weight = layout.dequantize(data, scales, format, n, k).double()
    exact = x.double() @ weight.T + bias.double()
    peer = quant_matmul_ref(x, data, scales, format, n, bias, "bf16", torch.float32)
    bound = 2 * (peer - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (y - exact).abs().max() <= bound


def test_a_product_replays_in_a_graph() -> None:
    fn = row()
    x, data, scales = problem("int4_g128", 4, 512, 4096)
    fn(x, data, scales, "int4_g128", 512, None, "bf16", None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn(x, data, scales, "int4_g128", 512, None, "bf16", None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, fn(x, data, scales, "int4_g128", 512, None, "bf16", None))

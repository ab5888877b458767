"""Graph capture and replay: replays follow inputs, foreign computation raises, errors clean up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C, graph
from fastllm.ops import add_rms_norm, log_probs, rms_norm, sampling
from fastllm.ops.registry import NoImplementation
from fastllm.testing.infos.sampling import row_parameters
from fastllm.testing.opinfo import generator


def step(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = rms_norm(x, w)
    heads = rms_norm(y.view(3, 2, 32), w[:32])
    return add_rms_norm(heads.reshape(3, 64), x, w)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_replay_gives_the_bits_of_an_eager_run(threads: int) -> None:
    torch.set_num_threads(threads)
    g = generator()
    x, w = torch.randn(3, 64, generator=g), torch.randn(64, generator=g)
    with graph.capture("cpu") as captured:
        outputs = step(x, w)
    assert captured.names() == ["rms_norm"] * 3
    for _ in range(3):
        x.copy_(torch.randn(3, 64, generator=g))
        captured.replay()
        for got, want in zip(outputs, step(x, w), strict=True):
            assert torch.equal(got, want)


def test_the_capture_itself_computes() -> None:
    x, w = torch.randn(3, 64, generator=generator()), torch.ones(64)
    with graph.capture() as captured:
        y = rms_norm(x, w)
    assert torch.equal(y, rms_norm(x, w))
    assert captured.names() == ["rms_norm"]


def test_a_replay_reads_sampling_parameters_and_writes_counts() -> None:
    logits = torch.randn(2, 600, generator=generator(1))
    params = row_parameters(generator(2), 2, 600, penalized=True)
    with graph.capture() as captured:
        ids, logprob, _ = sampling(logits, *params)
        again = log_probs(logits, ids[:, None])
    for temperature, position in ((0.0, 5), (1.0, 6), (1.5, 7)):
        params[0].fill_(temperature)
        params[8].fill_(position)
        expected = [p.clone() for p in params]
        captured.replay()
        assert torch.equal(ids, sampling(logits, *expected)[0])
        assert torch.equal(params[10], expected[10])
        assert torch.equal(logprob, again[:, 0])


def test_the_graph_keeps_its_tensors_alive() -> None:
    x, w = torch.randn(3, 4096, generator=generator()), torch.ones(4096)
    with graph.capture() as captured:
        y = rms_norm(rms_norm(rms_norm(x, w), w), w)
    want = y.clone()
    del w
    junk = [torch.full((3, 4096), 7.0) for _ in range(50)]
    captured.replay()
    assert torch.equal(y, want)
    assert len(junk) == 50


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda x: x + 1, "aten.add.Tensor"),
        (lambda x: x.mul_(2), "aten.mul_"),
        (lambda x: x.t().contiguous(), "aten.clone"),
        (lambda x: x.t().reshape(-1), "aten.clone"),
        (lambda x: x.to(torch.bfloat16), "aten._to_copy"),
        (lambda x: x[0, 0].item(), "aten._local_scalar_dense"),
        (lambda x: x[torch.tensor([0])], "aten.index"),
        (lambda x: torch.zeros(3), "aten.zeros"),
        (lambda x: x.new_full((3,), 1.0), "aten.new_full"),
        (lambda x: x @ x.t(), "aten.mm"),
        (lambda x: torch.empty(3, 64).copy_(x), "aten.copy_"),
    ],
)
def test_a_foreign_op_is_named(compute: Callable[[Tensor], Any], named: str) -> None:
    x = torch.randn(3, 64, generator=generator())
    with pytest.raises(graph.CaptureError, match=named.replace(".", r"\.")), graph.capture():
        compute(x)


def test_views_and_allocations_are_allowed() -> None:
    x = torch.randn(6, 64, generator=generator())
    w = torch.ones(32)
    with graph.capture() as captured:
        buffer = torch.empty(6, 64)
        torch.empty_like(buffer)
        view = x[1:4].detach().unflatten(1, (2, 32)).transpose(0, 1).transpose(0, 1)
        first, _ = x.split(3)
        y = rms_norm(view, w)
        rms_norm(first.reshape(3, 2, 32).as_strided((3, 32), (64, 1)), w)
    assert captured.names() == ["rms_norm"] * 2
    assert torch.equal(y, rms_norm(x[1:4].reshape(3, 2, 32), w))


def test_the_reference_may_not_serve_a_capture() -> None:
    x = torch.randn(64, 3, generator=generator()).t()  # columns are not contiguous
    w = torch.ones(64)
    rms_norm(x, w)
    with (
        pytest.raises(NoImplementation, match=r"rms_norm.*float32\[3, 64\] strides \[1, 3\]"),
        graph.capture(),
    ):
        rms_norm(x, w)


def test_a_tensor_of_another_device_is_named() -> None:
    meta = torch.empty(3, 64, device="meta")
    with pytest.raises(graph.CaptureError, match="meta"), graph.capture("cpu"):
        rms_norm(meta, torch.empty(64, device="meta"))


def test_an_exception_ends_the_recording_and_the_graph_stays_empty() -> None:
    x, w = torch.randn(3, 64, generator=generator()), torch.ones(64)
    kept = None
    with pytest.raises(KeyError), graph.capture() as captured:
        kept = captured
        rms_norm(x, w)
        raise KeyError("from the block")
    assert not _C.recording()
    assert kept is not None
    with pytest.raises(graph.CaptureError, match="nothing to replay"):
        kept.replay()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    with graph.capture() as second:
        rms_norm(x, w)
    second.replay()


def test_captures_do_not_nest() -> None:
    with graph.capture() as outer:
        with pytest.raises(RuntimeError, match="already being captured"), graph.capture():
            raise AssertionError("the inner block must not run")
        assert _C.recording()
        rms_norm(torch.empty(3, 64), torch.empty(64))
    assert outer.names() == ["rms_norm"]


def test_an_empty_graph_replays() -> None:
    with graph.capture() as captured:
        pass
    captured.replay()
    assert captured.names() == []


def test_record_returns_the_result() -> None:
    x, w = torch.randn(3, 64, generator=generator()), torch.ones(64)
    captured, y = graph.record(lambda: rms_norm(x, w))
    x.mul_(-1)
    captured.replay()
    assert torch.equal(y, rms_norm(x, w))


def test_a_replay_makes_no_torch_dispatch() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    captured, _ = graph.record(lambda: step(torch.empty(3, 64), torch.empty(64)))
    with Count():
        captured.replay()
    assert Count.calls == 0


@pytest.mark.gpu
def test_a_cuda_graph_replays() -> None:
    x, w = torch.randn(3, 64, device="cuda"), torch.randn(64, device="cuda")
    captured, y = graph.record(lambda: rms_norm(x, w), "cuda")
    x.copy_(torch.randn(3, 64))
    captured.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, rms_norm(x, w))

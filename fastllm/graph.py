"""Capture the native calls of a step once, replay them with no Python and no torch dispatch.

    with fastllm.graph.capture("cpu") as graph:
        logits = model.decode(ids, positions)   # runs, and is recorded
    ids.copy_(next_ids)                          # static buffers are read at replay
    graph.replay()                               # logits now holds the new result

On the CPU the recorder sees fastllm's own calls only, so anything else that computes inside the
block would silently keep its old result at replay: it raises instead, naming the op. On CUDA this
is `torch.cuda.CUDAGraph`, which records whatever runs on the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import _C

# Allocations: they have no contents to go stale. Whatever fills memory (zeros, full, arange) is not
# among them.
_ALLOCATIONS = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"})


class CaptureError(RuntimeError):
    """Something in a captured block cannot be replayed."""


class Graph:
    """The recorded calls of one `capture()` block; made by `capture`, not directly."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorder: Any = None

    def replay(self) -> None:
        """Run the recorded calls again, on the same memory, in order.

        On the CPU this is one native call inside one parallel region; the GIL is released. On CUDA
        the launch is asynchronous, on the current stream. One graph must not be replayed by two
        threads at once.

        Raises:
            CaptureError: if the capture did not finish.
        """
        if self._recorder is None:
            raise CaptureError("nothing to replay: the `with` block of this graph did not finish")
        self._recorder.replay()

    def names(self) -> list[str]:
        """The recorded native calls in order; empty on CUDA, where the driver holds them."""
        return self._recorder.names() if isinstance(self._recorder, _C.Graph) else []


class _OnlyOurs(TorchDispatchMode):
    """Lets through fastllm's ops on one device, views and allocations; raises on any other op."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Skipping would import torch._dynamo: 890 modules, 70 MB and seconds at the first capture.
        # Nothing compiles inside a capture, so there is nothing to skip.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastllm":
            for arg in pytree.tree_leaves((args, kwargs)):
                if isinstance(arg, Tensor) and arg.device.type != self.device.type:
                    raise CaptureError(
                        f"{func}: a tensor is on {arg.device}, the graph capture on {self.device}"
                    )
        elif not (func.is_view or func._schema.name.removeprefix("aten::") in _ALLOCATIONS):
            raise CaptureError(
                f"{func} inside a graph capture would not run again at replay: compute it before "
                "the capture, write it into a static buffer between replays, or use an op of "
                "fastllm.ops"
            )
        return func(*args, **kwargs)


@contextmanager
def capture(device: str | torch.device = "cpu") -> Iterator[Graph]:
    """Record the fastllm ops that run in the `with` block; the block itself runs too (on the CPU).

    Shapes, and Python numbers given to ops, are fixed by the capture; tensor contents are read at
    replay. The graph keeps every tensor of the recorded calls alive. Gradients are off inside the
    block. On CUDA run the block once before (kernels compile and buffers are allocated on first
    use), or use `record`.

    Args:
        device: where the block runs, "cpu" or "cuda".

    Yields:
        The graph, to be replayed after the block.

    Raises:
        CaptureError: on an op that a replay would miss, naming it; the recording is discarded.
        RuntimeError: if a capture is already active on this thread.
    """
    where = torch.device(device)
    graph = Graph(where)
    if where.type == "cuda":
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(cuda_graph):
            yield graph
        graph._recorder = cuda_graph
        return
    recorder = _C.Graph()
    recorder.begin()
    try:
        with torch.no_grad(), _OnlyOurs(where):
            yield graph
    finally:
        recorder.end()
    graph._recorder = recorder


def record(
    run: Callable[[], Any], device: str | torch.device = "cpu", warmup: int = 1
) -> tuple[Graph, Any]:
    """Capture one call of `run`, after `warmup` calls on a side stream where the device is CUDA.

    Args:
        run: the step; reads and writes static buffers only.
        device: "cpu" or "cuda".
        warmup: calls before the capture on CUDA, so that nothing compiles or allocates for the
            first time in it.

    Returns:
        The graph and what `run` returned during the capture: its outputs are overwritten by each
        replay.
    """
    if torch.device(device).type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(warmup):
                run()
        torch.cuda.current_stream().wait_stream(side)
    with capture(device) as graph:
        result = run()
    return graph, result

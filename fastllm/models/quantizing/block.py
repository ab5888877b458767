"""One decoder layer on its own: filled from files, run over calibration rows, changed in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastllm.models.config import ModelConfig
from fastllm.models.decoder import DecoderLayer
from fastllm.models.expert_files import holds_experts
from fastllm.models.quantizing.stages import Stage
from fastllm.models.rope_scaling import rope_tables
from fastllm.models.weights import WeightSource
from fastllm.nn.batch import Documents
from fastllm.nn.linear import Linear
from fastllm.nn.moe import Experts
from fastllm.quantize.moments import Moments


class _Enough(Exception):
    """Ends a forward pass: what it was for has been seen."""


class Block:
    """A decoder layer whose weights are plain parameters in the compute dtype.

    dtype: what it computes in. What is quantized is read anew, in float32, from `source`.
    """

    def __init__(self, source: WeightSource, index: int, dtype: torch.dtype, length: int) -> None:
        config: ModelConfig = source.config
        self.source, self.index, self.dtype = source, index, dtype
        self.prefix = f"model.layers.{index}."
        self.layer = DecoderLayer(config, index, "bf16" if dtype == torch.bfloat16 else "fp32")
        self.shapes = {
            name.removeprefix(self.prefix): shape
            for name, shape in config.weight_shapes().items()
            if name.startswith(self.prefix)
        }
        self._tables = rope_tables(config, length)

    def fill(self) -> None:
        """Read every weight."""
        for name, shape in self.shapes.items():
            full = self.prefix + name
            if holds_experts(full):
                data = torch.empty(shape, dtype=self.dtype)
                for expert, matrix in enumerate(data):
                    matrix.copy_(self.source.get_expert(full, expert).to_float32())
            else:
                data = self.source.get(full).to_float32()
                data = data.to(self.dtype if len(shape) > 1 else torch.float32)
            self.set(name, data)
            self.source.release(full)

    def set(self, name: str, data: Tensor) -> None:
        """Put a weight in place: a matrix in the compute dtype, a vector in float32."""
        owner, _, attribute = name.rpartition(".")
        module = self.layer.get_submodule(owner)
        if attribute in module._buffers:  # a router's bias
            setattr(module, attribute, data)
        else:
            setattr(module, attribute, nn.Parameter(data, requires_grad=False))

    def get(self, name: str) -> Tensor:
        """A weight in place."""
        owner, _, attribute = name.rpartition(".")
        value: Tensor = getattr(self.layer.get_submodule(owner), attribute)
        return value

    def matrix(self, name: str) -> Tensor:
        """A linear layer's weight as the files have it, float32 [n, k].

        Raises:
            ValueError: if it holds NaN or infinity.
        """
        full = f"{self.prefix}{name}.weight"
        data = finite(self.source.get(full).to_float32(), full)
        self.source.release(full)
        return data

    def forward_(self, states: Tensor) -> None:
        """Take the residual stream [rows, length, hidden] through the layer, in place."""
        for row in states:
            row.copy_(self._forward(row))

    def moments(self, stages: Sequence[Stage], states: Tensor, *, gram: bool) -> list[Moments]:
        """What the inputs of the stages are like, over all rows."""
        found, handles = [], []
        for stage in stages:
            module = self.layer.get_submodule(stage.linears[0])
            assert isinstance(module, Linear), "stages name linear layers"
            seen = Moments(module.in_features, gram=gram)
            found.append(seen)
            last = stage is stages[-1]

            def see(_: nn.Module, inputs: tuple[Tensor, ...], seen: Moments = seen,
                    last: bool = last) -> None:  # fmt: skip
                seen.add(inputs[0])
                if last:
                    raise _Enough

            handles.append(module.register_forward_pre_hook(see))
        self._run(states, handles)
        return found

    def expert_inputs(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(x [tokens, hidden] in the compute dtype, ids [tokens, k]): what goes to which expert."""
        experts = self.layer.get_submodule("mlp.experts")
        assert isinstance(experts, Experts), "asked of a mixture"
        xs, ids = [], []

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            xs.append(inputs[0].clone())
            ids.append(inputs[1].clone())
            raise _Enough

        self._run(states, [experts.register_forward_pre_hook(see)])
        return torch.cat(xs), torch.cat(ids)

    def _run(self, states: Tensor, handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
        try:
            for row in states:
                try:
                    self._forward(row)
                except _Enough:
                    continue
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _forward(self, residual: Tensor) -> Tensor:
        length, norm = len(residual), self.layer.input_layernorm
        documents = Documents(
            ids=torch.zeros(length, dtype=torch.int32),
            positions=torch.arange(length, dtype=torch.int32),
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            max_seqlen=length,
        )
        x = norm(residual, self.dtype)
        # The norm after the layer is not its own; any will do, the sum before it is what counts.
        return self.layer.over_documents(x, residual, norm, documents, self._tables)[1]


def finite(values: Tensor, name: str) -> Tensor:
    """The values. Raises ValueError naming the weight if they hold NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinity: the model is broken and is not quantized")
    return values

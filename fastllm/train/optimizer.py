"""The optimizer under AdamW and Muon: float32 masters and moments, sharded parameters.

State of a parameter: `step` (0-dim, on the host), `exp_avg` and `exp_avg_sq` (AdamW) or `momentum`
(Muon), and `master` where the parameter is bfloat16; all but `step` float32, and sharded like the
parameter where FSDP2 made it a DTensor. Values of the groups are plain numbers, which is what
`torch.distributed.checkpoint` flattens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fastllm.ops.adamw import adamw_step_, as_scale
from fastllm.train.muon import orthogonalize, rate_factor

ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "muon": False,
}
MUON_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.95,
    "nesterov": True,
    "newton_schulz_steps": 5,
    "weight_decay": 0.0,
    "match_rms": True,
    "stacked": 1,  # matrices that lie one below the other in a parameter
    "muon": True,
}
_LEAST = {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "newton_schulz_steps": 1, "stacked": 1}
_SHARES = ("beta1", "beta2", "momentum")  # at least 0 and below 1
_DTYPES = (torch.float32, torch.bfloat16)


class MasterOptimizer(torch.optim.Optimizer):
    """Parameter groups that are each stepped by AdamW or, with `muon` true, by Muon.

    Args:
        groups: torch's parameter groups; a group's own values replace the defaults of its kind.

    Raises:
        ValueError: on a value out of range, a dtype that is not float32 or bfloat16, or a
            parameter of fewer than two dimensions in a Muon group.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        full = []
        for group in groups:
            kind = MUON_DEFAULTS if group.get("muon", False) else ADAMW_DEFAULTS
            full.append({**kind, **group})
        super().__init__(full, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises as the constructor does."""
        _check_values(param_group)
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in _DTYPES:
                raise ValueError(f"parameters must be float32 or bfloat16, got {p.dtype}")
            if self.param_groups[-1]["muon"] and p.ndim < 2:
                raise ValueError(
                    f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}: give it to "
                    "AdamW"
                )
            if p.ndim >= 2 and p.shape[-2] % self.param_groups[-1].get("stacked", 1):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} cannot be "
                    f"{self.param_groups[-1]['stacked']} stacked matrices"
                )

    def initialize_state(self) -> None:
        """Make the state of every parameter now: to load a checkpoint into, without a step."""
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self._state_of(p, group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: torch's: computes the loss again; its result is returned.
            grad_scale: multiplies every gradient first (one over the tokens, the clip
                coefficient); a 0-dim float32 tensor is not read on the host.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scales: dict[torch.device, Tensor | None] = {}
        for group in self.param_groups:
            update = _muon_step if group["muon"] else _adamw_step
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.device not in scales:
                    scales[p.device] = as_scale(grad_scale, p.device)
                state = self._state_of(p, group)
                state["step"] += 1
                update(p, p.grad, state, group, scales[p.device])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; masters and moments stay float32.

        Raises:
            ValueError: if groups, or the shapes of a parameter's state, do not fit.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            # torch has cast floating state to the parameter's dtype: take it from the source.
            for name, value in state_dict["state"].get(i, {}).items():
                if not isinstance(value, Tensor) or name == "step":
                    continue
                if value.shape != p.shape:
                    raise ValueError(
                        f"{name} of parameter {i} has shape {tuple(value.shape)}, "
                        f"the parameter has {tuple(p.shape)}"
                    )
                self.state[p][name] = value.to(device=p.device, dtype=torch.float32)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            names = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
            for name in names:
                state[name] = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype != torch.float32:
                state["master"] = p.detach().float()
        return state


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, or a DTensor's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _adamw_step(
    p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], scale: Tensor | None
) -> None:
    master = state.get("master")
    adamw_step_(
        local(p),
        None if master is None else local(master),
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        local(grad),
        lr=group["lr"],
        betas=(group["beta1"], group["beta2"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=int(state["step"]),
        grad_scale=scale,
    )


def _muon_step(
    p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], scale: Tensor | None
) -> None:
    g = local(grad).float()
    if scale is not None:
        g = g * scale
    momentum = local(state["momentum"])
    momentum.lerp_(g, 1 - group["momentum"])
    direction = g.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    steps, stacked = group["newton_schulz_steps"], group.get("stacked", 1)
    update = local(_orthogonalize_like(direction.bfloat16(), p, steps, stacked))
    weight = local(state["master"] if "master" in state else p)
    size = torch.Size((p.shape[-2] // stacked, p.shape[-1]))
    rate = group["lr"] * rate_factor(size, group["match_rms"])
    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
    if "master" in state:
        local(p).copy_(weight)


def _orthogonalize_like(direction: Tensor, p: Tensor, steps: int, stacked: int) -> Tensor:
    # The iteration needs whole matrices. Where a matrix is cut it is gathered, every process
    # computes the same, and keeps its own part; of a batch that is shared out matrix by matrix,
    # such as experts, each process does those that it has.
    if not isinstance(p, DTensor):
        return orthogonalize(direction, steps, stacked)
    mesh, placements = p.device_mesh, p.placements
    part = DTensor.from_local(
        direction, mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    wanted = [held if _leaves_whole(held, p.ndim) else Replicate() for held in placements]
    matrices = part.redistribute(placements=wanted)
    whole = orthogonalize(matrices.to_local(), steps, stacked).contiguous()
    done = DTensor.from_local(
        whole, mesh, wanted, run_check=False, shape=p.shape, stride=p.stride()
    )
    return done.redistribute(placements=placements)


def _leaves_whole(placement: Placement, ndim: int) -> bool:
    return isinstance(placement, Shard) and placement.dim < ndim - 2


def _check_values(group: dict[str, Any]) -> None:
    for name, least in _LEAST.items():
        if name in group and not group[name] >= least:
            raise ValueError(f"{name} must be at least {least}, got {group[name]}")
    for name in _SHARES:
        if name in group and not 0.0 <= group[name] < 1.0:
            raise ValueError(f"{name} must be at least 0 and below 1, got {group[name]}")

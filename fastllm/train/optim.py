"""Optimizers: AdamW, Muon, and which parameters of a model each of them takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastllm.models.trainable import accumulate_in_fp32
from fastllm.nn.embedding import Embedding
from fastllm.train.gradients import clip_grad_norm_, grad_norm
from fastllm.train.optimizer import MasterOptimizer

__all__ = [
    "AdamW",
    "MasterOptimizer",
    "Muon",
    "OptimConfig",
    "accumulate_in_fp32",
    "clip_grad_norm_",
    "grad_norm",
    "make_optimizer",
    "parameter_groups",
    "set_rates",
]

_EXPERTS = {"gate_up_proj": "gate_up", "down_proj": "down"}  # parameters of a layer's experts

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class AdamW(MasterOptimizer):
    """AdamW with float32 moments and, for bfloat16 parameters, float32 masters.

    Args:
        params: parameters, or groups of them whose values replace those given here.
        lr: learning rate.
        betas: decay of the means of the gradient and of its square.
        eps: added to the root of the mean square.
        weight_decay: decoupled: the weight shrinks by `lr * weight_decay` of itself each step.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        values = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps}
        super().__init__(_groups(params, values | {"weight_decay": weight_decay, "muon": False}))


class Muon(MasterOptimizer):
    """Muon: matrices step along the orthogonalized momentum of their gradients.

    Args:
        params: matrices `[M, N]`, or batches of them `[..., M, N]`, or groups.
        lr: learning rate.
        momentum: decay of the mean of the gradient.
        nesterov: look one step ahead.
        newton_schulz_steps: of the iteration.
        weight_decay: decoupled, as AdamW's.
        match_rms: scale the rate by `0.2 sqrt(max(M, N))`, so that AdamW's rates serve; else by
            `sqrt(max(1, M / N))`, for rates around 0.02.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        weight_decay: float = 0.0,
        match_rms: bool = True,
    ) -> None:
        values = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "newton_schulz_steps": newton_schulz_steps,
            "weight_decay": weight_decay,
            "match_rms": match_rms,
            "muon": True,
        }
        super().__init__(_groups(params, values))


def _groups(params: Params, values: dict[str, Any]) -> list[dict[str, Any]]:
    given = list(params)
    if given and isinstance(given[0], dict):
        return [{**values, **group} for group in given]  # type: ignore[dict-item]
    return [{**values, "params": given}]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How the parameters of a model are stepped.

    name: "adamw", or "muon": Muon for hidden matrices and AdamW for the rest.
    lr: of AdamW; also of Muon unless `muon_lr` is given (see `Muon.match_rms`).
    expert_rate: what the rate of experts is multiplied with.
    weight_decay: of matrices; embeddings, norms and biases do not decay.
    Raises ValueError if `betas` are not two.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_lr: float | None = None
    expert_rate: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    match_rms: bool = True

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, such as 0.9,0.95, got {self.betas}")
        if not 0 < self.expert_rate < math.inf:
            raise ValueError(f"expert_rate must be a number above 0, got {self.expert_rate}")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a model, each once, by what they are.

    Returns:
        "hidden": matrices inside the blocks; "down": those of experts, in batches; "gate_up":
        experts' gate and up in one tensor, one below the other; "head": matrices whose rows are
        classes: routers, scalar heads, and the LM head where it is not the embedding; "rest":
        embeddings, norms, biases.
    """
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, (Embedding, nn.Embedding))
        for p in module.parameters(recurse=False)
    }
    groups: dict[str, list[nn.Parameter]] = {
        "hidden": [],
        "gate_up": [],
        "down": [],
        "head": [],
        "rest": [],
    }
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or id(p) in embeddings:
            kind = "rest"
        elif name.endswith(("lm_head.weight", "score.weight", "mlp.gate.weight")):
            kind = "head"
        else:
            kind = _EXPERTS.get(name.rpartition(".")[2], "hidden") if p.ndim == 3 else "hidden"
        groups[kind].append(p)
    return groups


def make_optimizer(model: nn.Module, config: OptimConfig) -> MasterOptimizer:
    """The optimizer of a model's trained parameters.

    Each group carries `initial_lr`, so that schedules can scale all rates by one factor.

    Raises:
        ValueError: on an unknown name or values out of range, or if nothing is trained.
    """
    if config.name not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be 'adamw' or 'muon', got {config.name!r}")
    parts = parameter_groups(model)
    if not any(parts.values()):
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    adamw = {
        "lr": config.lr,
        "beta1": config.betas[0],
        "beta2": config.betas[1],
        "eps": config.eps,
        "muon": False,
    }
    muon = {
        "lr": config.lr if config.muon_lr is None else config.muon_lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "newton_schulz_steps": config.newton_schulz_steps,
        "match_rms": config.match_rms,
        "muon": True,
    }
    hidden = muon if config.name == "muon" else adamw
    expert = {**hidden, "lr": hidden["lr"] * config.expert_rate}
    two = {"stacked": 2} if config.name == "muon" else {}
    groups = [
        {"params": parts["hidden"], "weight_decay": config.weight_decay, **hidden},
        {"params": parts["gate_up"], "weight_decay": config.weight_decay, **expert, **two},
        {"params": parts["down"], "weight_decay": config.weight_decay, **expert},
        {"params": parts["head"], "weight_decay": config.weight_decay, **adamw},
        {"params": parts["rest"], "weight_decay": 0.0, **adamw},
    ]
    return MasterOptimizer(
        {**group, "initial_lr": group["lr"]} for group in groups if group["params"]
    )


class _Rated(Protocol):
    param_groups: list[dict[str, Any]]


def set_rates(optimizer: _Rated, factor: float) -> None:
    """Set every group's learning rate to `factor` times its initial one.

    The initial rate is `initial_lr`, or what the group had when it was first set.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

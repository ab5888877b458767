"""More than one process: the group that torchrun describes, sums over it, sharded parameters.

A run in one process never touches torch.distributed: sums return what they were given.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastllm.models.decoder import Decoder
from fastllm.models.loader import check_device
from fastllm.nn.moe import MoE
from fastllm.train.expert_parallel import ExpertGroup
from fastllm.train.locks import lock

_LETTING_GO = 0.2  # seconds


def rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str = "cpu") -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it started this one; gives this one's device.

    Tensors of a CPU are summed by gloo, of GPUs by NCCL; checkpoints always plan over gloo.
    Raises ValueError for a device that is not there.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "RANK" not in os.environ:
        yield check_device(device)
        return
    where = check_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if where.index >= torch.cuda.device_count():
            raise ValueError(
                f"process {where.index} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; start as many processes with --nproc-per-node"
            )
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield where
    finally:
        host_group.cache_clear()
        _host_mesh.cache_clear()
        dist.destroy_process_group()
        # gloo's threads let go of a collective's tensors a moment after its caller has gone on, and
        # need Python for it; a thread that finds the interpreter ending is killed, and with it the
        # process ("terminate called without an active exception", github.com/pytorch/pytorch/pull/
        # 179291). Models keep their group, so destroying it does not wait for the threads.
        time.sleep(_LETTING_GO)


@functools.cache
def host_group() -> Any:
    """A gloo group of all processes for the checkpoint thread alone; None without processes.

    Collectives of two threads in one group would meet in an order that differs between processes.
    Every process must make the first call at the same point.
    """
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second run writes into it; death lets it go.

    Raises BlockingIOError if another process of this machine holds it.
    """
    if rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        lock(file, "another run is writing into this folder; give another (--out)", folder)
        yield


def sum_(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any, group: Any = None) -> list[Any]:
    """One picklable value of each process, in order, on every process."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=group)
    return found


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Write all of a tensor that may be sharded; every process gives the same values."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def shard(model: Decoder, expert_parallel: int = 1) -> Decoder:
    """Divide a model's parameters among all processes (FSDP2), in place; one process: nothing.

    Each attention and each feed-forward is gathered for its turn; embedding, norms and LM head stay
    whole within a step. Gradients are summed, not averaged: the loop divides by the tokens of all
    processes. bfloat16 parameters become float32 ones, which blocks read as bfloat16: each process
    holds its part of the masters, and no bfloat16 copy beside them. Packed weights are no
    parameters: each process holds all of a quantized base, and a part of the adapters.

    expert_parallel: so many processes in a row share out the experts of each layer, see
        `expert_parallel.ExpertGroup`; an expert is then gathered among those alone that hold it.

    Raises:
        ValueError: if processes or experts are no multiple of `expert_parallel`, or the rows of
            an expert of the processes that share it.
    """
    _check_expert_parallel(model, expert_parallel)
    if world() == 1:
        return model
    mesh = init_device_mesh(model.device.type, (world(),), mesh_dim_names=("shard",))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    policy = MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Outputs of linears are views; nothing writes into them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if expert_parallel > 1:
        share_out_experts(model, expert_parallel, policy)
    for layer in model.model.layers:
        fully_shard(layer.self_attn, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(layer.self_attn, "over_documents")
        fully_shard(layer.mlp, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("loss", "log_probs", "with_head"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    for parameter in model.parameters():
        parameter.is_master = model.dtype != torch.float32  # type: ignore[attr-defined]
    return model


def _check_expert_parallel(model: Decoder, size: int) -> None:
    experts = model.config.experts
    if size == 1:
        return
    if experts is None:
        raise ValueError("expert_parallel is for models with experts: this one has none")
    if world() % size:
        raise ValueError(
            f"expert_parallel {size} does not divide the {world()} processes that there are "
            "(torchrun --nproc-per-node)"
        )
    if experts.num_experts % size:
        raise ValueError(
            f"expert_parallel {size} does not divide the {experts.num_experts} experts of a layer"
        )
    holders = world() // size
    for what, rows in (
        ("hidden_size", model.config.hidden_size),
        ("2 * moe_intermediate_size", 2 * experts.moe_intermediate_size),
    ):
        if rows % holders:
            raise ValueError(
                f"expert_parallel {size} leaves {holders} processes to share each expert, and "
                f"{what} {rows} is no multiple of {holders}"
            )


def share_out_experts(model: Decoder, size: int, policy: MixedPrecisionPolicy) -> None:
    """Leave each process its slice of every layer's experts, sharded among those that hold it."""
    shape = (world() // size, size)
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=("shard", "expert"))
    group = ExpertGroup(mesh.get_group("expert"))
    for layer in model.model.layers:
        if not isinstance(layer.mlp, MoE):
            continue
        experts = layer.mlp.experts
        experts.count //= size
        experts.first = group.rank * experts.count
        for name, whole in list(experts.named_parameters()):
            own = whole.detach()[experts.first : experts.first + experts.count].clone()
            part = DTensor.from_local(own, mesh["expert"], [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        # Rows of an expert, not experts, are what its holders share: dimension 0 is taken.
        fully_shard(
            experts, mesh=mesh["shard"], mp_policy=policy, shard_placement_fn=lambda _: Shard(1)
        )
        layer.mlp.exchange = group


def expert_group(model: Decoder) -> ExpertGroup | None:
    """The processes that share out the experts of a model; None: each has all of them."""
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE) and isinstance(layer.mlp.exchange, ExpertGroup):
            return layer.mlp.exchange
    return None


def host_mesh_like(mesh: DeviceMesh) -> DeviceMesh:
    """The same processes in the same arrangement, for tensors in host memory."""
    if mesh.device_type == "cpu":
        return mesh
    return _host_mesh(tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh.shape))


@functools.cache
def _host_mesh(ranks: tuple[int, ...], shape: tuple[int, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(ranks).view(shape))


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_master(parameter: Tensor) -> bool:
    """Whether a sharded parameter holds float32 values that blocks read as bfloat16."""
    return getattr(parameter, "is_master", False)

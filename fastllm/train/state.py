"""What a checkpoint holds beside the weights: optimizer and random states, as named tensors.

Everything that is not a tensor becomes one (bytes) or goes to JSON, so nothing is ever pickled to a
file. Sharded tensors stay sharded: `torch.distributed.checkpoint` writes every process's part
through its safetensors storage and reads the parts that another number of processes needs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fastllm.train import distributed

FILE_BYTES = 1 << 30  # of a file of state: its bytes are in memory twice while it is written


def optimizer_state(model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by `optim.PARAMETER.KEY`, numbers by parameter and key) of an optimizer.

    The tensors are the live ones. A parameter that is its own float32 master while blocks read it
    as bfloat16 (sharded training) counts as `master`, so that one process reads it as such.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    named = dict(model.named_parameters())
    if not set(optimizer.state) <= set(named.values()):
        raise RuntimeError("the optimizer holds parameters that the model does not have (any more)")
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                tensors[f"optim.{name}.{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = (
                    float(value) if isinstance(value, float) else int(value)
                )
        if distributed.is_master(parameter) and parameter in optimizer.state:
            tensors[f"optim.{name}.master"] = parameter
    return tensors, numbers


def load_optimizer_state(
    model: nn.Module, optimizer: Any, directory: Path, numbers: Mapping[str, Any]
) -> None:
    """Put the state that `optimizer_state` gave back, onto any number of processes.

    Raises ValueError naming a tensor that is missing or has another shape or dtype.
    """
    optimizer.initialize_state()
    tensors, _ = optimizer_state(model, optimizer)
    named = dict(model.named_parameters())
    untouched = {f"optim.{name}." for name, p in named.items() if name not in numbers}
    load_into({k: v for k, v in tensors.items() if not k.startswith(tuple(untouched))}, directory)
    for name, values in numbers.items():
        for key, value in values.items():
            state = optimizer.state[named[name]]
            if isinstance(state.get(key), Tensor):
                state[key].fill_(value)
            else:
                state[key] = value


def seed_all(seed: int) -> None:
    """Seed every generator of this process: torch's, Python's, NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def random_state() -> dict[str, Tensor]:
    """Every generator's state of this process, as bytes by `rng.KIND.RANK`."""
    rank = distributed.rank()
    python = json.dumps(random.getstate()).encode()
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = json.dumps([name, np.asarray(keys).tolist(), *rest]).encode()
    state = {
        f"rng.cpu.{rank}": torch.get_rng_state(),
        f"rng.python.{rank}": torch.frombuffer(bytearray(python), dtype=torch.uint8),
        f"rng.numpy.{rank}": torch.frombuffer(bytearray(numpy), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        state[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def load_random_state(directory: Path) -> None:
    """Set every generator of this process to what `random_state` gave."""
    rank = distributed.rank()
    names = {k: v for k, v in _stored(directory).items() if k.startswith("rng.")}
    found = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in names.items()
        if name.endswith(f".{rank}")
    }
    load_into(found, directory)
    restore_random_state({name.split(".")[1]: value for name, value in found.items()})


def restore_random_state(states: Mapping[str, Tensor]) -> None:
    """Set the generators by kind: cpu, cuda, python, numpy."""
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
        elif kind == "python":
            version, keys, gauss = json.loads(state.numpy().tobytes())
            random.setstate((version, tuple(keys), gauss))
        elif kind == "numpy":
            name, keys, *rest = json.loads(state.numpy().tobytes())
            np.random.set_state((name, np.array(keys, np.uint32), *rest))


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """What runs inside leaves every generator as it found it."""
    states = {name.split(".")[1]: value for name, value in random_state().items()}
    try:
        yield
    finally:
        restore_random_state(states)


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; a sharded tensor's copy is sharded too."""
    if isinstance(tensor, DTensor):
        part = tensor.to_local().detach().to("cpu", copy=True)
        mesh = distributed.host_mesh_like(tensor.device_mesh)
        return DTensor.from_local(
            part, mesh, tensor.placements, run_check=False,
            shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_sharded(tensors: Mapping[str, Tensor], directory: Path, group: Any) -> list[str]:
    """Write every process's part of `tensors`, host memory, as safetensors; returns its files.

    All processes must call it. The files are flushed to disk. Raises OSError.
    """
    planner = DefaultSavePlanner()
    writer = HuggingFaceStorageWriter(
        str(directory), fqn_to_index_mapping=_files(tensors), save_distributed=True
    )
    rank = distributed.rank()
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    writer.set_up_storage_writer(rank == 0)
    own = writer.prepare_local_plan(planner.create_local_plan())
    # Every process makes the same global plan from the same local ones: nothing is sent back.
    plans, _ = planner.create_global_plan(distributed.gather(own, group))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[rank])
    results = writer.write_data(plan, planner).wait()
    return sorted({result.storage_data.relative_path for result in results})


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file, from 1, each tensor goes to."""
    number, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        part = distributed.local(tensor)
        nbytes = part.numel() * part.element_size()
        if size and size + nbytes > FILE_BYTES:
            number, size = number + 1, 0
        size += nbytes
        files[name] = number
    return files


def load_into(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill tensors, sharded or not, from the safetensors files of a directory, by name.

    Raises ValueError naming a tensor that is missing or has another shape.
    """
    if not tensors:
        return
    reader, planner = HuggingFaceStorageReader(str(directory)), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    stored = _described(metadata)
    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"{directory} holds no tensor {name}")
        found, wanted = stored[name], (tensor.shape, tensor.dtype)
        if found != wanted:
            raise ValueError(
                f"{directory}: {name} is {list(found[0])} {found[1]}, here it is "
                f"{list(wanted[0])} {wanted[1]}"
            )
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    with torch.no_grad():
        reader.read_data(planner.finish_plan(plan), planner).wait()


def _stored(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a directory of safetensors files."""
    return _described(HuggingFaceStorageReader(str(directory)).read_metadata())


def _described(metadata: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {
        name: (m.size, m.properties.dtype)
        for name, m in metadata.state_dict_metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }

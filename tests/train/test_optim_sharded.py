"""Optimizers on FSDP2's sharded parameters: two processes step as one does."""

from __future__ import annotations

from typing import Any

import pytest

# Each process trains the same model on the same gradients, once sharded and once whole.
PROGRAM = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, StateDictOptions
from torch.distributed.fsdp import fully_shard
from fastllm.train.optim import OptimConfig, clip_grad_norm_, make_optimizer
from fastllm.train.optimizer import local

torch.set_num_threads(1)
dist.init_process_group("gloo")

def model():
    torch.manual_seed(0)
    # 7 and 5 rows: shards of different sizes
    return nn.Sequential(nn.Linear(6, 7), nn.RMSNorm(7), nn.Linear(7, 5, bias=False)).bfloat16()

def step(net, optimizer, i):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).bfloat16()
    (net(x).float() ** 2).sum().backward()
    scale = torch.tensor(0.5)
    norm = clip_grad_norm_(net.parameters(), 0.3, scale)
    optimizer.step(grad_scale=scale)
    optimizer.zero_grad()
    return norm

def compare(name):
    whole, sharded = model(), model()
    fully_shard(sharded)
    config = OptimConfig(name=name, lr=0.01, weight_decay=0.1)
    a, b = make_optimizer(whole, config), make_optimizer(sharded, config)
    b.initialize_state()
    for i in range(4):
        norms = step(whole, a, i), step(sharded, b, i)
        torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
        assert norms[0] > 0.3, "the clip must bind"
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        for key, value in b.state[q].items():
            if key != "step":
                assert value.placements == q.placements and value.dtype == torch.float32, key
                want = a.state[p][key]
                torch.testing.assert_close(value.full_tensor(), want, rtol=2e-3, atol=1e-5)
        assert torch.equal(local(q), local(b.state[q]["master"]).bfloat16())
    state = get_optimizer_state_dict(
        sharded, b, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    assert "state.0.weight.master" in state, list(state)
    before = {k: v.full_tensor().clone() for k, v in state.items() if k.endswith("master")}
    assert len(before) == 4

for name in ("adamw", "muon"):
    compare(name)
if dist.get_rank() == 0:
    print("equal")
dist.destroy_process_group()
"""


@pytest.mark.full
def test_two_processes_step_as_one_with_adamw_and_with_muon(group: Any) -> None:
    assert group(PROGRAM)[0] == "equal\n"

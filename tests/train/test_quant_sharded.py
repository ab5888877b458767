"""Two processes with gloo: adapters on quantized weights, sharded by FSDP2, step as in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

# Each process: three steps of a quantized model of torch layers with PEFT's adapters, and of one
# of fastllm's own, sharded and alone. Both processes have the same batch: gradients are averaged.
STEPS = """
import copy, warnings
import peft, torch, transformers
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import fastllm
from fastllm.nn import QuantLinear
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.testing.quantized_models import decoder
from fastllm.testing.small_models import batch_of, random_documents
from fastllm.train import distributed

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)
transformers.logging.set_verbosity_error()


def run(model, loss):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


with distributed.process_group():
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    fastllm.quantize_model(model, "q4_1")
    alone = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    sharded = copy.deepcopy(alone)
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.randint(0, 96, (2, 24))
    losses = [run(m, lambda m: m(ids, labels=ids).loss) for m in (alone, sharded)]
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    one, both = (dict(m.named_parameters()) for m in (alone, sharded))
    assert one.keys() == both.keys()
    for name, p in both.items():
        assert isinstance(p, DTensor), name
        torch.testing.assert_close(p.full_tensor(), one[name], rtol=1e-4, atol=1e-4)
    codes = [p for name, p in both.items() if name.endswith("weight_codes")]
    assert len(codes) == 14 and all(p.to_local().shape[0] * 2 == p.shape[0] for p in codes)
    base = sharded.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(base, QuantLinear) and base.weight.shape == (128, 64)
    try:
        base.weight.dequantize()
    except RuntimeError as error:
        assert "sharded among processes" in str(error)
    else:
        raise AssertionError("a part of the weight was shown as all of it")
    saved = sharded.state_dict()
    assert all(isinstance(saved[name], DTensor) for name in both)
    sharded.load_state_dict(saved)

    documents = batch_of(random_documents((9, 12)))
    found = []
    for shard in (False, True):
        model = decoder("llama", torch.float32)
        fastllm.quantize_model(model, "q4_1")
        add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
        model = distributed.shard(model) if shard else model
        halves = 2 if shard else 1  # gradients are summed: both processes have the same documents
        found.append(run(model, lambda m: m.loss(*documents, "mean") / halves))
    assert found[0][2] < found[0][0]
    torch.testing.assert_close([2 * x for x in found[1]], found[0], rtol=1e-4, atol=0)
"""


def test_sharded_adapters_on_quantized_weights_step_as_in_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]

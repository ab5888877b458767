"""Two processes with gloo: sharded parameters, sums, checkpoints that change hands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines for key in ("loss", "norm", "eval_loss") if key in line]


@pytest.mark.parametrize(
    ("dtype", "name", "tolerance"),
    [
        ("float32", "adamw", 1e-4),
        # Gradients of each process are rounded to bfloat16 before they are added.
        ("bfloat16", "adamw", 2e-2),
        # Newton-Schulz runs in bfloat16: a last bit of the gradient can become one of the step.
        pytest.param("float32", "muon", 2e-3, marks=pytest.mark.full),
        pytest.param("bfloat16", "muon", 2e-2, marks=pytest.mark.full),
    ],
)
def test_two_processes_train_as_one_and_checkpoints_go_from_2_to_1_to_2(
    dtype: str, name: str, tolerance: float, tiny: Any, runner: Any, tmp_path: Path
) -> None:
    def pretrain(out: Path, steps: int, processes: int) -> None:
        words = tiny.words(
            out, f"loop.steps={steps}", f"dtype={dtype}", f"optim.name={name}",
            "loop.schedule.kind=constant", "loop.eval_every=2", "data.eval_rows=5",
            "loop.save_every=0", "loop.resume=auto", "data.micro_rows=1",
        )  # fmt: skip
        assert runner.run(["pretrain", *words], processes) == 0, runner.log.read_text()

    alone, changing = tmp_path / "alone", tmp_path / "changing"
    pretrain(alone, 6, 1)
    for steps, processes in ((2, 2), (4, 1), (6, 2)):
        pretrain(changing, steps, processes)
        path = changing / "checkpoints" / f"step-{steps:06d}"
        assert len(list((path / "state").iterdir())) == processes
    assert len(losses(alone)) == 2 * 6 + 3
    assert losses(changing) == pytest.approx(losses(alone), rel=tolerance)
    shapes = []
    for out in (alone, changing):
        with safe_open(out / "checkpoints" / "step-000006" / "model.safetensors", "pt") as file:
            parts = {k: file.get_slice(k) for k in file.keys()}
            shapes.append({k: (p.get_shape(), p.get_dtype()) for k, p in parts.items()})
    assert shapes[0] == shapes[1]


# Each process: the gradients of a sharded model's log-probabilities beside the whole model's.
LOG_PROBS = """
import torch
from fastllm.testing.small_models import batch_of, model_of, random_documents
from fastllm.train import distributed

torch.set_num_threads(1)
with distributed.process_group():
    batch = batch_of(random_documents((5, 9)))
    whole, sharded = (model_of("llama", torch.float32) for _ in range(2))
    sharded = distributed.shard(sharded)
    found = []
    for model in (whole, sharded):
        logprob, entropy = model.log_probs(*batch, temperature=0.7)
        (logprob + entropy).sum().backward()
        gradients = [distributed.whole(p.grad) for p in model.parameters()]
        found.append((logprob.detach(), entropy.detach(), gradients))
    (a, b, one), (c, d, both) = found
    assert torch.equal(a, c) and torch.equal(b, d)
    for of_one, of_both in zip(one, both, strict=True):  # both processes have the same batch
        torch.testing.assert_close(of_both, 2 * of_one)
"""


def test_log_probabilities_of_a_sharded_model_are_those_of_the_whole(group: Any) -> None:
    group(LOG_PROBS)


@pytest.mark.full
def test_torchrun_starts_the_command(tiny: Any, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", "fastllm", "pretrain", *tiny.words(tmp_path / "run", "loop.steps=2"),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished at step 2") == 1

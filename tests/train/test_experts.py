"""Models with experts in the whole loop: steps, checkpoints, samples, more than one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm.engine.llm import LLM
from fastllm.engine.request import SamplingParams
from fastllm.errors import NumericalError
from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import to_files
from fastllm.models.safetensors_files import save_directory
from fastllm.models.trainable import initialize
from fastllm.train import loop, presets, pretrain
from fastllm.train.decoder_weights import read_weights, weights_of
from fastllm.train.presets import ShapeConfig

SIZES = ("model.experts=8", "model.experts_per_token=2", "model.expert_inner=32")
TIMED = ("seconds", "tokens_per_second", "mfu")


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics without what time decides."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMED} for x in lines]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = checkpoint.rglob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def losses(out: Path) -> list[float]:
    names = ("loss", "norm", "eval_loss", "aux_loss", "z_loss")
    return [line[name] for line in records(out) for name in names if name in line]


def run(out: Path, tiny: Any, runner: Any, *words: str, processes: int = 1) -> Path:
    """Train; the newest checkpoint."""
    argv = ["pretrain", *tiny.words(out, *SIZES, *words)]
    assert runner.run(argv, processes) == 0, runner.log.read_text()[-4000:]
    return sorted((out / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize(
    "words",
    [
        ("model.preset=moe", "dtype=bfloat16", "optim.name=muon", "recompute=true"),
        ("model.preset=deepseek", "dtype=float32", "balance.z_loss=0.01"),
    ],
    ids=["moe", "deepseek"],
)
def test_a_resumed_run_has_the_bits_of_the_whole_one(
    words: tuple[str, ...], tiny: Any, runner: Any, tmp_path: Path
) -> None:
    more = (
        *words, "balance.aux_loss=0.02", "loop.schedule.kind=constant", "loop.metrics.every=3",
        "loop.sample_every=4", "sample.max_tokens=3", "loop.save_every=4", "loop.resume=auto",
        "loop.eval_every=5", "data.eval_rows=2",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    last = run(whole, tiny, runner, *more, "loop.steps=8")
    # Steps 4 and 8 end no line of metrics: what was counted since the last one is kept too.
    run(cut, tiny, runner, *more, "loop.steps=8", "loop.keep=9")
    first = cut / "checkpoints" / "step-000004"
    run(cut, tiny, runner, *more, "loop.steps=8", f"loop.resume={first}")
    assert records(cut) == records(whole)
    resumed = sorted((cut / "checkpoints").glob("step-*"))[-1]
    want, got = tensors(last), tensors(resumed)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    lines = [line for line in records(whole) if "experts" in line]
    assert [line["step"] for line in lines] == [3, 6, 8]
    layers = ModelConfig.from_directory(last).num_hidden_layers
    assert len(lines[-1]["experts"]["load"]) == layers - ("model.preset=deepseek" in words)
    assert len(lines[-1]["experts"]["loads"][0]) == 8


def test_the_bias_is_saved_under_its_own_name_and_decides_what_is_loaded(
    tiny: Any, runner: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("model.preset=deepseek", "dtype=float32", "loop.steps=5", "balance.bias_update=0.125")
    checkpoint = run(out, tiny, runner, *words)
    stored = load_file(checkpoint / "model.safetensors")
    bias = stored["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and bias.abs().max() > 0
    assert torch.equal(bias * 8, (bias * 8).round())  # steps of an eighth
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in stored
    llm = LLM(str(checkpoint))
    outputs = llm.generate(["the cat"], SamplingParams(max_tokens=4, temperature=0.0))
    assert len(outputs[0].outputs[0].token_ids) >= 1


def test_how_a_step_is_cut_into_micro_batches_changes_rounding_alone(
    tiny: Any, runner: Any, tmp_path: Path
) -> None:
    words = (
        "model.preset=moe", "dtype=float32", "balance.aux_loss=0.5", "balance.z_loss=0.05",
        "loop.steps=4",
    )  # fmt: skip
    found = []
    for rows in (1, 4):
        run(tmp_path / str(rows), tiny, runner, *words, f"data.micro_rows={rows}")
        found.append(losses(tmp_path / str(rows)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    run(tmp_path / "free", tiny, runner, *words, "balance.aux_loss=0", "balance.z_loss=0")
    assert losses(tmp_path / "free") != pytest.approx(found[0], rel=1e-3)  # they have an effect


@pytest.mark.parametrize("preset", ["moe", "deepseek"])
def test_files_hold_single_experts_and_are_read_back(preset: str, tmp_path: Path) -> None:
    shape = ShapeConfig(preset=preset, depth=2, width=32, head_dim=16, experts=4)  # type: ignore[arg-type]
    config = presets.model_config(shape, vocab_size=50, bos=None, eos=(), context=16)
    model, other = (initialize(config, dtype=torch.float32, seed=seed) for seed in (0, 1))
    before = weights_of(model)
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == (1 if preset == "deepseek" else 0)
    for name in biases:
        before[name].normal_()
    save_directory(tmp_path / "model", to_files(before, config), config.to_hf())
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("gate_up_proj" in name for name in stored)
    read_weights(weights_of(other), config, tmp_path / "model")
    for name, tensor in weights_of(other).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("moe", ()),
        pytest.param("deepseek", ("recompute=true",), marks=pytest.mark.full),
    ],
)
def test_two_processes_that_share_out_the_experts_train_as_one(
    preset: str, words: tuple[str, ...], tiny: Any, runner: Any, tmp_path: Path
) -> None:
    more = (
        f"model.preset={preset}", "dtype=float32", "loop.schedule.kind=constant",
        "loop.eval_every=2", "data.eval_rows=5", "loop.save_every=0", "loop.resume=auto",
        "data.micro_rows=1", "balance.aux_loss=0.1", *words,
    )  # fmt: skip
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    whole = run(alone, tiny, runner, *more, "loop.steps=8")
    shared = "expert_parallel=2"
    run(changing, tiny, runner, *more, shared, "loop.steps=2", processes=2)
    run(changing, tiny, runner, *more, "loop.steps=4")
    run(changing, tiny, runner, *more, "loop.steps=6", processes=2)  # every expert in both
    last = run(changing, tiny, runner, *more, shared, "loop.steps=8", processes=2)
    assert len(losses(alone)) == 4 * 8 + 4
    assert losses(changing) == pytest.approx(losses(alone), rel=1e-4)
    want, got = tensors(whole), tensors(last)
    shapes = [{n: t.shape for n, t in x.items() if "rng" not in n} for x in (want, got)]
    weights = load_file(whole / "model.safetensors")
    assert weights.keys() == load_file(last / "model.safetensors").keys()
    assert shapes[0].keys() == shapes[1].keys()


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 2e-2)])
def test_muon_steps_shared_experts_as_one_process_does(
    dtype: str, tolerance: float, tiny: Any, runner: Any, tmp_path: Path
) -> None:
    words = ("model.preset=moe", f"dtype={dtype}", "optim.name=muon", "loop.steps=4")
    run(tmp_path / "alone", tiny, runner, *words)
    run(tmp_path / "shared", tiny, runner, *words, "expert_parallel=2", processes=2)
    run(tmp_path / "four", tiny, runner, *words, "expert_parallel=2", processes=4)
    for name in ("shared", "four"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), rel=tolerance)


def test_what_cannot_be_shared_out_is_refused(tiny: Any, runner: Any, tmp_path: Path) -> None:
    def problem(*words: str) -> str:
        argv = ["pretrain", *tiny.words(tmp_path / "run", "loop.steps=1", *words)]
        before = len(runner.log.read_text()) if runner.log.exists() else 0
        assert runner.run(argv) == 2
        return str(runner.log.read_text()[before:])

    moe = ("model.preset=moe", *SIZES)
    assert "expert_parallel is for models with experts" in problem("expert_parallel=2")
    assert "does not divide the 1 processes" in problem(*moe, "expert_parallel=2")
    assert "expert_parallel must be at least 1" in problem(*moe, "expert_parallel=0")
    assert "balance.bias_update needs a selection bias" in problem(*moe, "balance.bias_update=0.1")
    assert "balance.aux_loss is for models with experts" in problem("balance.aux_loss=0.1")
    assert "experts is not a size of preset dense" in problem("model.experts=4")
    assert "experts_per_token 9 is more than the experts, 8" in problem(
        *moe, "model.experts_per_token=9"
    )


def test_a_router_that_gets_numbers_that_are_none_stops_the_run(tiny: Any, tmp_path: Path) -> None:
    words = tiny.words(tmp_path / "run", *SIZES, "model.preset=moe", "loop.steps=2")
    config = pretrain.load(None, words)
    task = pretrain.Pretraining(config, torch.device("cpu"))
    with torch.no_grad():
        task.decoder.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(NumericalError, match="step 1: logits has no distribution in row") as caught:
        loop.run(task, config.loop)
    message = str(caught.value)
    assert "1 of 32 values of the parameter of model.layers.1.post_attention_layernorm" in message
    assert "Nothing was updated" in message


# The second process alone gets infinite inputs of a router, in a step or in the evaluation.
ONE_REFUSES = """
import json, os, sys, time
import torch
from fastllm.errors import NumericalError
from fastllm.train import distributed, loop, pretrain

torch.set_num_threads(1)
with distributed.process_group() as device:
    for number, words in enumerate(json.loads({cases!r})):
        config = pretrain.load(None, words)
        task = pretrain.Pretraining(config, device)
        layer = task.decoder.model.layers[1].mlp

        def spoil(module, arguments):
            first = number == 0 or not torch.is_grad_enabled()
            return (arguments[0] * float("inf"), *arguments[1:]) if first else None

        if distributed.rank() == 1:
            layer.gate.register_forward_pre_hook(spoil)
        try:
            loop.run(task, config.loop)
        except NumericalError as error:
            print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("recompute=true",), id="recompute"),
        pytest.param(("expert_parallel=2",), id="expert parallel", marks=pytest.mark.full),
    ],
)
def test_what_one_router_refuses_stops_every_process(
    words: tuple[str, ...], tiny: Any, group: Any, tmp_path: Path
) -> None:
    words = ("model.preset=moe", "loop.steps=2", "loop.eval_every=1", *SIZES, *words)
    cases = [tiny.words(tmp_path / name, *words) for name in ("step", "evaluation")]
    for printed in group(ONE_REFUSES.format(cases=json.dumps(cases))):
        in_step, in_evaluation = map(json.loads, printed.splitlines())
        assert in_step.startswith("step 1: process 1: logits has no distribution in row")
        assert in_evaluation.startswith("evaluation after step 1: process 1: logits has no")
        assert "Nothing was updated" in in_step

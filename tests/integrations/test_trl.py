"""TRL's trainers: GRPO with our rollouts on live weights; SFT and DPO on patched models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

import fastllm
from fastllm.integrations.trl import (
    Rollout,
    fuse_head,
    rollout_func,
    sampling_params,
    unfuse_head,
)
from fastllm.nn import QuantLinear

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# TRL, PEFT and accelerate use names that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

PROMPTS = ["Say one ", "Say two ", "Count: 1, 2, "]
TEMPERATURE = 0.9


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward that completions of one group differ in."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(text.count(x) for x in "aeiou ")) for text in texts]


def grpo(
    model: nn.Module, out: Path, rollout: Any, prompts: list[Any] | None = None, **options: Any
) -> Any:
    settings = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
        "max_steps": 3, "learning_rate": 1e-2, "temperature": TEMPERATURE, **QUIET, **options,
    }  # fmt: skip
    args = trl.GRPOConfig(output_dir=str(out), **settings)
    return trl.GRPOTrainer(
        model=model,
        args=args,
        processing_class=tiny_tokenizer(),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts or PROMPTS}),
        reward_funcs=letters,
        rollout_func=rollout,
    )


QUIET: dict[str, Any] = {
    "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": True, "seed": 7,
}  # fmt: skip


def log_probs(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """What the model itself gives a completion's tokens, at the sampling temperature."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        z = model(ids).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
    return z.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


class Watched:
    """Rollouts that are checked against the weights at that moment."""

    def __init__(self, **options: Any) -> None:
        self.rollout = rollout_func(**options)
        self.first: list[Tensor] = []
        self.outputs: list[dict[str, list[Any]]] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        given = self.rollout(prompts, trainer)
        fresh = rollout_func()(prompts, trainer)  # an engine made of the weights as they are
        assert fresh["completion_ids"] == given["completion_ids"]
        assert fresh["logprobs"] == given["logprobs"]
        model = trainer.model
        training = model.training
        model.eval()
        for row in zip(
            given["prompt_ids"], given["completion_ids"], given["logprobs"], strict=True
        ):
            prompt, completion, found = row
            torch.testing.assert_close(
                torch.tensor(found), log_probs(model, prompt, completion), rtol=1e-4, atol=1e-4
            )
        model.train(training)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.first.append(torch.cat([p.detach().flatten() for p in trained]))
        self.outputs.append(given)
        return given


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_grpo_rolls_out_on_the_weights_of_every_step(family: str, tmp_path: Path) -> None:
    watched = Watched()
    trainer = grpo(tiny(family), tmp_path, watched)
    trainer.train()
    assert len(watched.first) == 3
    for before, after in zip(watched.first, watched.first[1:], strict=False):
        assert not torch.equal(before, after)
    groups = [tuple(map(tuple, out["completion_ids"])) for out in watched.outputs]
    assert len(set(groups)) == 3 and all(len(set(group)) > 1 for group in groups)
    for out in watched.outputs:  # one prompt, as often as there are generations
        assert len(out["prompt_ids"]) == 4 and len({tuple(p) for p in out["prompt_ids"]}) == 1
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert all(entry["grad_norm"] > 0 for entry in logged)


def test_evaluation_accumulation_and_autocast_run_on_rollouts_too(tmp_path: Path) -> None:
    calls: list[int] = []
    rollout = rollout_func()

    def counted(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        calls.append(len(prompts))
        return rollout(prompts, trainer)

    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "bf16": True}
    trainer = grpo(tiny("llama"), tmp_path, counted, **options)
    trainer.train()
    assert calls == [8]  # two groups of one step
    found = trainer.evaluate(datasets.Dataset.from_dict({"prompt": PROMPTS}))
    assert sum(calls[1:]) == 4 * len(PROMPTS) and "eval_reward" in found


def test_grpo_of_a_lora_adapter_never_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    base = {name: p.clone() for name, p in model.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    watched = Watched()
    trainer = grpo(peft.get_peft_model(model, config), tmp_path, watched, learning_rate=0.1)
    trainer.train()
    assert not torch.equal(watched.first[0], watched.first[-1])
    for name, p in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name.replace(".base_layer", "")])


def test_conversations_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    conversations = [[{"role": "user", "content": text}] for text in PROMPTS]
    watched = Watched()
    trainer = grpo(tiny("llama"), tmp_path, watched, conversations, max_steps=1)
    trainer.train()
    tokenizer = tiny_tokenizer()
    for ids in watched.outputs[0]["prompt_ids"]:
        text = tokenizer.decode(ids)
        assert text in [f"u:{prompt}\na:" for prompt in PROMPTS]


def test_draws_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    model = tiny("llama")
    trainer = grpo(model, tmp_path, rollout_func())
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[1]] + [PROMPTS[0]]
    first, again = rollout_func(), rollout_func()
    a, b = first(prompts, trainer), first(prompts, trainer)
    assert again(prompts, trainer) == a and a != b  # calls of one step differ
    trainer.state.global_step = 1
    c = first(prompts, trainer)
    assert c["completion_ids"] not in (a["completion_ids"], b["completion_ids"])
    assert len({tuple(ids) for ids in a["completion_ids"]}) == 5  # each sample has its own draws
    assert a["prompt_ids"] == trainer.processing_class(text=prompts)["input_ids"]


def test_completions_end_with_an_end_of_sequence_and_fit_the_length(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[2] *= 3  # </s>, which some samples now meet
    trainer = grpo(model, tmp_path, None, max_completion_length=12)
    found = rollout_func()([PROMPTS[0]] * 40, trainer)["completion_ids"]
    ended = [ids for ids in found if ids[-1] == 2]
    assert ended and len(ended) < 40
    assert all(2 not in ids[:-1] and len(ids) <= 12 for ids in found)
    assert all(len(ids) == 12 for ids in found if ids[-1] != 2)


def test_the_trainers_sampling_settings_are_the_engines(tmp_path: Path) -> None:
    options = {"min_new_tokens": 2, "top_k": 3}
    trainer = grpo(
        tiny("llama"), tmp_path, None, top_p=0.8, repetition_penalty=1.1, generation_kwargs=options
    )
    assert sampling_params(trainer) == {
        "temperature": TEMPERATURE, "top_p": 0.8, "top_k": 3, "repetition_penalty": 1.1,
        "max_tokens": 8, "min_tokens": 2, "stop_token_ids": (2,), "ignore_eos": True,
        "detokenize": False,
    }  # fmt: skip
    trainer.args.generation_kwargs = {"do_sample": False}
    greedy = rollout_func()([PROMPTS[0]] * 3, trainer)["completion_ids"]
    assert len(greedy) == 3 and len({tuple(ids) for ids in greedy}) == 1
    trainer.args.generation_kwargs = {"num_beams": 4}
    with pytest.raises(ValueError, match="generation_kwargs holds 'num_beams'"):
        rollout_func()(PROMPTS, trainer)


def test_more_samples_than_a_request_takes_are_several_requests(tmp_path: Path) -> None:
    trainer = grpo(tiny("llama"), tmp_path, None, max_completion_length=4)
    out = rollout_func(max_num_seqs=32)([PROMPTS[0]] * 130, trainer)
    assert len(out["completion_ids"]) == 130
    assert len({tuple(ids) for ids in out["completion_ids"]}) > 120


def test_an_engine_is_kept_until_the_model_changes(tmp_path: Path) -> None:
    trainer = grpo(tiny("llama"), tmp_path, None)
    rollout = rollout_func(max_model_len=64)
    assert isinstance(rollout, Rollout)
    rollout(PROMPTS, trainer)
    llm = rollout._llm
    assert llm is not None and llm.max_model_len == 64
    rollout(PROMPTS, trainer)
    assert rollout._llm is llm
    trainer.model.to(torch.bfloat16)
    rollout(PROMPTS, trainer)
    assert rollout._llm is not llm
    with pytest.raises(ValueError, match="prompt 0 has 70 tokens, more than the 63"):
        rollout(["a" * 70], trainer)


def test_an_engine_that_cannot_be_made_says_so_each_time(tmp_path: Path) -> None:
    trainer = grpo(tiny("llama"), tmp_path, None)
    rollout = rollout_func(kv_cache_dtype="int3")
    for _ in range(2):
        with pytest.raises(ValueError, match="kv_cache_dtype"):
            rollout(PROMPTS, trainer)


def test_families_and_tools_that_are_not_served_are_named(tmp_path: Path) -> None:
    trainer = grpo(tiny("gemma3"), tmp_path, None)
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM .* cannot represent"):
        rollout_func()(PROMPTS, trainer)
    trainer.tools = [letters]
    with pytest.raises(ValueError, match="without tools"):
        rollout_func()(PROMPTS, trainer)
    with pytest.raises(TypeError, match=r"SimpleNamespace is no GRPOTrainer of TRL 1.16"):
        rollout_func()(PROMPTS, SimpleNamespace())


def test_an_adapter_that_is_switched_between_rollouts_is_the_one_that_answers(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny("llama"), config)
    model.add_adapter("two", config)
    trainer = grpo(model, tmp_path, None, generation_kwargs={"do_sample": False})
    rollout = rollout_func()
    first = rollout(PROMPTS, trainer)
    trainer.model.set_adapter("two")
    second = rollout(PROMPTS, trainer)
    assert second["logprobs"] != first["logprobs"]
    assert second == rollout_func()(PROMPTS, trainer)


# SFT and DPO


def sft(model: nn.Module, out: Path, **options: Any) -> Any:
    texts = [f"{prompt}{'abc' * (i + 1)}" for i, prompt in enumerate(PROMPTS * 3)]
    args = trl.SFTConfig(
        output_dir=str(out), per_device_train_batch_size=3, max_steps=5, learning_rate=1e-2,
        max_length=64, **QUIET, **options,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model, args=args, processing_class=tiny_tokenizer(),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
    )  # fmt: skip


def dpo(model: nn.Module, out: Path) -> Any:
    rows = {
        "prompt": PROMPTS * 2,
        "chosen": [f"yes {i}" for i in range(6)],
        "rejected": [f"no, not {i}" for i in range(6)],
    }
    args = trl.DPOConfig(
        output_dir=str(out), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2,
        max_length=64, precompute_ref_log_probs=True, **QUIET,
    )  # fmt: skip
    return trl.DPOTrainer(
        model=model, args=args, processing_class=tiny_tokenizer(),
        train_dataset=datasets.Dataset.from_dict(rows),
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [sft, dpo])
def test_losses_on_a_patched_model_are_those_of_the_unpatched(make: Any, tmp_path: Path) -> None:
    plain = losses(make(tiny("llama"), tmp_path))
    model = tiny("llama")
    report = fastllm.patch(model)
    assert report.replaced("loss") and report.replaced("norm")
    patched = losses(make(model, tmp_path))
    assert len(plain) == len(patched) >= 3 and plain[-1] < plain[0]
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def test_a_model_patched_after_its_trainer_was_made_trains_the_same(tmp_path: Path) -> None:
    plain = losses(sft(tiny("llama"), tmp_path))
    trainer = sft(tiny("llama"), tmp_path)
    report = fastllm.patch(trainer.model)
    assert report.replaced("norm")  # TRL's head is its own: see the report for the loss
    torch.testing.assert_close(
        torch.tensor(losses(trainer)), torch.tensor(plain), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("make", [sft, dpo])
def test_our_head_under_trls_forward_gives_its_losses_and_metrics(
    make: Any, tmp_path: Path
) -> None:
    plain, trainer = make(tiny("llama"), tmp_path), make(tiny("llama"), tmp_path)
    forward = trainer.model.forward
    assert fuse_head(trainer) == fuse_head(trainer) == 1  # idempotent
    assert trainer.model.forward != forward
    torch.testing.assert_close(
        torch.tensor(losses(trainer)), torch.tensor(losses(plain)), rtol=1e-4, atol=1e-5
    )
    for found, wanted in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        for name in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
            if name in wanted:
                assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
    unfuse_head(trainer)
    assert trainer.model.forward == forward


def test_grpo_with_our_head_takes_the_same_steps(tmp_path: Path) -> None:
    models = [tiny("llama"), tiny("llama")]
    trainers = [grpo(model, tmp_path, rollout_func()) for model in models]
    assert fuse_head(trainers[1]) == 1
    for trainer in trainers:
        trainer.train()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_packed_head_stays_packed_under_trls_forward(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for fused in (False, True):
        model = tiny("llama")
        model.lm_head = QuantLinear.from_linear(model.lm_head, "int8", activation="fp32")
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = sft(peft.get_peft_model(model, config), tmp_path)
        if fused:
            assert fuse_head(trainer) == 1
        found.append(torch.tensor(losses(trainer)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_what_our_head_does_not_compute_is_trls(tmp_path: Path) -> None:
    trainer = sft(tiny("llama", torch.float64), tmp_path)
    fuse_head(trainer)
    wanted = losses(sft(tiny("llama", torch.float64), tmp_path))
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(wanted))
    with pytest.raises(ValueError, match="SimpleNamespace has no model with TRL's fused head"):
        fuse_head(SimpleNamespace(model=tiny("llama")))

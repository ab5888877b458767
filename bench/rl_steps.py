"""A GRPO step, rollout and update, of the same model and prompts in fastllm and in TRL.

Run as a program, `python -m fastllm.bench.rl_steps PEER DIRECTORY FOLDER METHOD PROMPT ANSWER
DEVICE`, it loads the model from DIRECTORY, takes a step to warm up, and then takes steps as
`StepProcess` asks for them; it writes to FOLDER, which is the caller's to remove. Both sides sample
groups at temperature 1, reward the length of the text, and take one AdamW step a rollout, with the
clipped loss of GRPO and without a reference model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastllm.bench.step_process import StepClock

GROUP, PROMPTS = 8, 4
RATE = 1e-6
LORA_RANK = 16
WARM_UP = 1  # steps: the first allocates, packs and captures
# Every prompt asks for more than an answer may hold, so that most are as long as they may be.
_ASK = "Write a very long story about the number {number}."
_CONTEXT = "Once there was a small town by the sea, and its people liked to count things. "


def questions(prompt: int) -> list[str]:
    """Questions of about `prompt` tokens, the chat template's 31 included."""
    filler = _CONTEXT * max((prompt - 42) // 18, 0)
    return [filler + _ASK.format(number=number) for number in range(2, 66)]


def text_length(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[Any]:
    """The reward of both sides: characters. TRL gives conversations as lists of messages."""
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def run_fastllm(
    directory: str, folder: Path, method: str, prompt: int, answer: int, device: str,
    clock: StepClock,
) -> None:  # fmt: skip
    """`grpo.main`, held between two steps until the next one is asked for. folder: to write to."""
    from fastllm.train import grpo
    from fastllm.train.rl.batches import RlBatches
    from fastllm.train.task import StepAbandoned

    class Held(RlBatches):
        taken = 0

        def __next__(self) -> Any:
            if self.taken > WARM_UP:
                clock.end()
            if self.taken >= WARM_UP and not clock.begin():
                raise StepAbandoned("no further step is asked for")
            self.taken += 1
            return super().__next__()

    grpo.RlBatches = Held  # type: ignore[misc]
    data = folder / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions(prompt)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "model": directory, "data": data, "method": method, "lora.rank": LORA_RANK,
        "lora.alpha": 2 * LORA_RANK, "lr": RATE, "rewards": f"{__file__}:text_length",
        "beta": 0, "group_size": GROUP, "prompts_per_rollout": PROMPTS, "eval_prompts": 0,
        "max_completion": answer, "device": device, "samples": 0, "steps": 1_000_000,
        "out": folder / "run", "loop.save_every": 0, "dtype": "bfloat16",
        "loop.metrics.progress": "none", "loop.metrics.report": "false",
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in overrides.items()]
    grpo.main(grpo.load(None, words), say=lambda _: None)


def run_trl(
    directory: str, folder: Path, method: str, prompt: int, answer: int, device: str,
    clock: StepClock,
) -> None:  # fmt: skip
    """TRL's GRPOTrainer with transformers' generation, bfloat16."""
    import datasets
    import peft
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Held(TrainerCallback):
        taken = 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if self.taken >= WARM_UP and not clock.begin():
                sys.exit()
            self.taken += 1

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if self.taken > WARM_UP:
                clock.end()

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions(prompt)]
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    adapter = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=GROUP * PROMPTS,
        num_generations=GROUP, max_completion_length=answer, temperature=1.0, beta=0.0,
        learning_rate=RATE, loss_type="grpo", use_cpu=device == "cpu", bf16=False,
        activation_checkpointing=False, max_steps=1_000_000, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=text_length,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[Held()],
        peft_config=adapter if method == "lora" else None,
    )
    trainer.train()


def main(arguments: list[str]) -> None:
    """Take a step for every line of standard input."""
    peer, directory, folder, method, prompt, answer, device = arguments
    if peer != "fastllm":
        import trl

        assert trl.GRPOTrainer is not None, "imported before memory is read"
    run = run_fastllm if peer == "fastllm" else run_trl
    clock = StepClock(device)
    run(directory, Path(folder), method, int(prompt), int(answer), device, clock)


if __name__ == "__main__":
    main(sys.argv[1:])

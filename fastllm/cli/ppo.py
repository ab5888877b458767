"""`fastllm ppo MODEL DATA...`: learn from rewards with a critic."""

from __future__ import annotations

from collections.abc import Sequence

from .training import Help, asks_for_help, parse, show_rewards, train

USAGE = "fastllm ppo MODEL DATA [DATA...] [--reward NAME] [--config FILE] [--KEY VALUE...]"

DESCRIPTION = """
Samples a completion of each prompt, scores it, and makes tokens more probable after which more
reward came than a critic expected: proximal policy optimization. MODEL is a Hugging Face directory,
a GGUF file (its quantized weights stay packed, adapters learn), or a name. DATA are tasks that are
made here, or .jsonl, .json or .parquet files of prompts:

  arithmetic:LEVEL, word:LEVEL                 problems with answers, of graded difficulty
  {"prompt": "...", "answer": "..."}           other fields are columns that rewards get
  {"messages": [{"role": "user", "content": "..."}], "answer": "..."}

A reward is accuracy, exact_match, think_format, length, repetition, a function of a file
(rewards.py:name), or model:DIRECTORY, what `fastllm reward` made; several are separated by commas
and summed with --reward_weights. It is given at a completion's last token; every token pays kl_coef
times its KL divergence from the first policy. With --kl_target the coefficient adapts.

With --method lora policy, critic and reference share one frozen base: the reference is the base
with adapters off, the critic has an adapter and a head of its own. With --method full each is a
model: three times the weights. --critic DIRECTORY starts the critic from a reward model.

The run's folder (--out) gets checkpoints, metrics.jsonl (objective/..., policy/..., val/..., and
logprob_difference, between sampler and trainer: 0), samples.jsonl, a report, and the policy:
adapter/ in PEFT's format, or with --method full model/, a Hugging Face directory.

Ctrl-C or SIGTERM ends a run after the step in hand, within a rollout before it, with a checkpoint;
--resume auto goes on with the same bits, also between the steps of one rollout. When a reward
fails, the result of the steps before is written too, and --resume auto goes on once it is mended.
Runs have one process, no torchrun: they sample from the weights that they train.
exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input
"""

EXAMPLES = """
fastllm ppo smollm2 arithmetic:2
fastllm ppo ./SmolLM2-135M-Instruct questions.jsonl --reward model:runs/judge/adapter
fastllm ppo ./SmolLM2-135M-Instruct arithmetic:2 --method full --kl_target 6 --out runs/sums
fastllm ppo smollm2 prompts.jsonl --reward accuracy,rewards.py:polite --reward_weights 1,0.2
fastllm ppo --config runs/sums/config.yaml --resume auto
fastllm chat smollm2 --adapter runs/ppo/adapter
"""

CHOICES = """
What is none is chosen: lr is a tenth of 5e-5 (2000 / hidden)^0.78, ten times that for adapters,
times lr_multiplier; critic_lr is lr; eval_data: the tasks' test split, or 5% of the
files' prompts, at most eval_prompts; kl_target, missing_eos_penalty and critic: there is none.
"""

HELP = Help(usage=USAGE, description=DESCRIPTION, examples=EXAMPLES, choices=CHOICES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.ppo import ALIASES, PpoConfig, load, main

    if asks_for_help(argv):
        print(HELP.text(PpoConfig, ALIASES))
        return 0
    return train(main, parse(argv, load, USAGE), show_rewards)

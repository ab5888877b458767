"""`fastllm grpo MODEL DATA...`: learn from groups of samples and their rewards."""

from __future__ import annotations

from collections.abc import Sequence

from .training import Help, asks_for_help, parse, show_rewards, train

USAGE = "fastllm grpo MODEL DATA [DATA...] [--reward NAME] [--config FILE] [--KEY VALUE...]"

DESCRIPTION = """
Samples several completions of each prompt, scores them with rewards, and makes the better ones of a
group more probable. MODEL is a Hugging Face directory, a GGUF file (its quantized weights stay
packed, an adapter learns), or a name; a model without a chat template gets plain prompts. DATA are
tasks that are made here, or .jsonl, .json or .parquet files of prompts:

  arithmetic:LEVEL, word:LEVEL                 problems with answers, of graded difficulty
  {"prompt": "...", "answer": "..."}           other fields are columns that rewards get
  {"messages": [{"role": "user", "content": "..."}], "answer": "..."}
  {"question": "...", "answer": "... #### 42"} GSM8K's form

A reward is accuracy, exact_match, think_format, length, repetition, a function of a file
(rewards.py:name, called with lists of prompts, completions and every column; finish_reasons has
"length" for what was cut, else "stop"), or model:DIRECTORY;
several are separated by commas and summed with --reward_weights. One that raises, takes too long or
gives no number stops the run and names the sample; nothing that was done before is lost.

--algorithm grpo, dr_grpo, dapo, gspo, rloo, or rejection (learn the completions whose reward is at
least keep_from). Each is a choice of advantage, scale, ratio, clip_low, clip_high, aggregation,
beta, kl, kl_in, mask_truncated and dynamic_sampling, any of which can be given instead.

The run's folder (--out) gets checkpoints, metrics.jsonl (reward, kl, entropy, completions/...,
clip_ratio/..., seconds/... and logprob_difference, between sampler and trainer: 0), samples.jsonl,
a report, and the result: adapter/ in PEFT's format, or with --method full model/, a Hugging Face
directory. A model that is hardly ever right learns slowly: ask it in a way that it answers shortly.

Ctrl-C or SIGTERM ends a run after the step in hand, within a rollout before it, with a checkpoint;
--resume auto goes on with the same bits, also between the steps of one rollout. When a reward
fails, the result of the steps before is written too, and --resume auto goes on once it is mended.
Runs have one process, no torchrun: they sample from the weights that they train.
exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input
"""

EXAMPLES = """
fastllm grpo smollm2 arithmetic:2 --chat_template plain --stop '["\\n"]' --lr 5e-4 --beta 0
fastllm grpo ./SmolLM2-135M-Instruct gsm8k.jsonl --reward accuracy --group_size 16 --steps 500
fastllm grpo ./SmolLM2-135M-Instruct arithmetic:2 --method full --algorithm dr_grpo --out runs/sums
fastllm grpo ./SmolLM2-135M-Instruct arithmetic:2 --quant nf4 --algorithm rloo --beta 0
fastllm grpo smollm2 prompts.jsonl --reward accuracy,rewards.py:polite --reward_weights 1,0.2
fastllm grpo --config runs/sums/config.yaml --resume auto
fastllm chat smollm2 --adapter runs/grpo/adapter
"""

CHOICES = """
What is none is chosen: lr is a tenth of 5e-5 (2000 / hidden)^0.78, ten times that for adapters,
times lr_multiplier; the parts of an algorithm as its paper has them; eval_data: the tasks' test
split, or 5% of the files' prompts, at most eval_prompts.
"""

HELP = Help(usage=USAGE, description=DESCRIPTION, examples=EXAMPLES, choices=CHOICES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.grpo import ALIASES, GrpoConfig, load, main

    if asks_for_help(argv):
        print(HELP.text(GrpoConfig, ALIASES))
        return 0
    return train(main, parse(argv, load, USAGE), show_rewards)

"""Parts of `fastllm.train.distill`: the teacher, its stored answers, data, losses, rollouts."""

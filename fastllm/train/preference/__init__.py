"""Parts of `fastllm.train.dpo`: pairs of answers, the losses over them, the reference."""

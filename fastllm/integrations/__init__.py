"""Other people's programs on our kernels: transformers, PEFT, TRL, lm-eval.

Nothing here is loaded by `import fastllm`, and nothing of those packages is imported before it is
used: each is an optional extra.
"""

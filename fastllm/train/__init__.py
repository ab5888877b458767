"""Training: data, the loop, checkpoints, and the stages that are short programs over them."""

"""Quantizing a model's files, layer by layer. `run.quantize_files` is the way in."""

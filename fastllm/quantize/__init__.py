"""Quantized formats: block layouts, packing and quantizers. Import the module that you need."""

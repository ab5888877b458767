"""Measuring what a model can do: answers that are checked, and choices by log-likelihood."""

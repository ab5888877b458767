"""Modules built from the ops. State dict names are Hugging Face's."""

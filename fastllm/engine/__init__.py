"""Generation: requests, paged cache, scheduler, captured decode steps, and the `LLM` class."""

"""Problems that the project makes itself: seeded, of graded difficulty, with answers to check.

    arithmetic:LEVEL   "What is 27 + 45?", from one digit (1) to long expressions (6)
    word:LEVEL         short stories about amounts, from one step (1) to four with distractors (5)

LEVEL may be a range, "arithmetic:1-3": the levels then take turns. The training and the test split
share no problem: a hash of its numbers and operations puts each in one of the two. `make` gives
prompts, for rewards and evaluation; `examples` gives prompts with answers, to learn from.
"""

from fastllm.train.tasks.examples import COMPLETIONS, examples
from fastllm.train.tasks.making import SPLITS, is_task, make, problems, task_names
from fastllm.train.tasks.problem import Problem

__all__ = [
    "COMPLETIONS",
    "SPLITS",
    "Problem",
    "examples",
    "is_task",
    "make",
    "problems",
    "task_names",
]

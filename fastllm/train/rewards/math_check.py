"""math-verify's comparison of two answers, for the process that it runs in.

The limits are that process's, so its own, which are signals of the main thread, are off.
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.disable(logging.CRITICAL)  # it warns that its limits are off


def equal(right: str, text: str) -> bool:
    """Whether the answer that math-verify finds in `text` is `right`."""
    gold = parse(f"\\boxed{{{right}}}", parsing_timeout=None)
    given = parse(text, parsing_timeout=None)
    return bool(verify(gold, given, timeout_seconds=None))

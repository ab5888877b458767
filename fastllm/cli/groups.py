"""Commands of several actions: `fastllm data prepare`, `fastllm tokenizer train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import did_you_mean
from .parsing import command_parser

Action = tuple[Callable[[Sequence[str]], int], str]  # what runs it, what it does


def run_group(
    name: str, description: str, examples: str, actions: Mapping[str, Action], argv: Sequence[str]
) -> int:
    """Run the action that `argv` begins with; without one, print help or an error and exit."""
    if argv and argv[0] in actions:
        return actions[argv[0]][0](argv[1:])
    width = max(map(len, actions))
    listed = "\n".join(f"  {action:{width}}  {text}" for action, (_, text) in actions.items())
    parser = command_parser(name, f"{description.strip()}\n\nactions:\n{listed}", examples)
    parser.add_argument("action", nargs="?", help=f"fastllm {name} ACTION --help describes one")
    if not argv:
        parser.print_help()
        return 0
    chosen = parser.parse_args(list(argv[:1])).action
    hint = did_you_mean(chosen, actions) or f"there are {', '.join(actions)}"
    parser.error(f"{name} has no action {chosen!r}; {hint}")

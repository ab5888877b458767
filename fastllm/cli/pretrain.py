"""`fastllm pretrain`: train a model from random weights on a token store."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import NumericalError
from ..tables import plain_table
from .console import note

DESCRIPTION = """\
usage: fastllm pretrain [CONFIG.yaml] [KEY=VALUE | --KEY VALUE ...]

Trains a model from random weights on a token store that `fastllm data prepare` wrote. One dial,
`--depth`, gives the model's shape, and with it batch, rates and length; any of them can be given.
`--preset` says of which kind: dense, moe (Qwen3-MoE's form, with auxiliary losses) or deepseek
(DeepSeek-V3's, with selection biases); their experts' loads are in the metrics and the report.
The run's folder (`--out`) receives config.yaml, metrics.jsonl, loss.png, report.html and
checkpoints/step-N, each of which transformers and `fastllm chat` load.

Ctrl-C or SIGTERM ends a run after the step in hand, with a checkpoint; `--resume auto` goes on from
the newest whole one, also after a kill, with the same bits. Several processes:
`torchrun --nproc-per-node 2 -m fastllm pretrain ...`.

exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input

examples:
  fastllm pretrain --store data/tokens --depth 4 --out runs/small
  fastllm pretrain --store data/tokens --depth 4 --seconds 120 --out runs/two-minutes
  fastllm pretrain --store data/tokens --preset moe --depth 4 --out runs/experts
  fastllm pretrain small.yaml --depth 8 optim.name=adamw --loop.sample_every 100
  fastllm pretrain small.yaml --resume auto
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    from ..train import pretrain

    words = list(argv)
    path = None
    if words and not words[0].startswith("-") and "=" not in words[0]:
        path = words.pop(0)
    config = pretrain.load(path, words)
    try:
        result = pretrain.main(config)
    except (NumericalError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        note(f"fastllm: error: {error}")
        return 1
    if result.checkpoint is not None and os.environ.get("RANK", "0") == "0":
        note(f"{result.status} at step {result.step}: {result.checkpoint}")
    return 0


_DIAL = ("data.", "model.", "balance.")  # sections whose open keys the depth fills in


def help_text() -> str:
    """Usage, and every key with its type and default."""
    from ..train.config import describe
    from ..train.pretrain import ALIASES, DERIVED, PretrainConfig

    short = {key: f"--{name}" for name, key in ALIASES.items()}
    rows = [
        [
            f"{key} ({short[key]})" if key in short else key,
            kind,
            "from the depth"
            if key in DERIVED or (default == "none" and key.startswith(_DIAL))
            else default,
        ]
        for key, kind, default in describe(PretrainConfig)
    ]
    return "\n".join(
        [DESCRIPTION, "keys:", "",
         *plain_table(["key", "type", "default"], rows)]
    )  # fmt: skip

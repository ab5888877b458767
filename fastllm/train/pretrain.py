"""Pretraining: a decoder of random weights learns to predict the tokens of a store.

    loss = - sum log p(token | the tokens of its document before it),  over the tokens of a step

Batches, model and rates come from `presets`, steps and checkpoints from `loop`; here they meet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastllm.engine.llm import LLM
from fastllm.engine.request import SamplingParams
from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import to_files
from fastllm.models.moe_config import MoeConfig
from fastllm.models.safetensors_files import save_directory
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import initialize
from fastllm.train import distributed, loop, presets
from fastllm.train.balance import BalanceConfig, attach_balance
from fastllm.train.config import load_config, to_dict
from fastllm.train.data.loader import Loader, MicroBatch
from fastllm.train.data.store import TokenStore
from fastllm.train.decoder_weights import read_weights, weights_of
from fastllm.train.loop import LoopConfig, Result, Task
from fastllm.train.optim import OptimConfig, make_optimizer
from fastllm.train.peak import peak_flops
from fastllm.train.presets import ShapeConfig

ALIASES = {
    "preset": "model.preset",
    "depth": "model.depth",
    "store": "data.store",
    "tokenizer": "data.tokenizer",
    "tokens": "data.tokens",
    "lr": "optim.lr",
    "steps": "loop.steps",
    "seconds": "loop.seconds",
    "out": "loop.out",
    "resume": "loop.resume",
    "seed": "loop.seed",
    "tensorboard": "loop.metrics.tensorboard",
    "trackio": "loop.metrics.trackio",
    "wandb": "loop.metrics.wandb",
}

# Keys that `derive` gives although their sections have defaults of their own.
DERIVED = frozenset({
    "optim.name", "optim.lr", "optim.weight_decay", "loop.steps",
    "loop.schedule.warmup", "loop.eval_every", "loop.save_every",
})  # fmt: skip

_MICRO_TOKENS = {"cpu": 4096, "cuda": 32768}  # fill the matrix units and fit beside the state
_EXPECTED_MFU = 0.4  # before a step has been timed
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which tokens, in which pieces. None: from the preset."""

    store: str = ""  # directory that `fastllm data prepare` wrote
    tokenizer: str = ""  # directory; default the one that the store was made with
    tokens: int | None = None  # to train on in all
    seq_len: int | None = None  # tokens of a row
    batch_tokens: int | None = None  # of a step, all processes together
    micro_rows: int | None = None  # rows that go through the model at once
    eval_rows: int = 64  # of the held-out split; 0: all of it, then bits per byte are exact

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_tokens", "micro_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.eval_rows < 0:
            raise ValueError(f"eval_rows must be at least 0, got {self.eval_rows}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """What `loop.sample_every` shows. Raises ValueError for values that cannot be sampled with:
    a run must not find out at its hundredth step."""

    prompts: tuple[str, ...] = ("The",)  # "": from the start of a document
    max_tokens: int = 32
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number from 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything that a pretraining run is made of."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ShapeConfig = field(default_factory=ShapeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and blocks
    device: str = "cpu"
    recompute: bool = False  # activations: a third more time, far less memory
    balance: BalanceConfig = field(default_factory=BalanceConfig)  # of experts
    expert_parallel: int = 1  # processes that share out the experts of each layer

    def __post_init__(self) -> None:
        if self.expert_parallel < 1:
            raise ValueError(f"expert_parallel must be at least 1, got {self.expert_parallel}")
        if self.expert_parallel > 1 and self.model.preset == "dense":
            raise ValueError("expert_parallel is for models with experts: give model.preset moe")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be bfloat16 or float32, got {self.dtype!r:.80}")


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of a run, with every value that the preset gives filled in.

    Raises ValueError naming the key, DataError naming a file of the store.
    """
    return load_config(PretrainConfig, path, overrides, derive=derive, aliases=ALIASES)


def derive(config: PretrainConfig, given: Set[str]) -> dict[str, Any]:
    """What the preset says, by key, around the keys that are given.

    Reads the store's index: the vocabulary is part of the model.
    """
    if not config.data.store:
        raise ValueError(
            "data.store is not given: the directory that `fastllm data prepare` wrote (--store DIR)"
        )
    store = TokenStore.open(config.data.store)
    full = presets.shape(config.model)
    assert full.width is not None, "shape fills it in"
    row = config.data.seq_len or presets.seq_len(full.width)
    model = presets.model_config(full, vocab_size=store.vocab_size, bos=None, eos=(), context=row)
    size = presets.active_parameters(model)
    tokens, steps = config.data.tokens, config.loop.steps if "loop.steps" in given else None
    if config.loop.seconds and tokens is None and steps is None:
        tokens = _tokens_in(config, model)
    plan = presets.budget(
        size, row, tokens=tokens, batch_tokens=config.data.batch_tokens, steps=steps
    )
    rows = plan.batch_tokens // row
    device = "cuda" if config.device.startswith("cuda") else "cpu"
    times = 5 if plan.steps < 500 else 10  # short runs have less time for evaluation
    values: dict[str, Any] = {
        "data.tokens": plan.tokens,
        "data.seq_len": row,
        "data.batch_tokens": plan.batch_tokens,
        "data.micro_rows": max(min(_MICRO_TOKENS[device] // row, rows), 1),
        "optim.name": presets.OPTIMIZER,
        "optim.lr": plan.lr,
        "optim.weight_decay": presets.WEIGHT_DECAY,
        "loop.steps": plan.steps,
        "loop.schedule.warmup": plan.warmup,
        "loop.eval_every": max(plan.steps // times, 1),
        "loop.save_every": max(plan.steps // 10, 1),
    }
    values |= {f"model.{name}": value for name, value in to_dict(full).items()}
    values["model.context"] = full.context or row
    balance = presets.balance(config.balance, full)
    values |= {f"balance.{name}": value for name, value in to_dict(balance).items()}
    if not config.data.tokenizer:
        values["data.tokenizer"] = store.index["tokenizer"].get("name", "")
    return values


def _tokens_in(config: PretrainConfig, model: ModelConfig) -> int:
    """About how many tokens `loop.seconds` suffice for: two digits are all that is known."""
    peak = peak_flops(torch.device(config.device), _DTYPES[config.dtype])
    rate = _EXPECTED_MFU * peak / presets.flops_per_token(model)
    return int(float(f"{max(config.loop.seconds * rate, 1.0):.1e}"))


class Pretraining(Task):
    """A model, its data and its optimizer."""

    name = "pretrain"

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        """Raises ValueError or DataError naming what does not fit together."""
        data = config.data
        assert data.seq_len and data.batch_tokens, "load() fills them in"
        self.config = config
        rows, world = max(data.batch_tokens // data.seq_len, 1), distributed.world()
        if rows % world:
            raise ValueError(
                f"data.batch_tokens {data.batch_tokens} is {rows} rows of {data.seq_len}, which "
                f"{world} processes cannot divide: give a multiple of {world * data.seq_len}"
            )
        self.store = TokenStore.open(data.store)
        self.tokenizer = _tokenizer(data, self.store)
        self.shape = presets.model_config(
            config.model,
            vocab_size=self.store.vocab_size,
            bos=self.tokenizer.bos_token_id,
            eos=tuple(sorted(self.tokenizer.eos_token_ids)),
            context=data.seq_len,
        )
        self.shape = replace(self.shape, dtype=_DTYPES[config.dtype])
        self.decoder = initialize(
            self.shape, dtype=_DTYPES[config.dtype], seed=config.loop.seed, device=device
        )
        self.balance = attach_balance(self.decoder, config.balance)
        self.model = distributed.shard(self.decoder, config.expert_parallel)
        self.expert_group = distributed.expert_group(self.decoder)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.loader = Loader(
            self.store,
            seq_len=data.seq_len,
            rows_per_step=rows,
            micro_rows=data.micro_rows,
            seed=config.loop.seed,
            rank=distributed.rank(),
            world=distributed.world(),
        )
        self.batches = self.loader
        self._llm: LLM | None = None

    def describe(self) -> list[str]:
        """Model, data and rates."""
        total, body = presets.parameters(self.shape)
        active = presets.active_parameters(self.shape)
        shape, data, plan = self.shape, self.config.data, self.config.loop
        there, optim = self.store.split("train").tokens, self.config.optim
        step = self.loader.rows_per_step * self.loader.seq_len
        seen = step * plan.steps
        held_out = self.store.splits.get("holdout")
        none = "nothing is held out: no evaluation (fastllm data prepare --holdout 0.01)"
        sharded = plan.sample_every and distributed.world() > 1
        return [
            *([] if held_out and held_out.tokens else [none]),
            *(["several processes share the weights: no samples are taken"] if sharded else []),
            f"model: {total / 1e6:.3g}M parameters ({body / 1e6:.3g}M without embeddings), "
            f"{shape.num_hidden_layers} layers of {shape.hidden_size}, {self.config.dtype}",
            *([] if shape.experts is None else [_of_experts(shape.experts, active)]),
            f"data: {there:,} tokens in rows of {data.seq_len}, {step:,} a step; "
            f"{plan.steps:,} steps read {seen:,} ({seen / there:.2f} epochs)",
            f"{optim.name}: rate {optim.lr:.2e}, {plan.schedule.kind}, "
            f"{plan.schedule.warmup} steps of warmup",
        ]

    def loss(self, micro: MicroBatch) -> Tensor:
        """Cross entropy of the next tokens, summed."""
        micro = micro.to(self.device)
        if self.balance is not None:
            self.balance.begin()
        if self.expert_group is not None:
            self.expert_group.begin(micro.documents.ids.shape[0], self.device)
        return self.decoder.loss(
            micro.documents, micro.targets, "sum", checkpoint=self.config.recompute
        )

    def evaluate(self) -> dict[str, float]:
        """Loss per token and bits per byte of text on the held-out split.

        Bits per byte do not depend on the tokenizer: total loss over total bytes. With `eval_rows`
        the bytes are those of as many tokens of the split on average.
        """
        split = self.store.splits.get("holdout")
        if split is None or not split.tokens:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in self.loader.evaluation("holdout", max_rows=self.config.data.eval_rows or None):
            sums[0] += self.loss(micro)
            sums[1] += micro.tokens
        total, tokens = distributed.sum_(sums).tolist()
        values = {"eval_loss": total / tokens}
        if split.text_bytes:  # a store that was made from ids does not know
            bytes_per_token = split.text_bytes / split.tokens
            values["bits_per_byte"] = total / tokens / math.log(2) / bytes_per_token
        return values

    def sample(self) -> list[tuple[str, str]]:
        """Continuations of the configured prompts, each read as the beginning of a document, after
        the token that documents of the store begin with; none while weights are sharded."""
        if distributed.world() > 1:
            return []
        sample = self.config.sample
        if self._llm is None:
            self._llm = LLM.from_model(
                self.decoder, self.tokenizer, max_num_seqs=max(len(sample.prompts), 1)
            )
        params = SamplingParams(
            max_tokens=sample.max_tokens, temperature=sample.temperature, seed=0
        )
        start = [self.store.start_token_id]
        prompts = [start + self.tokenizer.encode(p, False) for p in sample.prompts]
        outputs = self._llm.generate(prompts, params)
        return [(p, o.outputs[0].text) for p, o in zip(sample.prompts, outputs, strict=True)]

    def flops(self, micro: MicroBatch) -> float:
        """Products with weights, and attention inside each document."""
        edges = micro.documents.cu_seqlens
        lengths = (edges[1:] - edges[:-1]).tolist()
        attention = sum(presets.attention_flops(self.shape, length) for length in lengths)
        return presets.flops_per_token(self.shape) * sum(lengths) + attention

    def after_update(self) -> None:
        """The loads of the step move the selection biases."""
        if self.balance is not None:
            self.balance.after_step()

    def state(self) -> dict[str, Tensor]:
        """The counts of the experts' loads."""
        return {} if self.balance is None else self.balance.state()

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """The experts' loads. whole: of every expert."""
        return {} if self.balance is None else self.balance.numbers(loads=whole)

    def identity(self) -> dict[str, Any]:
        """The model, its tokens and its optimizer; the data's own state names the data."""
        return {
            "task": self.name,
            "model": {k: v for k, v in self.shape.to_hf().items() if k != "transformers_version"},
            "tokenizer_sha256": self.store.tokenizer_hash,
            "optim.name": self.config.optim.name,
        }

    def weights(self) -> dict[str, Tensor]:
        """Every parameter, and the biases that routers select by."""
        return weights_of(self.decoder)

    def write_weights(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """A Hugging Face directory, tokenizer included."""
        save_directory(directory, to_files(weights, self.shape), self.shape.to_hf())
        self.tokenizer.save(directory)

    def read_weights(self, directory: Path) -> None:
        """The inverse of `write_weights`."""
        weights = self.weights().items()
        live = {n: t for n, t in weights if not distributed.is_master(t)}
        read_weights(live, self.shape, directory)


def _of_experts(experts: MoeConfig, active: int) -> str:
    """What a token meets of a model with experts."""
    shared = f" and {experts.shared} shared" if experts.shared else ""
    return (
        f"experts: {experts.per_token} of {experts.num_experts}{shared} a token, "
        f"{experts.moe_intermediate_size} wide; {active / 1e6:.3g}M parameters outside embeddings "
        "are active"
    )


def _tokenizer(data: DataConfig, store: TokenStore) -> Tokenizer:
    """The tokenizer that made the store. Raises ValueError if it is another."""
    path = Path(data.tokenizer)
    if not data.tokenizer or not path.is_dir():
        raise ValueError(
            f"data.tokenizer {data.tokenizer!r} is not a directory: give the one that the store "
            f"{data.store} was made with (--tokenizer DIR)"
        )
    tokenizer = Tokenizer.from_hf(path)
    if store.tokenizer_hash and tokenizer.fingerprint != store.tokenizer_hash:
        raise ValueError(
            f"data.tokenizer {path} is not the tokenizer that {data.store} was made with: its "
            "fingerprint is another. Give that one, or prepare the data again"
        )
    return tokenizer


def main(config: PretrainConfig) -> Result:
    """Pretrain as `config` says; raises what `loop.run` does."""
    with distributed.process_group(config.device) as device:
        return loop.run(Pretraining(config, device), config.loop, settings=to_dict(config))

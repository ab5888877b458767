"""One dial: the depth of a model gives its shape, and shape and data give batch, rate and length.

what             formula                                          source
width            64 x depth, up to a multiple of head_dim         loss is flat around it: arXiv
                                                                  2001.08361, section 3.2
head_dim         64 below width 1024, else 128                    both have fast attention tiles
heads            width / head_dim
kv_heads         heads below width 1024; else one for up to four  arXiv 2305.13245; small models
                 queries, where that divides                      have small caches anyway
inner            8/3 x width, up to a multiple of 64              arXiv 2002.05202
tied embeddings  below width 1024                                 they are most of a small model
seq_len          512 below width 512, 1024 below 1024, else 2048
tokens           20 x parameters outside the embedding            arXiv 2203.15556
compute C        6 x those parameters x tokens
learning rate    0.3118 x C^-0.125                                arXiv 2401.02954, equation 1
batch tokens     0.2920 x C^0.3271, whole rows                    the same
warmup           5% of the steps, at most 2,000
optimizer        Muon, with AdamW's rates and decay               arXiv 2502.16982; 1.7M parameters,
                                                                  600,000 tokens: 2.13 bits a byte,
                                                                  with AdamW 2.49
weight decay     0.1, of matrices                                 arXiv 2005.14165, appendix B

Every value can be given; what is given is not derived, and what follows from it follows. So fewer
`tokens` mean a smaller batch and a higher rate, which suits short runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastllm.models.config import ModelConfig
from fastllm.models.rope_scaling import RopeConfig

TOKENS_PER_PARAMETER = 20.0
WEIGHT_DECAY = 0.1
OPTIMIZER = "muon"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig:
    """A model's shape; None: from the depth. Raises ValueError for sizes that do not fit."""

    depth: int = 4  # the dial
    family: Literal["llama", "qwen3"] = "llama"  # qwen3: with norms over the heads of q and k
    layers: int | None = None
    width: int | None = None
    head_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    inner: int | None = None  # of the feed-forward
    tied: bool | None = None  # the LM head is the embedding
    context: int | None = None  # the longest text; default the rows of training
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.family not in ("llama", "qwen3"):
            raise ValueError(f"family must be llama or qwen3, got {self.family!r:.80}")
        for name in ("depth", "layers", "width", "head_dim", "heads", "kv_heads", "inner"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def shape(config: ShapeConfig) -> ShapeConfig:
    """The same with every size but `context` filled in.

    Raises ValueError naming sizes that contradict each other.
    """
    layers = config.layers or config.depth
    rough = config.width or 64 * config.depth
    head_dim = config.head_dim or (64 if rough < 1024 else 128)
    width = config.width or _up(rough, head_dim)
    if config.heads is None and width % head_dim:
        raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}: give heads too")
    heads = config.heads or width // head_dim
    kv_heads = config.kv_heads
    if kv_heads is None:
        group = 1 if width < 1024 else max(g for g in (1, 2, 3, 4) if heads % g == 0)
        kv_heads = heads // group
    return ShapeConfig(
        depth=config.depth,
        family=config.family,
        layers=layers,
        width=width,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        inner=config.inner or _up(math.ceil(8 * width / 3), 64),
        tied=width < 1024 if config.tied is None else config.tied,
        context=config.context,
        rope_theta=config.rope_theta,
    )


def seq_len(width: int) -> int:
    """Tokens of a row."""
    return 512 if width < 512 else 1024 if width < 1024 else 2048


def model_config(
    config: ShapeConfig, *, vocab_size: int, bos: int | None, eos: tuple[int, ...], context: int
) -> ModelConfig:
    """The decoder of a shape that has every size. Raises ValueError where sizes do not fit."""
    full = shape(config)
    assert full.width and full.inner and full.layers and full.heads and full.kv_heads
    return ModelConfig(
        model_type=full.family,
        vocab_size=vocab_size,
        hidden_size=full.width,
        intermediate_size=full.inner,
        num_hidden_layers=full.layers,
        num_attention_heads=full.heads,
        num_key_value_heads=full.kv_heads,
        head_dim=full.head_dim or 0,
        rms_norm_eps=1e-5,
        max_position_embeddings=full.context or context,
        tie_word_embeddings=bool(full.tied),
        qk_norm=full.family == "qwen3",
        rope=RopeConfig(theta=full.rope_theta),
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(all of them, those outside the embedding and the LM head)."""
    counts = {name: math.prod(size) for name, size in config.weight_shapes().items()}
    ends = sum(n for name, n in counts.items() if name.startswith(("model.embed", "lm_head")))
    return sum(counts.values()), sum(counts.values()) - ends


def flops_per_token(config: ModelConfig) -> float:
    """Of the products with weights, forward and backward: 6 a parameter, the LM head's included.

    Attention is apart, see `attention_flops`; the embedding is a look-up.
    """
    head = config.vocab_size * config.hidden_size
    return 6.0 * (parameters(config)[1] + head)


def attention_flops(config: ModelConfig, length: int) -> float:
    """Of scores and values of one causal document, forward and backward, in all layers."""
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 6.0 * heads * length * length


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train, in which pieces, how fast."""

    tokens: int
    batch_tokens: int  # of a step
    lr: float
    steps: int
    warmup: int


def budget(
    parameters: int, row: int, *, tokens: int | None = None, batch_tokens: int | None = None,
    steps: int | None = None,
) -> Budget:  # fmt: skip
    """Length, batch and rate for so many parameters outside the embedding and rows of `row` tokens.

    tokens, batch_tokens, steps: given values; what follows from them follows.
    """
    if tokens is None and steps is not None:
        tokens = steps * batch_tokens if batch_tokens else _tokens_of(steps, parameters)
    tokens = tokens or round(TOKENS_PER_PARAMETER * parameters)
    compute = 6.0 * parameters * tokens
    wanted = batch_tokens or 0.2920 * compute**0.3271
    rows = max(round(wanted / row), 1)
    steps = steps or max(round(tokens / (rows * row)), 1)
    return Budget(
        tokens=tokens,
        batch_tokens=rows * row,
        lr=float(f"{0.3118 * compute**-0.125:.2e}"),
        steps=steps,
        warmup=min(math.ceil(0.05 * steps), 2000),
    )


def _tokens_of(steps: int, parameters: int) -> int:
    """The tokens whose best batch is read in `steps` steps: tokens / batch(6 N tokens) = steps."""
    return round((steps * 0.2920 * (6.0 * parameters) ** 0.3271) ** (1 / (1 - 0.3271)))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

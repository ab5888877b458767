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
experts a token  8, 4, 2 or 1: the most, the shared one           fine ones specialize: arXiv
                 included, that are 128 wide or wider             2401.06066, section 3.1
expert's inner   inner / experts a token, up to a multiple of 32  work for a token as a dense
                                                                  model's of the same depth
experts          8 for each that a token takes                    arXiv 2409.02060: 64, 8 a token
seq_len          512 below width 512, 1024 below 1024, else 2048
tokens           20 x active parameters outside the embedding     arXiv 2203.15556
compute C        6 x those parameters x tokens
learning rate    0.3118 x C^-0.125                                arXiv 2401.02954, equation 1
batch tokens     0.2920 x C^0.3271, whole rows                    the same
warmup           5% of the steps, at most 2,000
optimizer        Muon, with AdamW's rates and decay               arXiv 2502.16982; 1.7M parameters,
                                                                  600,000 tokens: 2.13 bits a byte,
                                                                  with AdamW 2.49
weight decay     0.1, of matrices                                 arXiv 2005.14165, appendix B
latent of heads  4 x head_dim, at most width / 2; of queries      arXiv 2405.04434, section 2.1
                 none; rotated: head_dim / 2 more
aux loss         0.01, without a selection bias; z loss 0.001     arXiv 2409.02060, section 4.1
bias update      0.001 a step, with one; no aux loss, no z loss   arXiv 2408.15664, section 4.3

`preset` says what the depth is the depth of:

dense     Llama's decoder
moe       Qwen3-MoE's: softmax, weights of a token sum to one, norms over heads of q and k
deepseek  DeepSeek-V3's: latent attention, sigmoid, one shared expert, the first of several layers
          dense, selection by scores and a bias that keeps loads even

A model's active parameters are those that one token is multiplied with. Every value can be given;
what is given is not derived, and what follows from it follows. So fewer `tokens` mean a smaller
batch and a higher rate, which suits short runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fastllm.models.config import ModelConfig
from fastllm.models.mla_config import MlaConfig
from fastllm.models.moe_config import MoeConfig
from fastllm.models.rope_scaling import RopeConfig
from fastllm.train.balance import BalanceConfig

TOKENS_PER_PARAMETER = 20.0
EXPERTS_PER_CHOSEN = 8
LEAST_EXPERT_WIDTH = 128  # below it tiles of products are mostly edges
WEIGHT_DECAY = 0.1
OPTIMIZER = "muon"


Family = Literal["llama", "qwen3", "qwen3_moe", "deepseek_v3"]

_FAMILIES: dict[str, tuple[Family, ...]] = {  # of each preset; the first is its own
    "dense": ("llama", "qwen3"),
    "moe": ("qwen3_moe",),
    "deepseek": ("deepseek_v3",),
}
_EXPERT_SIZES = ("experts", "experts_per_token", "expert_inner", "shared_experts", "dense_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig:
    """A model's shape; None: from preset and depth. Raises ValueError for sizes that do not fit."""

    preset: Literal["dense", "moe", "deepseek"] = "dense"
    depth: int = 4  # the dial
    family: Family | None = None  # of dense: llama, or qwen3, with norms over heads of q and k
    layers: int | None = None
    width: int | None = None
    head_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    inner: int | None = None  # of the feed-forward; of all experts of a token together, about
    experts: int | None = None
    experts_per_token: int | None = None
    expert_inner: int | None = None  # of one expert
    shared_experts: int | None = None  # that every token takes; deepseek alone
    dense_layers: int | None = None  # the first so many have no experts; deepseek alone
    tied: bool | None = None  # the LM head is the embedding
    context: int | None = None  # the longest text; default the rows of training
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.preset not in _FAMILIES:
            raise ValueError(f"preset must be {_either(_FAMILIES)}, got {self.preset!r:.80}")
        families = _FAMILIES[self.preset]
        if self.family is not None and self.family not in families:
            raise ValueError(
                f"family of preset {self.preset} must be {_either(families)}, "
                f"got {self.family!r:.80}"
            )
        least = {"shared_experts": 0, "dense_layers": 0}
        for name in ("depth", "layers", "width", "head_dim", "heads", "kv_heads", "inner",
                     *_EXPERT_SIZES):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}")
        for name in _EXPERT_SIZES if self.preset == "dense" else _EXPERT_SIZES[3:]:
            if getattr(self, name) and self.preset != "deepseek":
                raise ValueError(f"{name} is not a size of preset {self.preset}")


def shape(config: ShapeConfig) -> ShapeConfig:
    """The same with every size but `context` filled in, and those of experts where it has them.

    Raises ValueError naming sizes that contradict each other.
    """
    layers = config.layers or config.depth
    rough = config.width or 64 * config.depth
    head_dim = config.head_dim or (64 if rough < 1024 else 128)
    width = config.width or _up(rough, head_dim)
    if config.heads is None and width % head_dim:
        raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}: give heads too")
    heads = config.heads or width // head_dim
    full = replace(
        config,
        family=config.family or _FAMILIES[config.preset][0],
        layers=layers,
        width=width,
        head_dim=head_dim,
        heads=heads,
        kv_heads=config.kv_heads or _kv_heads(config.preset, width, heads),
        inner=config.inner or _up(math.ceil(8 * width / 3), 64),
        tied=width < 1024 if config.tied is None else config.tied,
    )
    return full if config.preset == "dense" else _with_experts(full)


def _kv_heads(preset: str, width: int, heads: int) -> int:
    if width < 1024 or preset == "deepseek":  # whose heads share one latent anyway
        return heads
    return heads // max(g for g in (1, 2, 3, 4) if heads % g == 0)


def _with_experts(config: ShapeConfig) -> ShapeConfig:
    """The sizes of the experts; every other size is there."""
    assert config.inner and config.layers, "shape fills them in"
    deepseek = config.preset == "deepseek"
    shared = config.shared_experts
    if shared is None:
        shared = 1 if deepseek else 0
    chosen = config.experts_per_token
    if chosen is None:
        wide = (n for n in (8, 4, 2, 1) if config.inner >= LEAST_EXPERT_WIDTH * n and n > shared)
        chosen = next(wide, shared + 1) - shared
    experts = config.experts or EXPERTS_PER_CHOSEN * (chosen + shared)
    if chosen > experts:
        raise ValueError(f"experts_per_token {chosen} is more than the experts, {experts}")
    dense = config.dense_layers
    if dense is None:
        dense = 1 if deepseek and config.layers > 1 else 0
    if dense >= config.layers:
        raise ValueError(f"dense_layers {dense} leaves none of {config.layers} layers with experts")
    return replace(
        config,
        experts=experts,
        experts_per_token=chosen,
        expert_inner=config.expert_inner or _up(math.ceil(config.inner / (chosen + shared)), 32),
        shared_experts=shared,
        dense_layers=dense,
    )


def balance(config: BalanceConfig, shape: ShapeConfig) -> BalanceConfig:
    """The same with every value filled in. Raises ValueError where the model has no use for one."""
    by_preset = {"dense": (0.0, 0.0, 0.0), "moe": (0.01, 0.001, 0.0), "deepseek": (0.0, 0.0, 0.001)}
    values = {}
    for name, own in zip(
        ("aux_loss", "z_loss", "bias_update"), by_preset[shape.preset], strict=True
    ):
        given = getattr(config, name)
        if given and shape.preset == "dense":
            raise ValueError(f"balance.{name} is for models with experts: give model.preset moe")
        if given and name == "bias_update" and shape.preset == "moe":
            raise ValueError(
                "balance.bias_update needs a selection bias, which routers of preset moe do not "
                "have: give model.preset deepseek, or balance.aux_loss"
            )
        values[name] = own if given is None else given
    return BalanceConfig(**values)


def seq_len(width: int) -> int:
    """Tokens of a row."""
    return 512 if width < 512 else 1024 if width < 1024 else 2048


def model_config(
    config: ShapeConfig, *, vocab_size: int, bos: int | None, eos: tuple[int, ...], context: int
) -> ModelConfig:
    """The decoder of a shape that has every size. Raises ValueError where sizes do not fit."""
    full = shape(config)
    assert full.width and full.inner and full.layers and full.heads and full.kv_heads
    assert full.head_dim and full.family
    latent = full.preset == "deepseek"
    mla = MlaConfig(
        q_lora_rank=None,
        kv_lora_rank=min(4 * full.head_dim, max(full.width // 2, 16)),
        qk_nope_head_dim=full.head_dim,
        qk_rope_head_dim=full.head_dim // 2,
        v_head_dim=full.head_dim,
        rope_interleave=False,  # files then hold the rows as they lie here
    )
    return ModelConfig(
        model_type=full.family,
        vocab_size=vocab_size,
        hidden_size=full.width,
        intermediate_size=full.inner,
        num_hidden_layers=full.layers,
        num_attention_heads=full.heads,
        num_key_value_heads=full.kv_heads,
        head_dim=mla.qk_head_dim if latent else full.head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=full.context or context,
        tie_word_embeddings=bool(full.tied),
        qk_norm=full.family in ("qwen3", "qwen3_moe"),
        mla=mla if latent else None,
        experts=_experts(full),
        rope=RopeConfig(theta=full.rope_theta),
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _experts(full: ShapeConfig) -> MoeConfig | None:
    """The experts of a shape that has every size."""
    if full.preset == "dense":
        return None
    assert full.experts and full.experts_per_token and full.expert_inner
    deepseek = full.preset == "deepseek"
    return MoeConfig(
        num_experts=full.experts,
        per_token=full.experts_per_token,
        moe_intermediate_size=full.expert_inner,
        shared=full.shared_experts or 0,
        scoring="sigmoid" if deepseek else "softmax",
        group_score="top2" if deepseek else "max",
        renormalize=True,
        bias_correction=deepseek,
        dense_layers=tuple(range(full.dense_layers or 0)),
    )


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(all of them, those outside the embedding and the LM head)."""
    counts = _counts(config)
    ends = sum(n for name, n in counts.items() if name.startswith(("model.embed", "lm_head")))
    return sum(counts.values()), sum(counts.values()) - ends


def active_parameters(config: ModelConfig) -> int:
    """Those outside embedding and LM head that one token meets: of its experts alone."""
    body, experts = parameters(config)[1], config.experts
    if experts is None:
        return body
    routed = sum(n for name, n in _counts(config).items() if ".mlp.experts." in name)
    return body - routed + routed * experts.per_token // experts.num_experts


def _counts(config: ModelConfig) -> dict[str, int]:
    """How many values each parameter has; the biases of selection are none."""
    return {
        name: math.prod(size)
        for name, size in config.weight_shapes().items()
        if not name.endswith(".e_score_correction_bias")
    }


def flops_per_token(config: ModelConfig) -> float:
    """Of the products with weights, forward and backward: 6 a parameter that is active, the LM
    head's included.

    Attention is apart, see `attention_flops`; the embedding is a look-up.
    """
    head = config.vocab_size * config.hidden_size
    return 6.0 * (active_parameters(config) + head)


def attention_flops(config: ModelConfig, length: int) -> float:
    """Of scores and values of one causal document, forward and backward, in all layers."""
    heads = config.num_attention_heads * config.num_hidden_layers
    value_dim = config.head_dim if config.mla is None else config.mla.v_head_dim
    return 3.0 * heads * (config.head_dim + value_dim) * length * length


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
    """Length, batch and rate for so many active parameters outside the embedding and rows of `row`
    tokens.

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


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)

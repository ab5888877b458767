"""Rotary position tables for every frequency scaling that Llama, Mistral and Qwen configs use.

With rotary dimension R, base frequencies are f_i = theta ** (-2i / R), i = 0 .. R/2 - 1. A type
changes them, and may scale cos and sin by an attention factor:

    default   f
    linear    f / factor                                       (positions are interpolated)
    dynamic   theta grows with the context length              (NTK-aware)
    yarn      blend of f and f / factor by wavelength          (arXiv:2309.00071)
    longrope  f / short_factor_i, or long_factor_i beyond the original context (arXiv:2402.13753)
    llama3    blend of f and f / factor between two wavelengths (Llama 3.1)
    factors   f / factors_i                                    (`rope_freqs` of GGUF files)

`dynamic` and `longrope` depend on the context length. Here it is the length of the table, the
most that a run can reach, so that a token's rotation never depends on what else is in a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastllm.models.config import ModelConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "factors")
_CHUNK = 8192  # rows computed at once: bounds the float64 intermediates to a few MB


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Type and parameters, with the names of Hugging Face's `rope_parameters`."""

    type: str = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # the share of each head that is rotated
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.type!r:.80} is not one of {', '.join(ROPE_TYPES)}")
        _in_range("theta", self.theta, 1.0 + 1e-6, 1e15)
        _in_range("partial_rotary_factor", self.partial_rotary_factor, 1e-3, 1.0)
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            _in_range(name, getattr(self, name), 1e-6, 1e6)
        for name in ("mscale", "mscale_all_dim"):
            _in_range(name, getattr(self, name), 0.0, 1e6)
        _in_range("original_max_position_embeddings",
                  self.original_max_position_embeddings, 2, 1 << 27)  # fmt: skip
        for name in ("short_factor", "long_factor", "factors"):
            for value in getattr(self, name) or ():
                _in_range(name, value, 1e-6, 1e30)
        self._check_needed()

    def _check_needed(self) -> None:
        needed: dict[str, tuple[str, ...]] = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("original_max_position_embeddings",),
            "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                       "original_max_position_embeddings"),
            "factors": ("factors",),
        }  # fmt: skip
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"rope type {self.type} needs {name}")
        if self.type == "llama3":
            low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
            if not 0 < low < high <= 1e6:
                raise ValueError(
                    f"rope type llama3 needs 0 < low_freq_factor < high_freq_factor, got {low} "
                    f"and {high}"
                )


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"rope parameter {name} must be from {low:g} to {high:g}, is {value:g}")


def rope_tables(config: ModelConfig, max_positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [max_positions, rotary_dim / 2], the attention factor included.

    Angles are computed in float64 and rounded once: position * frequency in float32 is already
    off by 1e-3 radians at position 10,000.
    """
    if max_positions < 1:
        raise ValueError(f"max_positions must be at least 1, got {max_positions}")
    frequencies, attention_factor = rope_frequencies(config, max_positions)
    cos = torch.empty(max_positions, frequencies.numel())
    sin = torch.empty_like(cos)
    for start in range(0, max_positions, _CHUNK):
        stop = min(start + _CHUNK, max_positions)
        angles = torch.outer(torch.arange(start, stop, dtype=torch.float64), frequencies)
        cos[start:stop] = angles.cos() * attention_factor
        sin[start:stop] = angles.sin() * attention_factor
    return cos, sin


def rope_frequencies(config: ModelConfig, max_positions: int) -> tuple[Tensor, float]:
    """(inverse frequencies float64 [rotary_dim / 2], attention factor) for runs that long."""
    rope, dim = config.rope, config.rotary_dim
    base = _base_frequencies(rope.theta, dim)
    if rope.type == "linear":
        return base / _value(rope.factor), 1.0
    if rope.type == "dynamic":
        return _dynamic(config, max_positions), 1.0
    if rope.type == "yarn":
        return _yarn(config, base)
    if rope.type == "longrope":
        return _longrope(config, base, max_positions)
    if rope.type == "llama3":
        return _llama3(rope, base), 1.0
    if rope.type == "factors":
        return base / _vector("factors", rope.factors, base), 1.0
    return base, 1.0


def _value(number: float | None) -> float:
    assert number is not None, "RopeConfig checks that its type's parameters are there"
    return number


def _vector(name: str, values: tuple[float, ...] | None, base: Tensor) -> Tensor:
    if values is None or len(values) != base.numel():
        found = 0 if values is None else len(values)
        raise ValueError(f"rope parameter {name} needs {base.numel()} values, has {found}")
    return torch.tensor(values, dtype=torch.float64)


def _base_frequencies(theta: float, dim: int) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _dynamic(config: ModelConfig, max_positions: int) -> Tensor:
    factor, dim = _value(config.rope.factor), config.rotary_dim
    trained = config.max_position_embeddings
    stretch = factor * max(max_positions, trained) / trained - (factor - 1)
    return _base_frequencies(config.rope.theta * stretch ** (dim / (dim - 2)), dim)


def _yarn(config: ModelConfig, base: Tensor) -> tuple[Tensor, float]:
    rope, dim = config.rope, config.rotary_dim
    original = _value(rope.original_max_position_embeddings)
    factor = rope.factor or config.max_position_embeddings / original

    def dimension(turns: float) -> float:
        """The (fractional) index whose wave makes `turns` turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp), _yarn_attention_factor(rope, factor)


def yarn_scale(factor: float, multiplier: float) -> float:
    """What a context grown by `factor` scales attention with, times `multiplier` (an mscale)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(factor, rope.mscale) / yarn_scale(factor, rope.mscale_all_dim)
    return yarn_scale(factor, 1.0)


def _longrope(config: ModelConfig, base: Tensor, max_positions: int) -> tuple[Tensor, float]:
    rope = config.rope
    original = _value(rope.original_max_position_embeddings)
    beyond = max_positions > original
    name = "long_factor" if beyond else "short_factor"
    frequencies = base / _vector(name, rope.long_factor if beyond else rope.short_factor, base)
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    factor = rope.factor or config.max_position_embeddings / original
    if factor <= 1:
        return frequencies, 1.0
    return frequencies, math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(rope: RopeConfig, base: Tensor) -> Tensor:
    factor, original = _value(rope.factor), _value(rope.original_max_position_embeddings)
    low, high = _value(rope.low_freq_factor), _value(rope.high_freq_factor)
    turns = original * base / (2 * math.pi)  # of each wave over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return base / factor * (1 - blend) + base * blend

"""Sampling the next token.

Draws use the Gumbel-max trick: the sampled id is `argmax(z + g)`, where `z` are the processed
logits and `g` is Gumbel noise made by Philox4x32-10 (Salmon et al., 2011) from `(seed, token id,
position)` alone. A draw therefore depends on nothing but its own row: not on the batch, the threads
or the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .log_probs import check_logits, columns_contiguous, tile_scratch
from .registry import Op

GREEDY_BELOW = 1e-5  # temperatures below this are greedy: dividing by them could overflow fp32

_MASK = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor]) -> Tensor:
    """Word 0 of Philox4x32-10 with key `seed` (low, high 32 bits) and counter `(c0, c1, 0, 0)`.

    Args:
        seed: int64, broadcastable with the counter words.
        counter: two int64 tensors with values in [0, 2^32).

    Returns:
        int64 tensor with values in [0, 2^32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counter
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # 64-bit products wrap around in int64, which leaves their bits right; masks undo the sign.
        p0, p1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0


def gumbel(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Gumbel noise `-log(-log(u))`, `u = (word + 0.5) / 2^32`, float32 `[S, vocab]`.

    In float64 inside: near u = 1, where the noise is largest, fp32 would round u to 1 and give
    infinity. Kernels use `1 - u = (2^32 - 1 - word + 0.5) / 2^32` and log1p there.
    """
    ids = torch.arange(vocab, device=seed.device).expand(seed.shape[0], vocab)
    words = philox(seed[:, None], (ids, (position.long() & _MASK)[:, None]))
    u = (words.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(u)).float()


def processed_logits(
    logits: Tensor,
    temperature: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    penalized: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    banned: Tensor,
) -> Tensor:
    """Banned ids, penalties and temperature applied to logits, in this order."""
    rows, vocab = logits.shape
    # Column `vocab` takes the padding, so that -1 bans nothing.
    ban = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device)
    inside = (banned >= 0) & (banned < vocab)
    ban.scatter_(1, torch.where(inside, banned, vocab).long(), True)
    z = logits.masked_fill(ban[:, :vocab], float("-inf"))
    if counts.shape[0]:
        use = penalized.bool()[:, None]
        seen = (counts > 0) | (in_prompt > 0)
        r = repetition[:, None]
        z = torch.where(use & seen, torch.where(z > 0, z / r, z * r), z)
        z = torch.where(use & (counts > 0), z - presence[:, None], z)
        z = torch.where(use & (counts > 0), z - frequency[:, None] * counts, z)
    inverse = torch.where(temperature < GREEDY_BELOW, torch.ones_like(temperature), 1 / temperature)
    return z * inverse[:, None]


def _threshold(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest processed logit that survives min_p, top_k and top_p, `[S, 1]`."""
    vocab = z.shape[1]
    ordered = z.sort(dim=1, descending=True).values
    top = ordered[:, :1]
    infinity = torch.full_like(top, float("-inf"))
    cut = torch.where(min_p[:, None] > 0, top + torch.log(min_p.clamp(max=1))[:, None], infinity)
    k = top_k.long()[:, None]
    kth = ordered.gather(1, (k - 1).clamp(0, vocab - 1))
    cut = torch.maximum(cut, torch.where((k > 0) & (k < vocab), kth, infinity))
    mass = torch.exp((ordered - top).double()).masked_fill(ordered < cut, 0.0).cumsum(1)
    short = mass < top_p.double()[:, None] * mass[:, -1:]
    last = ordered.gather(1, short.sum(1, keepdim=True).clamp(max=vocab - 1))
    return torch.maximum(cut, torch.where(top_p[:, None] < 1, last, infinity))


def sampling_ref(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    seed: Tensor,
    position: Tensor,
    penalized: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    banned: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `sampling`."""
    z = processed_logits(
        logits, temperature, repetition, presence, frequency, penalized, counts, in_prompt, banned
    )
    noisy = z + gumbel(seed, position, z.shape[1])
    noisy = noisy.masked_fill(z < _threshold(z, top_k, top_p, min_p), float("-inf"))
    greedy = (temperature < GREEDY_BELOW)[:, None]
    ids = torch.where(greedy, z, noisy).argmax(1)
    valid = torch.isfinite(logits.amax(1)) & torch.isfinite(z.amax(1))  # amax passes NaN on
    logprob = torch.log_softmax(logits, 1).gather(1, ids[:, None])[:, 0]
    logprob_t = torch.log_softmax(z, 1).gather(1, ids[:, None])[:, 0]
    if counts.shape[0]:
        counted = (valid & penalized.bool()).int()
        counts.scatter_add_(1, ids[:, None], counted[:, None])
    nan = torch.full_like(logprob, float("nan"))
    return (
        torch.where(valid, ids, -1).int(),
        torch.where(valid, logprob, nan),
        torch.where(valid, logprob_t, nan),
    )


def _sampling_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


_sampling = Op(
    "sampling(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor repetition, Tensor presence, Tensor frequency, Tensor seed, Tensor position, "
    "Tensor penalized, Tensor(a!) counts, Tensor in_prompt, Tensor banned) "
    "-> (Tensor, Tensor, Tensor)",
    sampling_ref,
    fake=_sampling_fake,
)


def _sampling_native(logits: Tensor, *params: Tensor) -> bool:
    return columns_contiguous(logits) and all(p.is_contiguous() for p in params)


@_sampling.impl("native", "cpu", dtypes=(torch.float32,), when=_sampling_native)
def _sampling_cpu(logits: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    ids = logits.new_empty(rows, dtype=torch.int32)
    logprob = logits.new_empty(rows)
    logprob_t = logits.new_empty(rows)
    _C.sampling(ids, logprob, logprob_t, tile_scratch(logits, 6, 1), logits, *params)
    return ids, logprob, logprob_t


@_sampling.impl("triton", "cuda", dtypes=(torch.float32,))
def _sampling_cuda(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import sampling as kernel

    return kernel.sampling(*args)


def sampling(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    seed: Tensor,
    position: Tensor,
    penalized: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    banned: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token for every row of logits; not differentiable.

    Every parameter is a tensor read when the op runs, so a captured graph follows changes to it.
    The order is: banned ids, repetition, presence and frequency penalties, temperature, min_p,
    top_k, top_p, draw.

    Args:
        logits: `[S, V]` float32, columns contiguous.
        temperature: `[S]` float32; below 1e-5 the row is greedy (argmax, ties to the lower id).
        top_k: `[S]` int32; keeps all values >= the k-th largest; off if <= 0 or >= V.
        top_p: `[S]` float32; keeps the smallest set of most likely tokens whose probability, after
            min_p and top_k, reaches top_p, and all ties with its last; off if >= 1.
        min_p: `[S]` float32; keeps tokens at least min_p times as likely as the most likely; off if
            <= 0.
        repetition: `[S]` float32; tokens of the prompt or the output get `l / r` if l > 0, else `l
            * r`.
        presence: `[S]` float32; subtracted once from tokens already generated.
        frequency: `[S]` float32; subtracted once per time the token was generated.
        seed: `[S]` int64, the Philox key.
        position: `[S]` int32, the place of the new token in its sequence; with the token id the
            Philox counter.
        penalized: `[S]` uint8; where 0 the three penalties are off and counts is neither read nor
            changed.
        counts: `[S, V]` int32, times generated; the sampled id of penalized rows is added. `[0,
            V]`: no penalties.
        in_prompt: `[S, V]` uint8, whether the token is in the prompt; `[0, V]` like counts.
        banned: `[S, B]` int32 ids that cannot be sampled; -1 pads.

    Returns:
        `(ids, logprob, logprob_t)`: `[S]` int32, and float32 log-probabilities of the sampled ids
        under the raw logits and under the penalized logits at temperature (1 if greedy), before
        truncation. A row that has NaN, +inf or no finite logit left gives id -1 and NaN.

    Raises:
        ValueError: on a shape or dtype other than these.
    """
    check_logits(logits)
    rows, vocab = logits.shape
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("repetition", repetition, torch.float32),
        ("presence", presence, torch.float32),
        ("frequency", frequency, torch.float32),
        ("seed", seed, torch.int64),
        ("position", position, torch.int32),
        ("penalized", penalized, torch.uint8),
    ):
        _check_tensor(name, tensor, (rows,), dtype)
    used = rows if counts.shape[0] else 0
    _check_tensor("counts", counts, (used, vocab), torch.int32)
    _check_tensor("in_prompt", in_prompt, (used, vocab), torch.uint8)
    if banned.ndim != 2:
        raise ValueError(f"banned must have shape [{rows}, B], got {tuple(banned.shape)}")
    _check_tensor("banned", banned, (rows, banned.shape[1]), torch.int32)
    return _sampling(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition,
        presence,
        frequency,
        seed,
        position,
        penalized,
        counts,
        in_prompt,
        banned,
    )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)}, "
            f"got {tensor.dtype} of {list(tensor.shape)}"
        )

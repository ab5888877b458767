"""Every Triton kernel under the interpreter, against plain float64 PyTorch.

`TRITON_INTERPRET=1` must be set before triton is imported, so the cases run in a process of their
own: `TRITON_INTERPRET=1 python interpreter_cases.py` prints {case: outcome} as JSON, and
test_triton_interpreter.py reads it. An outcome is the largest error in units of the case's bound
(right when at most 1), or the exception's text. Kernels are imported inside the cases: pytest
itself imports this file only for the names.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from fastllm.testing.infos.swiglu import away_from_limits
from fastllm.testing.moe_problem import ACTIVATIONS, activate

Case = Callable[[], float]
BF16, F32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", F32: "f32", torch.float16: "f16"}


def excess(y: Tensor, ref: Tensor, dtype: torch.dtype | None = None) -> float:
    """max|y - ref| over the bound: one unit in the last place of max|ref| in y's dtype.

    In fp32 the bound is 32 such units: sums of up to 1,000 terms round that often.
    """
    assert y.shape == ref.shape, f"{tuple(y.shape)} is not {tuple(ref.shape)}"
    assert dtype is None or y.dtype == dtype, f"{y.dtype} is not {dtype}"
    if ref.numel() == 0:
        return 0.0
    top = max(ref.abs().max().item(), 1e-30)
    ulp = 2.0 ** math.floor(math.log2(top)) * torch.finfo(y.dtype).eps
    bound = ulp * (32 if y.dtype == F32 else 1)
    return ((y.double() - ref).abs().max() / bound).item()


def same(a: Tensor, b: Tensor) -> float:
    """0 when a and b are equal bit for bit, else infinity."""
    return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else math.inf


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Normal values, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


# --- element-wise ops ---------------------------------------------------------------------------


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def rms_norm_case(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype | None) -> float:
    from fastllm.kernels.rms_norm import rms_norm

    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    return excess(rms_norm(x, weight, 1e-5, out), rms_norm_ref(x, weight, 1e-5), out or dtype)


def rms_norm_strided() -> float:
    """Heads of a fused qkv projection: [T, H, D] whose strides are neither packed nor mergeable."""
    from fastllm.kernels.rms_norm import rms_norm

    x = randn(5, 12, 32)[:, 2:9, :]
    weight = randn(32, seed=1)
    return excess(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))


def add_rms_norm_case(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    from fastllm.kernels.rms_norm import add_rms_norm

    x, residual = randn(*shape, dtype=dtype), randn(*shape, seed=2)
    weight = randn(shape[-1], dtype=dtype, seed=1)
    y, h = add_rms_norm(x, residual, weight, 1e-5)
    expected = residual + x.float()
    return max(same(h, expected), excess(y, rms_norm_ref(expected, weight, 1e-5), dtype))


def rope_case(dtype: torch.dtype, heads: int, dim: int, half: int) -> float:
    from fastllm.kernels.rope import rope

    x = randn(7, heads + 3, dim, dtype=dtype)[:, 1 : heads + 1]
    angle = randn(50, half, seed=3)
    cos, sin = angle.cos(), angle.sin()
    positions = torch.tensor([0, 3, 49, 7, 7, 1, 20], dtype=torch.int32)
    c, s = cos.double()[positions][:, None], sin.double()[positions][:, None]
    x1, x2, rest = x.double().split((half, half, dim - 2 * half), -1)
    ref = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s, rest), -1)
    return excess(rope(x, positions, cos, sin), ref, dtype)


def swiglu_case(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> float:
    from fastllm.kernels.swiglu import swiglu

    gate, up = gate_and_up(shape, dtype)
    return excess(
        swiglu(gate, up, activation), activate(gate.double(), up.double(), activation), dtype
    )


def gate_and_up(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Halves of one tensor, some beyond the limits of "swiglu_oai" and none near them."""
    both = away_from_limits(randn(*shape[:-1], 2 * shape[-1]) * 4).to(dtype)
    return both[..., : shape[-1]], both[..., shape[-1] :]


def embedding_case(dtype: torch.dtype, out: torch.dtype, ids_dtype: torch.dtype) -> float:
    from fastllm.kernels.embedding import embedding

    weight = randn(11, 70, dtype=dtype)
    ids = torch.tensor([[0, 10, 3], [3, 11, -1]], dtype=ids_dtype)
    ref = torch.zeros(2, 3, 70, dtype=F32)
    for i, j in product(range(2), range(3)):
        if 0 <= ids[i, j] < 11:
            ref[i, j] = weight[ids[i, j]].float()
    return same(embedding(ids, weight, out), ref.to(out))


# --- gradients and optimizer steps --------------------------------------------------------------


def rms_norm_gradients_ref(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.double()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n, g = x * rstd, dy.double() * weight.double()
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    return dx, (dy.double() * n).flatten(0, -2).sum(0)


def rms_norm_backward_case(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> float:
    from fastllm.kernels.rms_norm_backward import rms_norm_backward

    dy, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    x = randn(*shape[:-2], 2 * shape[-2], shape[-1], dtype=dtype, seed=2)
    x = x[..., : shape[-2], :] if strided else x[..., : shape[-2], :].contiguous()
    dx, dweight = rms_norm_backward(dy, x, weight, 1e-5, F32)
    ref, dweight_ref = rms_norm_gradients_ref(dy, x, weight, 1e-5)
    return max(excess(dx, ref, dtype), excess(dweight, dweight_ref, F32))


def add_rms_norm_backward_case(
    shape: tuple[int, ...], dtype: torch.dtype, with_dh: bool, frozen: bool
) -> float:
    from fastllm.kernels.rms_norm_backward import add_rms_norm_backward

    dy, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    dh, h = randn(*shape, seed=2) if with_dh else None, randn(*shape, seed=3)
    narrow, wanted = None if dtype == F32 else dtype, None if frozen else dtype
    found = add_rms_norm_backward(dy, dh, h, weight, 1e-5, narrow, wanted)
    ref, dweight_ref = rms_norm_gradients_ref(dy, h, weight, 1e-5)
    if dh is not None:
        ref = ref + dh.double()
    dx, dresidual, dweight = found
    assert (dx.numel() == 0) == (narrow is None) and (dweight.numel() == 0) == frozen
    errors = [excess(dresidual, ref, F32)]
    errors += [excess(dx, ref, dtype)] if narrow else []
    errors += [excess(dweight, dweight_ref, dtype)] if not frozen else []
    return max(errors)


def swiglu_backward_case(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> float:
    from fastllm.kernels.swiglu_backward import swiglu_backward

    dy, (gate, up) = randn(*shape, dtype=dtype, seed=1), gate_and_up(shape, dtype)
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    ref = torch.autograd.grad(activate(*leaves, activation), leaves, dy.double())
    return excess(swiglu_backward(dy, gate, up, activation), torch.cat(ref, -1), dtype)


def embedding_backward_case(dtype: torch.dtype, out: torch.dtype, ids_dtype: torch.dtype) -> float:
    from fastllm.kernels.embedding_backward import embedding_backward

    ids = torch.tensor([[0, 10, 3, 3], [3, 11, -1, 3], [3, 0, 3, 3]], dtype=ids_dtype)
    dy = randn(3, 4, 70, dtype=dtype)
    ref = torch.zeros(11, 70, dtype=torch.float64)
    for i, j in product(range(3), range(4)):
        if 0 <= ids[i, j] < 11:
            ref[ids[i, j]] += dy[i, j].double()
    return excess(embedding_backward(dy, ids, 11, out), ref, out)


def adamw_case(dtype: torch.dtype, grad_dtype: torch.dtype, scaled: bool) -> float:
    from fastllm.kernels.adamw import adamw_step

    weight, mean, grad = (randn(1100, seed=i) for i in range(3))
    square = randn(1100, seed=3).square()
    param, grad = weight.to(dtype), grad.to(grad_dtype)
    master = None if dtype == F32 else weight.clone()
    scale = torch.tensor(0.25) if scaled else None
    g = grad.double() * (0.25 if scaled else 1.0)
    new_mean = 0.9 * mean.double() + 0.1 * g
    new_square = 0.95 * square.double() + 0.05 * g * g
    root = (new_square / (1 - 0.95**3)).sqrt() + 1e-8
    ref = weight.double() * (1 - 0.01 * 0.1) - 0.01 * new_mean / (1 - 0.9**3) / root
    adamw_step(param, master, mean, square, grad, scale, 0.01, 0.9, 0.95, 1e-8, 0.1, 3)
    rounded = 0.0 if master is None else same(param, master.to(dtype))
    stepped = param if master is None else master
    errors = [excess(stepped, ref, F32), excess(mean, new_mean), excess(square, new_square)]
    return max(rounded, *errors)


def sum_of_squares_case(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    from fastllm.kernels.sum_of_squares import sum_of_squares

    x = randn(*shape, dtype=dtype)
    return excess(sum_of_squares(x), x.double().square().sum(), F32)


# --- products ---------------------------------------------------------------------------------


def linear_case(
    dtype: torch.dtype,
    m: int,
    n: int = 70,
    k: int = 100,
    bias: bool = False,
    out: torch.dtype | None = None,
    **mode: bool,
) -> float:
    from fastllm.kernels.linear import linear

    x = randn(m, k + 12, dtype=dtype)[:, :k]
    weight = randn(n, k, dtype=dtype, seed=6)
    b = randn(n, dtype=dtype, seed=4) if bias else None
    ref = x.double() @ weight.double().T + (b.double() if bias else 0)
    return excess(linear(x, weight, b, out, **mode), ref, out or dtype)


# --- sampling -----------------------------------------------------------------------------------


def philox(seed: int, counter: tuple[int, int, int, int]) -> int:
    """First word of Philox4x32-10, from the definition, in Python integers."""
    mask = 0xFFFFFFFF
    c, k = list(counter), [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high & mask, low >> 32 ^ c[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[0]


def philox_known_answer() -> float:
    """The published vector of Random123 (all-zero key and counter), then the kernel's words.

    Over equal logits the id with the largest word is drawn.
    """
    from fastllm.kernels import sampling

    assert philox(0, (0, 0, 0, 0)) == 0x6627E8D5, hex(philox(0, (0, 0, 0, 0)))
    seed, position, vocab = 0x9ABCDEF0_12345678 - 2**64, 77, 600
    params = sampling_parameters(1, vocab, temperature=1.0, seed=seed, position=position)
    ids, _, _ = sampling.sampling(torch.zeros(1, vocab), **params)
    words = [philox(seed, (i, position, 0, 0)) for i in range(vocab)]
    return 0.0 if ids.item() == words.index(max(words)) else math.inf


def sampling_parameters(rows: int, vocab: int, **values: float) -> dict[str, Tensor]:
    """All parameter buffers of `sampling`, off unless given."""
    defaults = {
        "temperature": (0.0, F32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, F32),
        "min_p": (0.0, F32),
        "repetition": (1.0, F32),
        "presence": (0.0, F32),
        "frequency": (0.0, F32),
        "seed": (0, torch.int64),
        "position": (0, torch.int32),
        "penalized": (0, torch.uint8),
    }
    buffers = {
        name: torch.full((rows,), values.get(name, value), dtype=dtype)
        for name, (value, dtype) in defaults.items()
    }
    buffers["counts"] = torch.zeros((rows, vocab), dtype=torch.int32)
    buffers["in_prompt"] = torch.zeros((rows, vocab), dtype=torch.uint8)
    buffers["banned"] = torch.full((rows, 3), -1, dtype=torch.int32)
    return buffers


def processed_ref(logits: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Logits after bans, penalties and temperature, float64."""
    x = logits.double()
    for row in range(len(x)):
        x[row, p["banned"][row][p["banned"][row] >= 0].long()] = -math.inf
        if p["penalized"][row]:
            count, r = p["counts"][row], p["repetition"][row].double()
            seen = (count > 0) | (p["in_prompt"][row] > 0)
            x[row] = torch.where(seen, torch.where(x[row] > 0, x[row] / r, x[row] * r), x[row])
            x[row] -= p["presence"][row].double() * (count > 0)
            x[row] -= p["frequency"][row].double() * count
        if p["temperature"][row] > 0:
            x[row] /= p["temperature"][row].double()
    return x


def kept_ref(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Mask of the scores z[V] that min-p, top-k, top-p keep in this order."""
    kept = z.exp() >= min_p * z.max().exp() if min_p > 0 else torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < len(z):
        kept &= z >= z.topk(top_k).values[-1]
    if top_p < 1:
        p = torch.where(kept, z, -math.inf).softmax(-1)
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        last = p[order][before < top_p][-1] if top_p > 0 else p.max()
        kept &= p >= last
    return kept


def sampling_case(vocab: int, rows: int = 3, **values: float) -> float:
    """Id, log-probs and counts of each row against the definition; noise from the reference."""
    from fastllm.kernels.sampling import sampling

    logits = randn(rows, vocab, seed=11) * 4
    p = sampling_parameters(rows, vocab, **values)
    p["seed"] += torch.arange(rows)
    if values.get("penalized"):
        p["counts"] = (randn(rows, vocab, seed=12) > 1.5).int() * 2
        p["in_prompt"] = (randn(rows, vocab, seed=13) > 1).to(torch.uint8)
        p["banned"][0, :2] = logits[0].topk(2).indices.int()
    z = processed_ref(logits, p)
    expected = []
    for row in range(rows):
        score = z[row].clone()
        if p["temperature"][row] > 0:
            kept = kept_ref(z[row], *(p[name][row].item() for name in ("top_k", "top_p", "min_p")))
            words = [
                philox(p["seed"][row].item(), (i, p["position"][row].item(), 0, 0))
                for i in range(vocab)
            ]
            u = (torch.tensor(words, dtype=torch.float64) + 0.5) / 2**32
            score = torch.where(kept, score - (-u.log()).log(), -math.inf)
        expected.append(score.argmax().item())
    counts = p["counts"].clone()
    ids, logprob, logprob_t = sampling(logits, **p)
    at = torch.tensor(expected)[:, None]
    if p["penalized"].any():
        counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))
    assert ids.tolist() == expected, f"{ids.tolist()} is not {expected}"
    return max(
        same(p["counts"], counts),
        excess(logprob, logits.double().log_softmax(-1).gather(1, at)[:, 0], F32),
        excess(logprob_t, z.log_softmax(-1).gather(1, at)[:, 0], F32),
    )


def sampling_cutoff_case(vocab: int, ties: bool, **values: float) -> float:
    """Over 24 seeds only kept ids are drawn, and more than one when more than one is kept."""
    from fastllm.kernels.sampling import sampling

    rows = 24
    logits = randn(1, vocab, seed=14).expand(rows, vocab).contiguous() * 2
    if ties:
        logits = logits.round()
    p = sampling_parameters(rows, vocab, temperature=1.0, **values)
    p["seed"] += torch.arange(rows)
    top_k, top_p = int(values.get("top_k", 0)), values.get("top_p", 1.0)
    kept = kept_ref(logits[0].double(), top_k, top_p, values.get("min_p", 0.0))
    drawn = set(sampling(logits, **p)[0].tolist())
    assert all(kept[i] for i in drawn), f"{drawn} holds ids that are cut off"
    assert (len(drawn) > 1) == (int(kept.sum()) > 1), f"{len(drawn)} of {int(kept.sum())} drawn"
    return 0.0


def sampling_bad_rows() -> float:
    """Rows with NaN, +inf or nothing finite give -1 alone; equal maxima give the lowest id."""
    from fastllm.kernels.sampling import sampling

    logits = randn(5, 1030)
    logits[0, 700] = math.nan
    logits[1, [600, 1029]] = 50.0
    logits[3, 2] = math.inf
    logits[4] = -math.inf
    p = sampling_parameters(5, 1030, penalized=1)
    ids, logprob, logprob_t = sampling(logits, **p)
    bad = [True, False, False, True, True]
    assert ids.tolist() == [-1, 600, logits[2].argmax().item(), -1, -1], ids.tolist()
    assert logprob.isnan().tolist() == logprob_t.isnan().tolist() == bad
    return 0.0 if p["counts"].sum(1).tolist() == [0, 1, 1, 0, 0] else math.inf


def sampling_without_counts() -> float:
    """counts and in_prompt of no rows: no penalties, whatever `penalized` says."""
    from fastllm.kernels.sampling import sampling

    logits = randn(2, 70)
    p = sampling_parameters(2, 70, penalized=1, presence=9.0)
    p["counts"], p["in_prompt"] = p["counts"][:0], p["in_prompt"][:0]
    return same(sampling(logits, **p)[0], logits.argmax(1).int())


def gumbel_margins() -> float:
    """The noise, read off draws between two ids whose scores differ by 1e-4 either way."""
    from fastllm.kernels.sampling import sampling

    rows = 40
    p = sampling_parameters(rows, 2, temperature=1.0, seed=3)
    p["position"] += torch.arange(rows, dtype=torch.int32) * 100
    words = [
        [philox(3, (i, position, 0, 0)) for i in range(2)] for position in p["position"].tolist()
    ]
    u = (torch.tensor(words, dtype=torch.float64) + 0.5) / 2**32
    noise = -(-u.log()).log()
    # Offset the second logit so that the two scores differ by a tiny margin, either way.
    margin = torch.where(torch.arange(rows) % 2 == 0, 1e-4, -1e-4)
    logits = torch.stack((torch.zeros(rows), (noise[:, 0] - noise[:, 1] + margin).float()), 1)
    return same(sampling(logits, **p)[0], (margin > 0).int())


def top_log_probs_case(vocab: int, k: int) -> float:
    from fastllm.kernels.log_probs import top_log_probs

    logits = (randn(3, vocab) * 4).round() / 4  # ties
    values, ids = top_log_probs(logits, k)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    ref = logits.double().log_softmax(-1).gather(1, order)
    return max(same(ids, order.int()), excess(values, ref, F32))


def top_log_probs_of_bad_rows() -> float:
    from fastllm.kernels.log_probs import top_log_probs

    logits = randn(4, 700)
    logits[0, 650], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    values, ids = top_log_probs(logits, 3)
    refused = (ids[:3] == -1).all() and values[:3].isnan().all()
    right = torch.equal(ids[3].long(), logits[3].topk(3).indices) and values[3].isfinite().all()
    return 0.0 if refused and right else math.inf


def lora_add_case(dtype: torch.dtype, sizes: tuple[int, int, int]) -> float:
    from fastllm.kernels.lora_add import lora_add

    m, n, r = sizes
    t, b, base = randn(m, r, dtype=dtype), randn(n, r, dtype=dtype), randn(m, n + 9)[:, 3 : n + 3]
    ref = base.double() + 0.5 * (t.double() @ b.double().T)
    return excess(lora_add(t, b, base, 0.5), ref, dtype)


def log_probs_case(vocab: int) -> float:
    from fastllm.kernels.log_probs import log_probs

    logits = randn(3, vocab + 5)[:, :vocab]
    ids = torch.tensor([[0, vocab - 1], [vocab // 2, 1], [3, 3]])
    return excess(log_probs(logits, ids), logits.double().log_softmax(-1).gather(1, ids), F32)


# --- the tables ---------------------------------------------------------------------------------


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    cases: dict[str, Case] = {}

    def add(name: str, run: Callable[..., float], *args: object, **kwargs: object) -> None:
        cases[name] = lambda: run(*args, **kwargs)

    for dtype in (F32, BF16):
        d = NAMES[dtype]
        for shape in ((1, 1), (3, 100), (2, 3, 64), (2, 576), (0, 8)):
            add(f"rms_norm {d} {shape}", rms_norm_case, shape, dtype, None)
        for shape in ((3, 100), (5, 64)):
            add(f"add_rms_norm {d} {shape}", add_rms_norm_case, shape, dtype)
        add(f"rope {d} partial", rope_case, dtype, 3, 20, 6)
        add(f"rope {d} whole", rope_case, dtype, 5, 64, 32)
        for shape in ((3, 100), (2, 2, 1030), (0, 4)):
            add(f"swiglu {d} {shape}", swiglu_case, shape, dtype, "silu")
        for m in (0, 1, 17, 40):
            add(f"linear {d} m={m}", linear_case, dtype, m)
        for sizes in ((3, 70, 8), (66, 33, 40)):
            add(f"lora_add {d} {sizes}", lora_add_case, dtype, sizes)
        add(f"linear {d} bias", linear_case, dtype, 5, bias=True, out=F32)
        add(f"linear {d} split K", linear_case, dtype, 3, k=1030, bias=True, batch_invariant=False)
        for shape in ((3, 100), (300, 24)):
            add(f"rms_norm_backward {d} {shape}", rms_norm_backward_case, shape, dtype, False)
        add(f"rms_norm_backward {d} strided", rms_norm_backward_case, (5, 3, 64), dtype, True)
        add(f"add_rms_norm_backward {d}", add_rms_norm_backward_case, (5, 64), dtype, True, False)
        alone = ((40, 100), dtype, False, d == "bf16")
        add(f"add_rms_norm_backward {d} alone", add_rms_norm_backward_case, *alone)
        for name in ACTIVATIONS:
            add(f"swiglu {d} {name}", swiglu_case, (2, 300), dtype, name)
            add(f"swiglu_backward {d} {name}", swiglu_backward_case, (2, 2, 1030), dtype, name)
        add(f"sum_of_squares {d}", sum_of_squares_case, (3, 6000), dtype)
        add(f"adamw {d}", adamw_case, dtype, F32, True)
    wide = ((17, 9000), BF16, True, False)
    add("add_rms_norm_backward wide", add_rms_norm_backward_case, *wide)
    add("adamw bf16 gradient", adamw_case, BF16, BF16, False)
    add("sum_of_squares empty", sum_of_squares_case, (0, 4), F32)
    add("embedding_backward bf16", embedding_backward_case, BF16, F32, torch.int64)
    add("embedding_backward f32", embedding_backward_case, F32, BF16, torch.int32)
    add("rms_norm f32 to bf16", rms_norm_case, (3, 100), F32, BF16)
    add("rms_norm strided", rms_norm_strided)
    add("embedding bf16", embedding_case, BF16, F32, torch.int64)
    add("embedding f16", embedding_case, torch.float16, BF16, torch.int32)
    add("sampling greedy", sampling_case, 1000)
    add(
        "sampling penalties",
        sampling_case,
        600,
        penalized=1,
        repetition=1.3,
        presence=0.5,
        frequency=0.2,
    )
    add("sampling temperature", sampling_case, 600, temperature=0.8, seed=2**40 + 5, position=9)
    add("sampling truncated", sampling_case, 600, temperature=1.5, top_k=9, top_p=0.9, min_p=0.01)
    add("sampling top-k", sampling_cutoff_case, 520, False, top_k=3)
    add("sampling top-k ties", sampling_cutoff_case, 520, True, top_k=2)
    add("sampling top-p", sampling_cutoff_case, 520, False, top_p=0.35)
    add("sampling min-p", sampling_cutoff_case, 520, False, min_p=0.4)
    add("sampling top-p 0", sampling_cutoff_case, 520, False, top_p=0.0)
    add("sampling philox", philox_known_answer)
    add("sampling bad rows", sampling_bad_rows)
    add("sampling without counts", sampling_without_counts)
    add("sampling noise", gumbel_margins)
    add("top_log_probs", top_log_probs_case, 700, 4)
    add("top_log_probs all", top_log_probs_case, 5, 5)
    add("top_log_probs bad rows", top_log_probs_of_bad_rows)
    add("log_probs", log_probs_case, 1300)
    return cases


def full_cases() -> dict[str, Case]:
    """Further shapes for the full run, among them every tile of the tables."""
    cases: dict[str, Case] = {}
    for dtype, m, n, k in product((F32, BF16), (33, 65, 129), (3, 130), (31, 64, 200)):
        cases[f"linear {NAMES[dtype]} {m}x{n}x{k}"] = lambda a=(dtype, m, n, k): linear_case(*a)
    for vocab, top_k, top_p, min_p in product((7, 4100), (0, 1, 50), (0.2, 0.99, 1.0), (0.0, 0.1)):
        values = {"temperature": 0.7, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        name = f"sampling V={vocab} " + " ".join(f"{k}={v}" for k, v in values.items())
        cases[name] = lambda v=vocab, p=values: sampling_case(v, 2, **p)
    return cases


def main(
    quick: Callable[[], dict[str, Case]] = quick_cases,
    full: Callable[[], dict[str, Case]] = full_cases,
) -> None:
    """Runs all cases, or with --names those listed in stdin (JSON); prints {name: outcome}."""
    torch.set_num_threads(1)
    outcomes = {}
    cases = quick() | full()
    names = json.load(sys.stdin) if "--names" in sys.argv else list(cases)
    for name in names:
        run = cases[name]
        start = time.perf_counter()
        try:
            outcome = {"excess": run()}
        except BaseException:
            outcome = {"failure": traceback.format_exc(limit=-4)}
        outcomes[name] = outcome | {"seconds": round(time.perf_counter() - start, 2)}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()

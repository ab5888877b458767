"""Codes and scales of a dense weight in every quantized format, packed for its device.

What they are is defined in `quantize_rules` (one rule to a format) and `quantize_search` (scales
that make the weighted squared error small). All arithmetic is elementwise over rows, so the native
kernel's bits are the reference's at every instruction-set level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .quant_format import QUANT_FORMATS
from .quantize_rules import encode
from .registry import FLOATS, Op

TOO_LARGE = 2.0**32  # no fp16 scale of any format reaches values like this


def quantize_ref(
    w: Tensor, format: str, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `quantize`: (data, scales, bad).

    bad: int64 [2]: the first row that is not finite and the first with a scale too large for fp16;
    n where there is none.
    """
    per_group = layout.ROWS_PER_GROUP[w.device.type]
    # Negative zeros become zeros.
    codes, parts = encode(w.float() + 0.0, format, importance)
    return *layout.pack_parts(codes, parts, format, per_group), _bad_rows(w, format, parts)


def _bad_rows(w: Tensor, format: str, parts: Sequence[Tensor]) -> Tensor:
    """`bad` of a weight and the parts of its scales."""
    n, k = w.shape
    peaks = w.abs().amax(1) if k else w.new_zeros(n)
    finite = torch.isfinite(peaks)
    too_large = torch.zeros_like(finite)
    if QUANT_FORMATS[format].scale_fields(k)[0][0] == torch.float16:
        too_large = finite & (peaks.float() >= TOO_LARGE)
        for part in parts:
            if part.is_floating_point():
                too_large |= finite & ~torch.isfinite(part).flatten(1).all(1)
    rows = torch.arange(n + 1, device=w.device)
    found = [torch.where(mask, rows[:n], n) for mask in (~finite, too_large)]
    return torch.stack([torch.cat([each, rows[n:]]).min() for each in found])


def _outputs(w: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*w.shape, layout.ROWS_PER_GROUP[w.device.type])
    return (
        w.new_empty(layout.data_shape(format, *shape), dtype=torch.uint8),
        w.new_empty(layout.scales_shape(format, *shape), dtype=layout.scales_dtype(format)),
        w.new_empty(2, dtype=torch.int64),
    )


def _fake(w: Tensor, format: str, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(w, format)


_quantize = Op(
    "quantize(Tensor w, str format, Tensor? importance) -> (Tensor, Tensor, Tensor)",
    quantize_ref,
    fake=_fake,
    variant=lambda w, format, importance: format,
)


def _rows_contiguous(w: Tensor, format: str, importance: Tensor | None) -> bool:
    return w.stride(1) == 1 and (importance is None or importance.stride(-1) == 1)


@_quantize.impl("native", "cpu", dtypes=FLOATS, variants=layout.QUANTIZED, when=_rows_contiguous)
def _quantize_cpu(
    w: Tensor, format: str, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    data, scales, bad = _outputs(w, format)
    bad.fill_(w.shape[0])
    _C.quantize(data, scales, bad, w, importance, layout.FORMATS.index(format))
    return data, scales, bad


@_quantize.impl("triton", "cuda", dtypes=FLOATS, variants=layout.QUANTIZED, when=_rows_contiguous)
def _quantize_cuda(
    w: Tensor, format: str, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import quantize as kernel

    data, scales, _ = _outputs(w, format)
    kernel.quantize(w, format, importance, data, scales)
    parts = layout.split_scales(scales, format, *w.shape)
    return data, scales, _bad_rows(w, format, parts)


def quantize(w: Tensor, format: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight, in the packed layout of its device.

    GGUF's formats of 32 columns have their own rule without importances (the bytes of llama.cpp's
    files), and int8 (largest magnitude / 127), fp8 (/ 448) and nf4 (/ 1) always have theirs. The
    others, and q4_0 to q8_0 with importances, search the scales that make
    `sum importance (w - value)^2` small. Zeros stay zero.

    What `dequantize` makes of the result and `quantize` made without importances comes back bit
    for bit in q4_0, q5_0, q8_0, int8, nf4, fp8 and fp8_block, and in value in int4 and nf4_dq. Not
    in K-quants and int4_asym, whose scales are searched anew: of random normal values a few in a
    hundred change in q4_k and q5_k, a few in a thousand in q6_k and int4_asym_g32. Values on a
    K-quant's grid come back where every sub-block holds its first code and one of the last four,
    and a 6-bit scale is 63.

    Args:
        w: `[n, k]`, float32, bfloat16 or float16, finite.
        format: a quantized format of `fastllm.ops.quant_format`, whose multiple k must be.
        importance: `[k]` or `[n, k]` weights of squared errors, not negative, of any scale; None:
            all alike. A group of columns in which all are 0 (together at most 2^-40 of the
            largest) counts every column alike, and little beside others of a super-block. int8,
            nf4 and fp8 formats do not use it.

    Returns:
        (data, scales) as described in `fastllm.ops.packed_layout`.

    Raises:
        ValueError: on arguments of another shape, dtype or device; on a row that holds NaN or
            infinity, or needs a scale too large for fp16, naming the row. Under `torch.compile`
            values are not checked.
    """
    name = _check(w, format)
    weights = None if importance is None else _normalized(importance, w)
    w = w.detach()
    w = w if w.stride(1) == 1 else w.contiguous()
    data, scales, bad = _quantize(w, name, weights)
    if torch.compiler.is_compiling():  # values are not known, and are the caller's to check
        return data, scales
    not_finite, too_large = bad.tolist()
    if not_finite < w.shape[0]:
        raise ValueError(f"row {not_finite} of w holds NaN or infinity and cannot be quantized")
    if too_large < w.shape[0]:
        raise ValueError(
            f"row {too_large} of w holds values too large for the fp16 scales of {name}"
        )
    return data, scales


def _check(w: Tensor, format: str) -> str:
    layout.check_format(format)
    if format in layout.DENSE:
        raise ValueError(f"format {format!r} is dense: `fastllm.quantize.packed.pack` takes it")
    if w.dim() != 2 or w.dtype not in FLOATS:
        raise ValueError(
            f"w must be float32, bfloat16 or float16 [n, k], got {w.dtype} of {tuple(w.shape)}"
        )
    if w.device.type not in layout.ROWS_PER_GROUP:
        raise ValueError(f"w is on {w.device}: packed weights are on 'cpu' or 'cuda'")
    multiple = QUANT_FORMATS[format].multiple
    if w.shape[1] % multiple:
        raise ValueError(
            f"w has rows of {w.shape[1]} columns, {format} takes multiples of {multiple} "
            "(`fastllm.ops.quant_format.fit` names what fits)"
        )
    return format


def _normalized(importance: Tensor, w: Tensor) -> Tensor:
    """Checked importances, the largest of which is 1: sums of them neither overflow nor vanish."""
    if tuple(importance.shape) not in ((w.shape[1],), tuple(w.shape)):
        raise ValueError(
            f"importance must be [{w.shape[1]}] or {list(w.shape)}, got {list(importance.shape)}"
        )
    if importance.dtype != torch.float32 or importance.device != w.device:
        raise ValueError(
            f"importance must be float32 on {w.device}, "
            f"got {importance.dtype} on {importance.device}"
        )
    if not importance.numel():
        return importance
    importance = importance.detach().contiguous()
    if torch.compiler.is_compiling():
        peak = importance.amax()
        return importance / torch.where(peak > 0, peak, 1.0)
    least, most = (float(bound) for bound in importance.aminmax())
    if not 0.0 <= least <= most < float("inf"):
        raise ValueError("importance must be finite and not negative")
    return importance / most if most else importance

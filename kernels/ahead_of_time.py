"""Compiles every kernel at its shipped configurations, without a GPU, and reports its resources.

The launchers themselves run, on meta tensors of model-sized shapes, and their launches are
recorded instead of made: what is compiled is what they would launch. `ptxas` of the Triton
installation then gives registers and spills. `python -m fastllm.kernels.ahead_of_time [sm_90]`
prints the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from . import (
    adamw,
    embedding,
    embedding_backward,
    head_linear,
    linear,
    lm_head,
    log_probs,
    lora_add,
    mla_attention,
    rms_norm,
    rms_norm_backward,
    rope,
    sampling,
    sum_of_squares,
    swiglu,
    swiglu_backward,
    tuning,
)
from .attention_launches import attention_launches
from .moe_activation import ACTIVATIONS
from .moe_gate_launches import gate_launches
from .moe_launches import moe_launches
from .quant_launches import quant_launches

KERNEL_MODULES = (
    "adamw",
    "append_kv",
    "attention_forward",
    "attention_backward",
    "attention_key_gradients",
    "attention_query_gradients",
    "dequantize",
    "embedding",
    "embedding_backward",
    "grouped_matmul",
    "grouped_weight_grad",
    "head_linear",
    "linear",
    "lm_head",
    "log_probs",
    "lora_add",
    "mla_attention",
    "moe",
    "moe_backward",
    "moe_dispatch",
    "moe_plan",
    "moe_gate",
    "moe_gate_backward",
    "paged_attention",
    "quant_activation",
    "quant_matmul",
    "quant_matmul_input_grad",
    "quant_moe",
    "quant_moe_backward",
    "quantize",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "sampling",
    "sum_of_squares",
    "swiglu",
    "swiglu_backward",
)
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
}
_PRODUCT = re.compile(r"\b(wgmma|mma)\.\S*?\.(m\d+)n\d+(k\d+)")
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One specialization of a kernel: what Triton would compile for a launch."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel name, pointer types and tile constants: `linear_kernel[bf16 BLOCK_N=64 ...]`."""
        types = [t[1:] for t in self.signature.values() if t.startswith("*")]
        shown = {k: v for k, v in self.constexprs.items() if k.isupper()} | self.options
        constants = " ".join(f"{key}={value}" for key, value in shown.items())
        return f"{self.kernel.__name__}[{','.join(types[:3])} {constants}]"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: bytes of shared memory, registers a thread, spilled bytes.

    products: its matrix instructions without their width, such as "wgmma m64 k16"; serialized:
    ptxas has put waits between its wgmma instructions.
    """

    name: str
    arch: int
    shared: int
    registers: int
    spills: int
    products: tuple[str, ...]
    serialized: bool


def shipped_launches() -> dict[str, Callable[[], Any]]:
    """Calls that between them launch every kernel with every shipped tile configuration.

    Shapes are those of a Llama 8B layer (hidden 4096, 32/8 heads of 128, vocabulary 128,256)
    and of SmolLM2-135M (hidden 576, 9/3 heads of 64); MLA has DeepSeek's 512 + 64 columns.
    """
    bf16, f32 = torch.bfloat16, torch.float32
    x8 = {m: _meta(m, 4096) for m in (1, 32, 64, 2048)}
    calls: dict[str, Callable[[], Any]] = {
        **attention_launches(),
        **moe_launches(),
        **quant_launches(),
        "rms_norm": lambda: rms_norm.rms_norm(_meta(8, 576, dtype=f32), _meta(576), 1e-5, bf16),
        "rms_norm heads": lambda: rms_norm.rms_norm(_meta(8, 32, 128), _meta(128), 1e-5),
        "rms_norm wide": lambda: rms_norm.rms_norm(_meta(8, 16384), _meta(16384), 1e-5),
        "add_rms_norm": lambda: rms_norm.add_rms_norm(
            _meta(8, 4096), _meta(8, 4096, dtype=f32), _meta(4096), 1e-5
        ),
        "rope": lambda: rope.rope(_meta(8, 32, 128), *_rope_tables(64)),
        "rope partial": lambda: rope.rope(_meta(8, 32, 128, dtype=f32), *_rope_tables(32)),
        "lora_add": lambda: lora_add.lora_add(
            _meta(8, 16), _meta(4096, 16), _meta(8, 4096, dtype=f32), 2.0
        ),
        "embedding": lambda: embedding.embedding(_ids(8), _meta(128256, 4096), f32),
        "rms_norm_backward": lambda: rms_norm_backward.rms_norm_backward(
            _meta(2048, 4096), _meta(2048, 4096), _meta(4096), 1e-5, bf16
        ),
        "rms_norm_backward heads": lambda: rms_norm_backward.rms_norm_backward(
            _meta(2048, 32, 128), _meta(2048, 32, 128), _meta(128), 1e-5, f32
        ),
        "add_rms_norm_backward": lambda: _add_rms_norm_backward(8192),
        "add_rms_norm_backward wide": lambda: _add_rms_norm_backward(16384),
        "embedding_backward": lambda: embedding_backward.embedding_backward(
            _meta(2048, 4096, dtype=f32), _ids(2048), 128256, bf16
        ),
        "adamw bf16": lambda: _adamw(bf16, f32),
        "adamw f32": lambda: _adamw(f32, f32),
        "sum_of_squares": lambda: sum_of_squares.sum_of_squares(_meta(4096, 4096, dtype=f32)),
        "sampling": lambda: _sampling(8, 128256),
        "top_log_probs": lambda: log_probs.top_log_probs(_meta(8, 128256, dtype=f32), 5),
        "log_probs": lambda: log_probs.log_probs(_meta(8, 128256, dtype=f32), _ids(8, 1)),
    }
    for act in ACTIVATIONS:
        row = _meta(8, 14336)
        calls[f"swiglu {act}"] = lambda x=row, a=act: swiglu.swiglu(x, x, a)
        backward = swiglu_backward.swiglu_backward
        calls[f"swiglu_backward {act}"] = lambda f=backward, x=row, a=act: f(x, x, x, a)
    for m, x in x8.items():
        calls[f"linear bf16 m={m}"] = lambda x=x: linear.linear(x, _meta(4096, 4096))
    for m in (1, 64):
        x = _meta(m, 576, dtype=f32)
        calls[f"linear f32 m={m}"] = lambda x=x: linear.linear(x, _meta(576, 576, dtype=f32))
    calls["linear bf16 m=1 fast"] = lambda: linear.linear(
        x8[1], _meta(4096, 4096), batch_invariant=False
    )
    for m in (8, 2048):
        calls[f"head_linear absorb m={m}"] = lambda m=m: _head_linear(m, 128, 512, 64)
        calls[f"head_linear values m={m}"] = lambda m=m: _head_linear(m, 512, 128, 0)
    calls |= _lm_head_launches() | gate_launches()
    calls["append_mla"] = lambda: _append_mla()
    for heads, dtype, fast in ((16, bf16, False), (128, bf16, True), (16, f32, False)):
        for phase, n_tokens in (("prefill", 2048), ("decode", 8)):
            name = f"mla {phase} {heads} {'bf16' if dtype == bf16 else 'f32'}"
            calls[name + " fast" * fast] = lambda s=(n_tokens, heads, dtype, not fast): _mla(*s)
    return calls


def _lm_head_launches() -> dict[str, Callable[[], Any]]:
    """The rows of a chunk of logits: with every option, and the common calls."""
    rows, vocab = 512, 128256
    f32, d = torch.float32, _meta(rows, vocab)
    z, t = _meta(rows, vocab, dtype=f32), _meta(rows, vocab, dtype=f32)
    lse, targets = _meta(rows, dtype=f32), _meta(rows, dtype=torch.int64)
    four = _meta(rows, 4, dtype=f32)
    calls: dict[str, Callable[[], Any]] = {}
    for walk in (False, True):
        calls[f"loss_rows walk={walk}"] = lambda w=walk: lm_head.loss_rows(z, targets, 0.0, 1.0, w)
    for softcap in (0.0, 30.0):
        calls[f"target_gradient cap={softcap:g}"] = lambda c=softcap: lm_head.target_gradient_rows(
            d, z, targets, lse, four, c, 0.7
        )
        calls[f"scale_logits cap={softcap:g}"] = lambda c=softcap: lm_head.scale_logits(z, c, 0.7)
    for kind in lm_head.KINDS:
        calls[f"kl_rows {kind}"] = lambda k=kind: lm_head.kl_rows(z, lse, t, lse, k, 0.5)
        calls[f"kl_gradient {kind}"] = lambda k=kind: lm_head.kl_gradient_rows(
            d, lse, lse, z, lse, t, lse, k, 0.5, 30.0, 0.7
        )
    return calls


def compile_all(names: list[str], archs: tuple[int, ...], workers: int = 2) -> list[Resources]:
    """Resources of every distinct kernel launched by the named calls, compiled in processes."""
    jobs = [(name, arch) for arch in archs for name in names]
    with ProcessPoolExecutor(workers) as pool:
        found = [r for part in pool.map(_compile_named, jobs) for r in part]
    return list(dict.fromkeys(found))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are appended to the list instead of being made."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(kernel, args, kwargs))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compiles one specialization for sm_<arch> and asks ptxas for its resources."""
    index = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        launch.kernel,
        launch.signature,
        {(index[name],): value for name, value in launch.constexprs.items()},
        {(index[name],): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    log = _ptxas(ptx, arch)
    return Resources(
        name=launch.name,
        arch=arch,
        shared=compiled.metadata.shared,
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        products=tuple(sorted({f"{op} {m} {k}" for op, m, k in _PRODUCT.findall(ptx)})),
        serialized="serialized" in log,
    )


def _compile_named(job: tuple[str, int]) -> list[Resources]:
    name, arch = job
    tuning.assumed_architecture = arch
    with recorded() as launches:
        shipped_launches()[name]()
    return [compile_launch(launch, arch) for launch in launches]


def _ptxas(ptx: str, arch: int) -> str:
    """What ptxas -v says of the code: registers, spills, warnings."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [ptxas, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The specialization Triton's own dispatcher would choose for these arguments."""
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    signature, constexprs, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPE_NAMES[value.dtype]
            divisible.append(name)
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPE_NAMES[value.base.dtype]}[{block}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return Launch(kernel, signature, constexprs, tuple(divisible), options)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _rope_tables(half: int) -> tuple[Tensor, Tensor, Tensor]:
    table = _meta(4096, half, dtype=torch.float32)
    return _ids(8), table, table


def _add_rms_norm_backward(n: int) -> tuple[Tensor, Tensor, Tensor]:
    stream = _meta(2048, n, dtype=torch.float32)
    return rms_norm_backward.add_rms_norm_backward(
        _meta(2048, n), stream, stream, _meta(n), 1e-5, torch.bfloat16, torch.bfloat16
    )


def _adamw(dtype: torch.dtype, grad: torch.dtype) -> None:
    f32 = _meta(4096, 4096, dtype=torch.float32)
    master = None if dtype == torch.float32 else f32
    param, gradient, scale = _meta(4096, 4096, dtype=dtype), f32.to(grad), _meta(dtype=f32.dtype)
    adamw.adamw_step(param, master, f32, f32, gradient, scale, 1e-3, 0.9, 0.95, 1e-8, 0.1, 7)


def _head_linear(n_tokens: int, k: int, n: int, tail_dim: int) -> Tensor:
    x, tail = _meta(n_tokens, 16, k), _meta(n_tokens, 16, tail_dim) if tail_dim else None
    weight = _meta(16, 256, 512)  # of kv_b_proj: 128 rows make keys, 128 values
    return head_linear.head_linear(x, weight[:, :128].mT if tail_dim else weight[:, 128:], tail)


def _append_mla() -> None:
    places = _ids(8, 64), _ids(9), _ids(8)
    mla_attention.append_mla(_meta(8, 512), _meta(8, 64), _meta(64, 64, 576), *places)


def _mla(n_tokens: int, heads: int, dtype: torch.dtype, invariant: bool) -> Tensor:
    q, cache = _meta(n_tokens, heads, 576, dtype=dtype), _meta(64, 64, 576, dtype=dtype)
    places = _ids(8, 64), _ids(9), _ids(8)
    return mla_attention.mla_attention(q, cache, *places, 512, 0.1, batch_invariant=invariant)


def _sampling(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    f32, u8 = _meta(rows, dtype=torch.float32), _meta(rows, dtype=torch.uint8)
    return sampling.sampling(
        _meta(rows, vocab, dtype=torch.float32),
        temperature=f32,
        top_k=_ids(rows),
        top_p=f32,
        min_p=f32,
        repetition=f32,
        presence=f32,
        frequency=f32,
        seed=_meta(rows, dtype=torch.int64),
        position=_ids(rows),
        penalized=u8,
        counts=_ids(rows, vocab),
        in_prompt=_meta(rows, vocab, dtype=torch.uint8),
        banned=_ids(rows, 8),
    )


def main() -> None:
    """Prints one line per compiled kernel: architecture, registers, spills, shared memory."""
    archs = tuple(int(arch.removeprefix("sm_")) for arch in sys.argv[1:]) or (80, 90)
    for r in compile_all(list(shipped_launches()), archs):
        numbers = f"{r.registers:4d} registers {r.spills:5d} spilled {r.shared:7d} shared"
        products = ", ".join(r.products) + (" SERIALIZED" if r.serialized else "")
        print(f"sm_{r.arch} {numbers}  {products:16s} {r.name}")


if __name__ == "__main__":
    main()

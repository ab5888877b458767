"""`quantize_model`: quantize a model in memory, layer by layer, in place.

Modules of PyTorch become `QuantLinear`s; layers and experts of fastllm's own decoders get packed
weights alone, as a loader would leave them. Peak memory is the model and one layer more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.nn.linear import Linear, ParallelLinear
from fastllm.nn.moe import Experts
from fastllm.nn.quant_linear import QuantLinear, check_activation
from fastllm.quantize import fastllm_files
from fastllm.quantize.packed import PackedWeight, concat
from fastllm.quantize.quantizer import Quantizer, naming
from fastllm.quantize.rule import DEFAULT_SKIP, QuantReport, QuantRule

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks",
    "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def quantize_model(
    model: nn.Module,
    format: str,
    *,
    modules: str | re.Pattern[str] | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    activation: str | None = None,
    verbose: bool = False,
) -> QuantReport:
    """Quantize the linear layers of a model in place, rounding to nearest.

    Embeddings, norms, and what `skip` names stay as they are, and in models that others define so
    do stacked experts, subclasses of `torch.nn.Linear`, and layers whose weight is made of others
    (pruned, weight_norm, parametrized). Hooks of forward and backward stay. Adapters go on
    afterwards: `peft.get_peft_model` or `fastllm.nn.lora`.

    Args:
        model: any tree of modules with `torch.nn.Linear`s, such as a model of transformers, or a
            `fastllm.models.decoder.Decoder` of plain weights.
        format: a name or alias of `fastllm.ops.quant_format`: "nf4", "int4", "q4_k", "fp8", ...
        modules: a regular expression that is searched in the names of layers; None: all of them.
        skip: layers by their name or its last parts; heads and routers, if not given.
        activation: how inputs meet the codes, see `QuantLinear`. Default: "fp32" for float32
            weights, else "bf16"; decoders have one already.
        verbose: print the report.

    Returns:
        What each layer became, what it cost, and what was left; `print` shows a table. A
        FallbackWarning says so where rows did not fit the format and got another one.

    Raises:
        ValueError: on an unknown format or activation, if no layer is chosen, if the model has
            adapters, or if a weight holds NaN or infinity, naming it. The model is then as it was.
    """
    quantizer = Quantizer(QuantRule(format, modules, skip))
    if any(".lora_" in f".{name}" for name, _ in model.named_modules()):
        raise ValueError("the model has adapters: quantize it first, then put adapters on it")
    own = hasattr(model, "parallel_linears")
    if activation is not None and own:
        raise ValueError("activation belongs to the loaded model: load it with the one you want")
    report = quantizer.report
    report.bytes_before = _bytes(model)
    for name in _sharing(model):
        if quantizer.rule.chooses(name):
            report.keep(name, "shares its weight with another module")
            quantizer.leave.add(name)
    _note_others(model, quantizer)
    _check(model, quantizer, activation)
    for names in _names_of(model, _is_plain):
        _replace(model, names, quantizer, activation)
    _pack_layers(model, quantizer)
    if not report.layers:
        raise ValueError(
            f"no linear layer of the model is quantized (modules {modules!r}, skip {tuple(skip)}): "
            + _reasons(model, report)
        )
    if own:
        model.weights_changed()  # type: ignore[operator]
    else:
        _note_formats(model)
    report.bytes_after = _bytes(model)
    if verbose:
        print(report)
    report.warn()
    return report


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Make every `QuantLinear` of a model an `nn.Linear` of the dequantized values, in place.

    Adapters of PEFT on them stay, and can then be merged (`merge_and_unload`).

    Args:
        model: any tree of modules.
        dtype: of the weights; default what `QuantLinear.weight` has.

    Returns:
        How many layers there were.
    """
    found = _names_of(model, lambda module: isinstance(module, QuantLinear))
    for names in found:
        layer = model.get_submodule(names[0])
        assert isinstance(layer, QuantLinear), "just seen"
        plain = layer.dequantize()
        _put(model, names, plain if dtype is None else plain.to(dtype))
    _note_formats(model)
    return len(found)


def _note_formats(model: nn.Module) -> None:
    """Let a model of transformers save a config.json that tells the formats of its layers.

    fastllm loads such a directory.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return
    layers = {n: module for n, module in model.named_modules() if isinstance(module, QuantLinear)}
    if layers:
        noted = fastllm_files.config({name: layer.format for name, layer in layers.items()})
        modes = {layer.activation for layer in layers.values()}
        if len(modes) == 1:  # `from_pretrained` runs them in it
            noted["activation"] = modes.pop()
        config.quantization_config = noted
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def _sharing(model: nn.Module) -> list[str]:
    """Linear layers whose weight is another's too, as a tied LM head's is the embedding's."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(weight, []).append(name)
    shared = [name for names in owners.values() if len(names) > 1 for name in names]
    return [name for name in shared if isinstance(model.get_submodule(name), nn.Linear | Linear)]


def _is_plain(module: nn.Module) -> bool:
    """Whether it is PyTorch's own layer, under `fastllm.patch` too, and no subclass of it."""
    own = module._parameters  # what is pruned or has a weight norm is not among them
    return _kind(module) is nn.Linear and own.get("weight") is not None and "bias" in own


def _kind(module: nn.Module) -> type:
    """Its class, without `fastllm.patch`."""
    return getattr(type(module), "fastllm_original", type(module))


def _note_others(model: nn.Module, quantizer: Quantizer) -> None:
    """Report the linear layers that are not plain, which are never replaced."""
    for name, module in model.named_modules():
        if not name or not isinstance(module, nn.Linear) or _is_plain(module):
            continue
        why = f"it is a {_kind(module).__name__}, not torch.nn.Linear itself"
        if isinstance(module, QuantLinear):
            why = "it is quantized already"
        elif _kind(module) is nn.Linear:
            why = "its weight or bias is made of other parameters"
        quantizer.report.keep(name, why if quantizer.rule.chooses(name) else "not chosen")


def _reasons(model: nn.Module, report: QuantReport) -> str:
    """Why a model has no quantized layer."""
    if isinstance(model, nn.Linear):
        return "it is itself a linear layer, which fastllm.nn.QuantLinear.from_linear takes"
    kept = [f"{name} is kept, {why}" for name, why in report.kept[:3]]
    return "; ".join(kept) or "it has no linear layer"


def _names_of(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> list[list[str]]:
    """All names of each chosen module; names alone, so that a module that is replaced can go."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if chosen(module) and name:
            names.setdefault(module, []).append(name)
    return list(names.values())


def _check(model: nn.Module, quantizer: Quantizer, activation: str | None) -> None:
    """Raise for whatever would stop the work in the middle, before any layer is changed."""
    trial = Quantizer(quantizer.rule)  # whose report nobody reads
    trial.leave = quantizer.leave
    for name, weight in _plain_weights(model):
        format = trial.format_for(name, tuple(weight.shape))
        if format is None:
            continue
        if weight.is_meta:
            raise ValueError(f"{name}: its weight is on meta: load the model's weights first")
        if type(weight) is not Tensor:
            kind = type(weight).__name__
            raise ValueError(
                f"{name}: its weight is a {kind}: quantize a model before it is sharded"
            )
        with naming(name):
            check_activation(activation or _usual_activation(weight), format)
        if weight.dim() == 2:
            trial.check(name, weight, format)
        else:
            for e, one in enumerate(weight):
                trial.check(f"{name}, expert {e}", one, format)


def _plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that may be quantized: [n, k] of layers, [E, n, k] of fastllm's experts."""
    for name, *_ in _names_of(model, lambda m: _is_plain(m) or type(m) is Linear):
        weight = model.get_submodule(name).weight
        if isinstance(weight, Tensor):  # None: it is packed already
            yield name, weight.detach()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for part in ("gate_up_proj", "down_proj"):
                weight = getattr(module, part)
                if weight is not None:
                    yield f"{name}.{part}", weight.detach()


def _usual_activation(weight: Tensor) -> str:
    return "fp32" if weight.dtype == torch.float32 else "bf16"


def _replace(
    model: nn.Module, names: Sequence[str], quantizer: Quantizer, activation: str | None
) -> None:
    """One layer of PyTorch's."""
    linear = model.get_submodule(names[0])
    assert isinstance(linear, nn.Linear), "just seen"
    weight = linear.weight.detach()
    format = quantizer.format_for(names[0], tuple(weight.shape))
    if format is None:
        return
    mode = activation or _usual_activation(weight)
    packed = quantizer.pack(names[0], weight, format, weight.device)
    layer = QuantLinear.from_packed(packed, linear.bias, mode, weight.dtype)
    _put(model, names, layer.train(linear.training))


def _put(model: nn.Module, names: Sequence[str], layer: nn.Module) -> None:
    """Let a layer take the place of another, and the hooks of its calls."""
    old = model.get_submodule(names[0])
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(old, hooks))
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer)


def _pack_layers(model: nn.Module, quantizer: Quantizer) -> None:
    """Layers and experts of fastllm's own modules."""
    groups = {member: pair for pair in _groups(model) for member in pair[1].members}
    for name, module in list(model.named_modules()):
        if type(module) is Linear and module not in groups:
            _pack_linear(module, name, quantizer)
        elif isinstance(module, Experts):
            _pack_experts(module, name, quantizer)
    for name, group in dict.fromkeys(groups.values()):
        _pack_group(group, name, quantizer)


def _groups(model: nn.Module) -> Iterator[tuple[str, ParallelLinear]]:
    for name, module in model.named_modules():
        for value in vars(module).values():
            if isinstance(value, ParallelLinear):
                yield name, value


def _pack_group(group: ParallelLinear, owner: str, quantizer: Quantizer) -> None:
    packs = [
        _pack_linear(member, f"{owner}.{name}".lstrip("."), quantizer)
        for member, name in zip(group.members, group.names, strict=True)
    ]
    whole = [packed for packed in packs if packed is not None]
    if not whole:
        return
    group.packed = None  # an earlier cache
    if len(whole) == len(packs) and len({packed.format for packed in whole}) == 1:
        group.set_packed(concat(whole))
        for member in group.members:
            member.packed = None


def _pack_linear(linear: Linear, name: str, quantizer: Quantizer) -> PackedWeight | None:
    if linear.weight is None:
        quantizer.report.keep(name, "packed already")
        return None
    format = quantizer.format_for(name, tuple(linear.weight.shape))
    if format is None:
        return None
    weight = linear.weight.detach()
    linear.packed = quantizer.pack(name, weight, format, weight.device)
    linear.weight = None
    return linear.packed


def _pack_experts(experts: Experts, name: str, quantizer: Quantizer) -> None:
    """Both tensors or none: one product reads them."""
    weights = (experts.gate_up_proj, experts.down_proj)
    parts = ("gate_up_proj", "down_proj")
    if not any(quantizer.rule.chooses(f"{name}.{part}") for part in parts):
        quantizer.report.keep(name, "not chosen")
        return
    packs = []
    for part, weight in zip(parts, weights, strict=True):
        if weight is None:
            quantizer.report.keep(name, "packed already")
            return
        dense = "f32" if weight.dtype == torch.float32 else "bf16"
        data = weight.detach()
        shape = (data.shape[0], data.shape[1], data.shape[2])
        packs.append(
            quantizer.pack_experts(f"{name}.{part}", shape, data.__getitem__, data.device, dense)
        )
    experts.packed_gate_up, experts.packed_down = packs
    experts.gate_up_proj = experts.down_proj = None


def _bytes(model: nn.Module) -> int:
    """Of all weights and buffers, shared ones once."""
    own = getattr(model, "nbytes", None)  # a decoder's packed weights are no parameters
    if isinstance(own, int):
        return own
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

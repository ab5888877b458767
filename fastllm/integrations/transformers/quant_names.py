"""Names of quantized modules in a transformers model and in its files, which may differ.

transformers renames weights as it reads them, and stacks a layer's experts; saving goes the other
way. Formats in config.json have the files' names, which fastllm's reader needs, and the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from .experts import is_experts
from .quant_linear import EXPERT_PARTS, QuantExperts


def of_model(model: PreTrainedModel, formats: Mapping[str, str]) -> dict[str, str]:
    """The formats of modules that a model has, from those in config.json.

    Args:
        model: not yet changed.
        formats: by names of files or of models, with or without the base model's prefix.

    Raises:
        ValueError: if experts of one layer have several formats, or only some of them have one.
    """
    prefix = model.base_model_prefix
    modules = {name: None for name, _ in model.named_modules()}
    stacks = _stacks(model)
    found: dict[str, str] = {}
    rest: dict[str, str] = {}
    for name, format in formats.items():
        spelled = _matching(modules, prefix, name) or _matching(stacks, prefix, name)
        (rest if spelled is None else found)[spelled or name] = format
    if rest:
        for name, files in _file_names(model, [*_linears(model), *stacks]).items():
            known = {rest.get(f) or rest.get(_other(prefix, f)) for f in files}
            if known == {None} or name in found:
                continue
            if len(known) > 1:
                raise ValueError(
                    f"the matrices of {name} have different formats in config.json "
                    f"({', '.join(map(str, known))}), and one product reads them"
                )
            found[name] = str(known.pop())
    _check_experts(found, rest)
    return found


def _check_experts(found: Mapping[str, str], rest: Mapping[str, str]) -> None:
    """Experts that were not found would be drawn at random: what heads are left out is no loss."""
    lost = [name for name in rest if ".experts." in name]
    if lost and not any(name.endswith(EXPERT_PARTS) for name in found):
        raise ValueError(
            f"{lost[0]} is quantized in config.json, and this model has no experts that fastllm "
            "packs: load it with the class, and the release of transformers, that saved it"
        )


def check_files(files: Sequence[str], formats: Mapping[str, str]) -> None:
    """Raise ValueError if files hold codes of a module that config.json gives no format.

    Without it the module would stay plain, and be drawn at random.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # no mapping
                module = name.removesuffix(".weight_codes")
                if module != name and module not in formats:
                    raise ValueError(
                        f"{file} holds {name}, and config.json gives {module} no format in "
                        "quantization_config.formats: the files belong to another config.json"
                    )


def of_files(model: PreTrainedModel, formats: Mapping[str, str]) -> dict[str, str]:
    """The same formats under the names that `save_pretrained` gives the matrices."""
    files = _file_names(model, list(formats))
    return {file: formats[name] for name, names in files.items() for file in names}


def with_packed(conversions: Sequence[Any], model: PreTrainedModel) -> list[Any]:
    """transformers' conversions of weights, made to convert codes where a model has them.

    A merge of `experts.*.w2.weight` into `experts.down_proj` becomes one of
    `experts.*.w2.weight_codes` into `experts.down_proj_codes`, and one of the scales: files and
    models hold one row a group at that time, so rows are merged and divided as weights' are.
    """
    names = [name for name, _ in model.named_parameters()]
    made = []
    for conversion in conversions:
        copies = _packed_copies(conversion, names)
        plain = not copies or _is_there(conversion, names, "")
        made += copies + ([conversion] if plain else [])
    return made


def keep_conversions(model: PreTrainedModel) -> None:
    """Let `save_pretrained` undo to codes and scales what reading did to weights."""
    holder: Any = model  # a list, which is no attribute of modules to mypy
    holder._weight_conversions = with_packed(holder._weight_conversions or [], model)


def _packed_copies(conversion: Any, names: Sequence[str]) -> list[WeightConverter]:
    if not isinstance(conversion, WeightConverter):
        return []
    sources = conversion._original_source_patterns
    targets = conversion._original_target_patterns
    usual = all(source.endswith(".weight") for source in sources)
    if not usual or not _is_there(conversion, names, "_codes"):
        return []
    copies = []
    for end in ("_codes", "_scales"):
        made = WeightConverter(
            [source + end for source in sources],
            [target + end for target in targets],
            operations=list(conversion.operations),
        )
        for name in ("scope_prefix", "base_model_prefix"):
            if hasattr(conversion, name):
                setattr(made, name, getattr(conversion, name))
        copies.append(made)
    return copies


def _is_there(conversion: WeightConverter, names: Sequence[str], end: str) -> bool:
    """Whether a model has parameters of the names that a conversion makes, with that end."""
    pattern = re.compile(f"(?:{conversion._original_target_patterns[0]}){end}$")
    return any(pattern.search(name) for name in names)


def _linears(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "in_features")]


def _stacks(model: PreTrainedModel) -> dict[str, None]:
    return {
        f"{name}.{part}": None
        for name, module in model.named_modules()
        if is_experts(module) or isinstance(module, QuantExperts)
        for part in EXPERT_PARTS
    }


def _file_names(model: PreTrainedModel, names: list[str]) -> dict[str, list[str]]:
    """name of a module, or of a tensor of experts -> names of modules in files.

    transformers tells where weights go in terms of tensors alone, so it is asked with small ones
    that carry a number.
    """
    stacks, holder = _stacks(model), cast(Any, model)
    kept = model.__dict__.get("_weight_conversions")
    with torch.device("cpu"):  # models are made on meta
        probes = dict(_probe(model, name, n, name in stacks) for n, name in enumerate(names))
        try:
            holder._weight_conversions = [
                c for c in get_model_conversion_mapping(model, add_legacy=False) if not _prefixes(c)
            ]
            files = revert_weight_conversion(model, probes)
        finally:
            holder._weight_conversions = kept
    found: dict[str, list[str]] = {}
    for file, probe in files.items():
        name = names[int(probe.flatten()[0])]
        found.setdefault(name, []).append(file.removesuffix(".weight"))
    return found


def _probe(model: PreTrainedModel, name: str, number: int, stack: bool) -> tuple[str, Tensor]:
    """A weight's name, and a small tensor in its place, which holds the number."""
    if not stack:
        return f"{name}.weight", torch.full((1, 1), float(number))
    owner, _, part = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    shape = int(module.num_experts), 2 if part == "gate_up_proj" else 1, 1
    return name, torch.full(shape, float(number))


def _prefixes(conversion: Any) -> bool:
    """Whether it adds or takes the base model's prefix: `of_model` does that itself."""
    return type(conversion).__name__ == "PrefixChange"


def _matching(names: Mapping[str, Any], prefix: str, name: str) -> str | None:
    """The one of `names` that is `name`, with or without the prefix of the base model."""
    for spelled in (name, _other(prefix, name)):
        if spelled in names:
            return spelled
    return None


def _other(prefix: str, name: str) -> str:
    start = f"{prefix}."
    return name.removeprefix(start) if name.startswith(start) else start + name

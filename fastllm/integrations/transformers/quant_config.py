"""`QuantConfig`: what `from_pretrained(quantization_config=...)` is told, and config.json keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fastllm.models.quantization import check_quantization
from fastllm.ops.quant_format import format_of
from fastllm.quantize import fastllm_files

METHOD = "fastllm"
ACTIVATIONS = ("int8", "bf16", "fp32")
_SAVED = ("format", "activation", "modules_to_not_convert", "overrides", "embeddings", "experts")
_DEFAULTS: dict[str, Any] = {"experts": True}


class QuantConfig(QuantizationConfigMixin):
    """Round a transformers model's weights to a format of fastllm while they are read.

    Args:
        format: what `fastllm quantize --format` takes: "int4", "int4_asym_g64", "nf4", "int8",
            "fp8", "q4_k_m" (a mix), "q8_0", ... Rows that it does not fit get the nearest format
            that they fit, and a FallbackWarning says so.
        modules_to_not_convert: names, ends of names or regular expressions of modules that stay
            plain, as in transformers' own configs. Default: the output head, whatever shares its
            weight, and routers.
        overrides: regular expressions that are searched in modules' names -> their format, or
            "bf16" to leave them plain; the first that is found counts.
        activation: how inputs meet the codes: "int8" (a scale for every 32 inputs), "bf16" or
            "fp32". Default: "int8" on the CPU, the model's dtype on a GPU, and the model's dtype
            wherever adapters of PEFT are put on the model, for training and use alike.
        embeddings: a format for the embedding table too, and for the head that shares it.
        experts: whether experts of mixtures are quantized, which transformers stacks in one tensor.
        formats: of every quantized module; of models that are quantized already.
        version: of the layout in files.
        quant_method: "fastllm", as config.json says it.
        in_device_layout: weights come in a `state_dict`, packed for their device: `load_gguf`'s.

    Raises:
        ValueError: naming the argument that no format, mode or pattern has.
    """

    def __init__(
        self, format: str | None = "int4", *,
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None, activation: str | None = None,
        embeddings: str | None = None, experts: bool = True,
        formats: Mapping[str, str] | None = None, version: int = fastllm_files.VERSION,
        quant_method: str = METHOD, in_device_layout: bool = False,
    ) -> None:  # fmt: skip
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r:.40}")
        if version != fastllm_files.VERSION:
            raise ValueError(
                f"version {version!r:.20} of fastllm's quantized files is not supported, this is "
                f"version {fastllm_files.VERSION}: quantize the model again"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format = format
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.overrides = None if overrides is None else dict(overrides)
        self.activation = activation
        self.embeddings = embeddings
        self.experts = bool(experts)
        self.formats = {} if formats is None else dict(formats)
        self.in_device_layout = in_device_layout
        self.post_init()

    def post_init(self) -> None:
        """Check every field. Raises ValueError naming the one at fault."""
        if self.format is not None:
            _check("format", check_quantization, self.format)
        elif not self.formats:
            raise ValueError("format is missing: name one, such as 'int4'")
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r:.40}"
            )
        if self.embeddings is not None and _check("embeddings", format_of, self.embeddings).dense:
            raise ValueError("embeddings names no quantized format: leave it out")
        for pattern, format in (self.overrides or {}).items():
            _check(f"overrides[{pattern!r}]", format_of, format)
            _check("overrides", re.compile, pattern)
        for module, format in self.formats.items():
            if _check(f"formats[{module!r:.200}]", format_of, format).dense:
                raise ValueError(f"formats[{module!r:.200}] is {format!r}, no quantized format")

    def get_loading_attributes(self) -> dict[str, Any]:
        """What counts where a model is quantized already: how it is run, if that was named."""
        return {} if self.activation is None else {"activation": self.activation}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: fastllm's own reader takes `version` and `formats` from it."""
        asked = {name: getattr(self, name) for name in _SAVED}
        kept = {name: value for name, value in asked.items() if value != _DEFAULTS.get(name)}
        return {**kept, **fastllm_files.config(self.formats)}


def _names(given: Sequence[str] | None) -> list[str] | None:
    if given is None:
        return None
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        _check("modules_to_not_convert", re.compile, name)
    return names


def _check(argument: str, check: Any, value: Any) -> Any:
    """What `check` gives, its errors under the argument's name."""
    if not isinstance(value, str):
        raise ValueError(f"{argument} must be text, got {value!r:.80}")
    try:
        return check(value)
    except re.error as error:
        raise ValueError(f"{argument} {value!r:.80} is no regular expression: {error}") from None
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None

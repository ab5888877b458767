"""`from_pretrained(..., quantization_config=fastllm.QuantConfig("int4"))`: the quantizer behind it.

Weights are rounded one at a time, as transformers reads them, and each takes its packed module's
place at once: what is in memory is the packed model and one weight more. Files hold rows one after
another in fastllm's own layout (`fastllm.quantize.fastllm_files`), never a layout of one machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from fastllm.nn.packed_matrix import PackedMatrix, format_in
from fastllm.nn.quant_linear import QuantLinear
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import format_of
from fastllm.ops.registry import FLOATS
from fastllm.quantize.fastllm_files import OPTIONAL, PARTS
from fastllm.quantize.mixes import MIXES
from fastllm.quantize.quantizer import Quantizer
from fastllm.quantize.rule import QuantReport

from . import quant_names, quant_swap
from .quant_config import METHOD, QuantConfig
from .quant_linear import QuantExperts, to_device_layout
from .quant_plan import choose

_PACKED = (PackedMatrix, QuantExperts)


class FastllmQuantizer(HfQuantizer):
    """transformers' side of `QuantConfig`.

    report: what became of each weight, of models that were quantized as they were loaded.
    """

    quantization_config: QuantConfig
    requires_calibration = False

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.work: Quantizer | None = None
        self.formats: dict[str, str] = {}  # of modules and tensors of experts, by the model's names
        self.swap: quant_swap.Swap | None = None

    @property
    def report(self) -> QuantReport | None:
        """What was done, layer by layer; None: the files were quantized already."""
        return None if self.work is None else self.work.report

    # what transformers asks

    @property
    def is_trainable(self) -> bool:
        """Adapters train on it: gradients pass through packed weights to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Products are custom ops under torch.compile."""
        return True

    def is_serializable(self) -> bool:
        """`save_pretrained` writes safetensors."""
        return True

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes a weight, about, for `device_map="auto"`."""
        name = (self.quantization_config.format or "q8_0").lower()
        mix = MIXES.get(name)
        return format_of(name if mix is None else mix.base).bits / 8

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for placements that packed weights do not have."""
        if not isinstance(device_map, dict):
            return
        kinds = {_kind(device) for device in device_map.values()}
        if "disk" in kinds or len(kinds) > 1:
            raise ValueError(
                f"device_map places modules on {', '.join(sorted(kinds))}: packed weights lie "
                "otherwise on each kind of device and are not offloaded; give one device, such as "
                "device_map='cpu'"
            )
        if not kinds <= set(layout.ROWS_PER_GROUP):
            raise ValueError(
                f"device_map asks for {', '.join(sorted(kinds))}, for which fastllm has no "
                "kernels: use 'cpu' or 'cuda'"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Raises ValueError for dtypes that are not rounded from."""
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        return dtype

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a weight of the files is to be rounded."""
        return not self.pre_quantized and param_name.removesuffix(".weight") in self.formats

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with each of them."""
        return _Rounding(self)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """How names and shapes of files become the model's, for codes and scales too.

        Not every transformers gives the model: it is the one that is being prepared.
        """
        assert self.swap is not None, "the model was prepared"
        return quant_names.with_packed(weight_conversions, self.swap.model)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None,
        checkpoint_files: Sequence[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        on_gpu = isinstance(device_map, dict) and "cuda" in map(_kind, device_map.values())
        on_gpu = on_gpu or (device_map is not None and _kind(device_map) == "cuda")
        self.swap = quant_swap.Swap(model, self.quantization_config.activation, on_gpu)
        if self.pre_quantized:
            formats = self.quantization_config.formats
            quant_names.check_files(checkpoint_files or (), formats)
            self.formats = quant_names.of_model(model, formats)
            if not self.formats:
                raise ValueError(
                    "quantization_config.formats in config.json names no module of "
                    f"{type(model).__name__}: load it with the class that saved it"
                )
            of_device = self.quantization_config.in_device_layout
            rows = layout.ROWS_PER_GROUP["cuda" if on_gpu else "cpu"] if of_device else 1
            self.swap.put_empty(self.formats, rows)
            return
        self.work, self.formats = choose(model, self.quantization_config)
        self.work.report.bytes_before = _nbytes(model)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        assert self.swap is not None, "the model was prepared"
        if self.work is None:
            _finish_read(model, self.swap.shapes)
        else:
            self._finish_rounding(model, self.work)
        self.quantization_config.formats = dict(self.formats)
        still = [name for name, p in model.named_parameters() if p.is_meta]
        if still:
            raise ValueError(
                f"{len(still)} weights have no values, {still[0]} first: the files lack them"
            )
        return model

    def _finish_rounding(self, model: PreTrainedModel, work: Quantizer) -> None:
        assert self.swap is not None, "the model was prepared"
        self.swap.round_rest(self.formats, work)
        embeddings = self.quantization_config.embeddings
        if embeddings is not None:
            self.formats |= self.swap.round_embeddings(embeddings, work)
        quant_names.keep_conversions(model)
        work.report.bytes_after = _nbytes(model)
        work.report.warn()

    def round(self, model: PreTrainedModel, name: str, weight: Tensor) -> None:
        """Put the packed form of one weight that was read into the model."""
        assert self.swap is not None and self.work is not None, "the model was prepared"
        module = name.removesuffix(".weight")
        self.swap.round(module, weight, self.formats[module], self.work)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes; config.json gets the formats under the files' names."""
        state = model.state_dict()
        for name in model.all_tied_weights_keys:
            if name.endswith(PARTS):
                owner = name.rpartition(".")[0]
                for part in (*PARTS, *OPTIONAL):
                    state.pop(f"{owner}.{part}", None)
        formats = self.formats | _formats(model)  # `quantize_model` may have packed more
        held = {name: f for name, f in formats.items() if _is_saved(state, name)}
        self.quantization_config.formats = held | quant_names.of_files(model, held)
        if held:  # `fastllm.dequantize_model` may have taken it away, and left experts packed
            model.config.quantization_config = self.quantization_config
        return state, {}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        quant_swap.dequantize(model, dtype)
        return model


class _Rounding(ConversionOps):
    """Rounds what it is given, and hands on the rest of what was read with it."""

    def __init__(self, quantizer: FastllmQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, name):
                rest[name] = tensor
                continue
            self.quantizer.round(model, name, tensor)
            if missing_keys is not None:
                missing_keys.discard(name)
        return rest


def register() -> None:
    """Make `QuantConfig` known to transformers; idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, QuantConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, FastllmQuantizer)
    known: tuple[type, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if QuantConfig not in known:  # there is no decorator for these
        setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", (*known, QuantConfig))  # noqa: B010


def _finish_read(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> None:
    """Packed modules of quantized files: all there, and in the layout of their device."""
    for name, shape in shapes.items():
        parameter = model.get_parameter(name)
        if parameter.shape != shape or not quant_swap.was_read(parameter):
            raise ValueError(
                f"{name} is missing from the files, or has another shape than {list(shape)}, which "
                "its format in config.json gives it: the checkpoint is damaged"
            )
    for name, module in model.named_modules():
        if not isinstance(module, _PACKED):
            continue
        to_device_layout(module)
        if isinstance(module, PackedMatrix):
            _check_format(name, module)
            module.name_format()
        if isinstance(module, QuantLinear) and module.bias is not None:
            quant_swap.check_bias(name, module)


def _check_format(name: str, module: PackedMatrix) -> None:
    """Files that name the format beside the codes must name that of config.json."""
    given = module.weight_format
    if not quant_swap.was_read(given):
        return
    stored = format_in(given)
    if stored != module.format:
        raise ValueError(
            f"{name}.weight_format in the files is {stored!r:.40}, and config.json says "
            f"{module.format!r}: the files belong to another config.json"
        )


def _formats(model: nn.Module) -> dict[str, str]:
    """Of the packed layers and tables that a model has now."""
    return {n: m.format for n, m in model.named_modules() if isinstance(m, PackedMatrix)}


def _is_saved(state: dict[str, Any], name: str) -> bool:
    return f"{name}.weight_codes" in state or f"{name}_codes" in state


def _kind(device: Any) -> str:
    if isinstance(device, int):
        return "cuda"
    return str(device).partition(":")[0]


def _nbytes(model: nn.Module) -> int:
    """Of all weights and buffers, shared ones once."""
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


register()  # where this file is what imports transformers, on_import finds it incomplete

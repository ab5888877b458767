"""Quantizing a model's files: layer after layer, each finished one kept, then the output at once.

The calibration rows pass through the model as its residual stream, one layer at a time, and with
GPTQ and AWQ each layer gets what the quantized layers before it make of them. So only one layer is
in memory, beside the stream. A run that was killed goes on after the last finished layer and gives
the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import holds_experts
from fastllm.models.loader import choose_compute
from fastllm.models.quantization import mix_sizes
from fastllm.models.quantizing.block import Block, finite
from fastllm.models.quantizing.experts import quantize_experts
from fastllm.models.quantizing.layouts import GgufLayout, HfLayout, Layout, stored_bits
from fastllm.models.quantizing.methods import CALIBRATED, METHOD_CLASSES, Result, Settings
from fastllm.models.quantizing.output import write_directory, write_gguf_file
from fastllm.models.quantizing.work import WorkFolder, digest, fingerprint
from fastllm.models.targets import check_apart, check_replaceable, resolved
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import WeightSource
from fastllm.quantize.mixes import MIXES, Plan, plan
from fastllm.quantize.packed import PackedWeight, concat
from fastllm.quantize.pieces import in_pieces

TOP = "top"
_VALUES = 1 << 22  # of an embedding that are quantized at once
_VERSION = 1  # of the work folder: raised when finished parts mean something else


class Progress:
    """What a run tells of itself; this one says nothing."""

    def begin(self, layers: int) -> None:
        """Once, before the first layer."""

    def note(self, text: str) -> None:
        """A line that the user should see."""

    def layer(self, index: int, errors: Mapping[str, float], resumed: bool) -> None:
        """A layer is finished. errors: relative squared errors of its matrices."""

    def end(self) -> None:
        """Once, after the last layer or an error, before the output is written."""


@dataclass(slots=True)
class Report:
    """What a run made. errors: of every matrix by name; sums: inputs' squares, as in `Result`."""

    path: Path
    plan: Plan
    nbytes: int
    values: int
    bits_per_weight: float  # of the quantized matrices, scales included
    errors: dict[str, float] = field(default_factory=dict)
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def file_bits(self) -> float:
        """Bits of the output for each of the model's values."""
        return 8 * self.nbytes / self.values


def plan_of(config: ModelConfig, settings: Settings) -> Plan:
    """Which format every matrix of a model gets. Raises ValueError for an unknown name."""
    sizes, importance = mix_sizes(config), settings.method == "imatrix"
    return plan(settings.format, config.weight_shapes(), sizes, importance=importance)


def quantize_files(
    source: WeightSource,
    out: str | os.PathLike[str],
    settings: Settings,
    tokenizer: Tokenizer | None,
    *,
    calibration: Tensor | None = None,
    importance: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a quantized model: a GGUF file for GGUF's formats, else a Hugging Face directory.

    Args:
        source: opened weights; quantized ones are dequantized first.
        out: the file or directory; it appears whole or not at all.
        settings: format and method.
        tokenizer: written with the model; None: there is none.
        calibration: token ids `[rows, length]`, for gptq, awq and imatrix.
        importance: for imatrix in place of calibration: mean x^2 of inputs, by weight name.
        overwrite: replace a model that is at `out`; of a symbolic link, what it leads to.
        progress: is told what happens.

    Raises:
        FileExistsError: if `out` exists and `overwrite` is false; see `check_target`.
        ValueError: for a format, method or model that does not fit, calibration that is missing, or
            an `out` where the source lies.
        OSError: if the disk is full or gone; what was finished is gone on with next time.
    """
    target, progress = resolved(out), progress or Progress()
    check_apart(target, source.path)
    check_target(target, settings.format, overwrite)
    _check_inputs(settings, calibration, importance)
    formats = plan_of(source.config, settings).formats.values()
    if settings.method == "imatrix" and all(map(_rounds_alone, formats)):
        progress.note("note: 8-bit scales follow from the largest magnitude: imatrix changes none")
    run = _Run(source, target, settings, calibration, importance or {}, progress)
    run.note_unmeasured()
    try:
        report = run.layers()
    except (ValueError, ArithmeticError):  # of the model: it would fail again
        run.work.remove()
        raise
    if run.plan.is_gguf:
        write_gguf_file(target, source.config, run.plan, run.work, run.parts(), tokenizer)
    else:
        assert isinstance(run.layout, HfLayout), "the layout of formats outside GGUF"
        extra = run.layout.quantization_config()
        write_directory(target, source.config, extra, run.work, run.parts(), tokenizer, overwrite)
    run.work.remove()
    report.path = target
    files = [target] if target.is_file() else [f for f in target.iterdir() if f.is_file()]
    report.nbytes = sum(file.stat().st_size for file in files)
    return report


def check_target(target: Path, format: str, overwrite: bool) -> None:
    """Raise if a model of that format (or mix) cannot be written there, before any work is done.

    Raises:
        FileExistsError: if it exists and is not to be replaced, or is a file where a directory
            would be written, a directory where a file would be, or no model's directory.
        ValueError: for a directory that is named like a GGUF file.
    """
    is_gguf = format in MIXES
    if not is_gguf and target.suffix.lower() == ".gguf":
        raise ValueError(
            f"{target}: {format} is written as a Hugging Face directory; GGUF files hold "
            f"{', '.join(MIXES)}"
        )
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; remove it, or give overwrite (--overwrite)")
    if target.is_dir() == is_gguf:
        found, wanted = ("directory", "file") if is_gguf else ("file", "directory")
        raise FileExistsError(f"{target} is a {found} and is not replaced by a {wanted}")
    if target.is_dir():
        check_replaceable(target)


def _rounds_alone(format: str) -> bool:
    """Whether a format's scales do not depend on importance."""
    return format in ("int8", "fp8", "fp8_block")


def _check_inputs(
    settings: Settings, calibration: Tensor | None, importance: Mapping[str, Tensor] | None
) -> None:
    if settings.method not in CALIBRATED:
        return
    if settings.method == "imatrix" and importance:
        return
    if calibration is None:
        raise ValueError(f"method {settings.method} needs calibration text (--calibration)")
    if calibration.dim() != 2 or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise ValueError(
            f"calibration must be token ids [rows, length], at least one row of two, got "
            f"{list(calibration.shape)}"
        )


class _Run:
    def __init__(
        self, source: WeightSource, target: Path, settings: Settings, calibration: Tensor | None,
        importance: Mapping[str, Tensor], progress: Progress,
    ) -> None:  # fmt: skip
        self.source, self.settings, self.progress = source, settings, progress
        self.config = source.config
        self.calibration = calibration if settings.method in CALIBRATED else None
        self.importance = importance
        self.plan = plan_of(self.config, settings)
        self.layout: Layout = HfLayout(self.config, self.plan)
        if self.plan.is_gguf:
            self.layout = GgufLayout(self.config)
        self.dtype = choose_compute(source, None, torch.device("cpu"), None)[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        self.work = WorkFolder(target, self._identity())
        if self.work.set_aside:
            progress.note(f"{self.work.path} is not of this model and these settings: begun anew")
        for file in self.work.damaged:
            progress.note(f"{file} is damaged: what it held is made again")

    def _identity(self) -> dict[str, Any]:
        """What a finished layer depends on."""
        sums = [[name, digest(t)] for name, t in sorted(self.importance.items())]
        return {
            "version": _VERSION,
            "files": fingerprint(self.source.path),
            "settings": dataclasses.asdict(self.settings),
            "calibration": digest(self.calibration),
            "importance": sums,
            "threads": torch.get_num_threads(),  # products of torch may depend on it
        }

    def note_unmeasured(self) -> None:
        """Say which matrices of layers an importance matrix from elsewhere leaves out."""
        if not self.importance or self.calibration is not None:
            return
        wanted = [name for name in self.plan.formats if name.startswith("model.layers.")]
        missing = [name for name in wanted if name not in self.importance]
        if missing:
            self.progress.note(
                f"note: the importance matrix leaves out {len(missing)} of {len(wanted)} matrices, "
                f"{missing[0]} for one: they are rounded to nearest"
            )

    def parts(self) -> list[str]:
        """Names of the parts, in order."""
        return [TOP, *(_part(i) for i in range(self.config.num_hidden_layers))]

    def layers(self) -> Report:
        """Make every part that is not there yet."""
        shapes = self.config.weight_shapes()
        values = sum(torch.Size(shape).numel() for shape in shapes.values())
        bits = stored_bits(self.plan.formats, shapes)
        report = Report(self.work.path, self.plan, 0, values, bits)
        self.progress.begin(self.config.num_hidden_layers)
        try:
            self._make_all(report)
        finally:
            self.progress.end()
        return report

    def _make_all(self, report: Report) -> None:
        if not self.work.finished(TOP):
            self._write_top()
        self._drop_later_states()
        states = None
        for index in range(self.config.num_hidden_layers):
            resumed = self.work.finished(_part(index)) and self._is_behind(index)
            if not resumed:
                if self.calibration is not None and states is None:
                    states = self._states_before(index)
                self._layer(index, states)
            self._collect(index, report)
            own = {k: v for k, v in report.errors.items() if k.startswith(_prefix(index))}
            self.progress.layer(index, own, resumed)

    def _is_behind(self, index: int) -> bool:
        """Whether the states after the layer, or after a later one, are there too."""
        if self.calibration is None or index == self.config.num_hidden_layers - 1:
            return True
        return self.work.finished("states") and self._states_index() >= index

    def _drop_later_states(self) -> None:
        """Forget states that are behind a layer which is missing: it cannot be made from them."""
        count = self.config.num_hidden_layers
        missing = [i for i in range(count) if not self.work.finished(_part(i))]
        if missing and self.work.finished("states") and self._states_index() >= missing[0]:
            self.work.drop("states")

    def _states_index(self) -> int:
        return int(self.work.read("states").notes["after"])

    def _states_before(self, index: int) -> Tensor:
        """The residual stream that enters a layer, float32 [rows, length, hidden]."""
        if index:
            return self.work.read_one("states", "states").clone()
        assert self.calibration is not None, "asked for where there is calibration"
        name = "model.embed_tokens.weight"
        stored = self.source.get(name)
        rows = torch.stack([stored[ids.long()].to_float32() for ids in self.calibration])
        self.source.release(name)
        return rows

    def _layer(self, index: int, states: Tensor | None) -> None:
        length = 1 if states is None else states.shape[1]
        block = Block(self.source, index, self.dtype, length)
        method = METHOD_CLASSES[self.settings.method](
            block, self.plan, self.settings, self.importance
        )
        if states is not None:
            block.fill()
        method.run(states)
        if self.config.experts_of(index) is not None:
            quantize_experts(method, states)
        result = method.result
        for note in result.notes:
            self.progress.note(note)
        if states is not None:
            block.forward_(states)
        self._write_layer(index, block, result)
        if states is not None and index + 1 < self.config.num_hidden_layers:
            self.work.write("states", {"states": states}, {"after": index})

    def _write_layer(self, index: int, block: Block, result: Result) -> None:
        prefix = block.prefix
        quantized = {f"{prefix}{name}.weight" for name in result.packs}
        quantized |= {prefix + name for name in result.experts}

        def named() -> Iterable[tuple[str, str, Tensor]]:
            for name, packed in result.packs.items():
                yield from self.layout.packed(f"{prefix}{name}.weight", packed)
            for name, experts in result.experts.items():
                yield from self.layout.experts(prefix + name, experts)
            for name in block.shapes:
                if prefix + name not in quantized:
                    data = result.dense.get(name)
                    yield from self.layout.dense(prefix + name, self._dense(prefix + name, data))

        notes: dict[str, Any] = {"errors": result.errors}
        extra: dict[str, Tensor] = {}
        for name, (squares, counts) in result.sums.items():
            extra |= {f"{name}/squares": squares, f"{name}/counts": counts}
        self._write(_part(index), named(), notes, extra)

    def _dense(self, name: str, changed: Tensor | None) -> Tensor:
        """A tensor that is not quantized: as changed, or as the files have it."""
        stored = self.source.get(name)
        data = stored.data if stored.dense else stored.to_float32().bfloat16()
        if changed is not None:
            data = changed.to(data.dtype) if data.dim() > 1 else changed
        return finite(data, name)

    def _write_top(self) -> None:
        """Embedding, final norm and LM head."""

        def named() -> Iterator[tuple[str, str, Tensor]]:
            for name in self.config.weight_shapes():
                if name.startswith("model.layers."):
                    continue
                if name in self.plan.formats:
                    yield from self.layout.packed(name, self._rounded(name))
                else:
                    yield from self.layout.dense(name, self._dense(name, None))
                self.source.release(name)

        self._write(TOP, named(), {"errors": {}}, {})

    def _rounded(self, name: str) -> PackedWeight:
        """A large matrix rounded to nearest, some rows at a time."""
        stored, format = self.source.get(name), self.plan.formats[name]
        step = max(_VALUES // stored.shape[1] // 128 * 128, 128)
        packs = []
        for first in range(0, stored.shape[0], step):
            rows = stored[first : first + step].to_float32()
            packs.append(in_pieces(finite(rows, name), format, None))
        return concat(packs)

    def _write(
        self, part: str, named: Iterable[tuple[str, str, Tensor]], notes: dict[str, Any],
        extra: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        tensors, formats = {}, {}
        for name, format, data in named:
            tensors[name], formats[name] = data, format
        sums = {f"sums/{key}": tensor for key, tensor in extra.items()}
        self.work.write(part, tensors | sums, notes | {"formats": formats})

    def _collect(self, index: int, report: Report) -> None:
        """Add what a finished layer's part remembers to the report."""
        part, prefix = self.work.read(_part(index)), _prefix(index)
        report.errors |= {prefix + name: value for name, value in part.notes["errors"].items()}
        for key, squares in part.tensors.items():
            if key.startswith("sums/") and key.endswith("/squares"):
                name = key.removeprefix("sums/").removesuffix("/squares")
                counts = part.tensors[f"sums/{name}/counts"]
                full = prefix + name if holds_experts(prefix + name) else f"{prefix}{name}.weight"
                report.sums[full] = squares.clone(), counts.clone()


def _part(index: int) -> str:
    return f"layer-{index:04d}"


def _prefix(index: int) -> str:
    return f"model.layers.{index}."

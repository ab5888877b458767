"""A decoder that is trained further, in full or through an adapter: loading, files, identity.

What stages have in common that start from a given model; a stage adds its data and its loss.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.models.adapters import adapter_tensors, save_adapter
from fastllm.models.expert_files import to_files
from fastllm.models.hf_layout import in_file_order, in_model_order
from fastllm.models.loader import is_quantized
from fastllm.models.safetensors_files import save_directory
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import WeightSource
from fastllm.nn.lora import add_lora
from fastllm.quantize.rule import FallbackWarning
from fastllm.train import distributed
from fastllm.train.decoder_weights import read_weights, weights_of
from fastllm.train.optim import OptimConfig, make_optimizer
from fastllm.train.task import Task
from fastllm.train.tune_config import TuneConfig


class DecoderTask(Task):
    """A model from files, all of whose weights are trained, or an adapter on it.

    Args:
        config: model, method, quant, lora, dtype and seed are read here.
        source: the opened `config.model`.
        tokenizer: saved beside the weights.
        lr: peak learning rate.
        end_ids: ids that end an answer, for the model's generation_config.json.
        template: Jinja source of the chat template that goes with the weights; None: none does.
        device: where to train.

    Raises ValueError if a quantized model is to be trained in full, and what loading raises.
    """

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        tokenizer: Tokenizer,
        *,
        lr: float,
        end_ids: Sequence[int],
        template: str | None,
        device: torch.device | str = "cpu",
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # `describe` says it
            dtype = None if config.dtype == "auto" else config.dtype
            self.decoder = load_trainable(source, dtype, device, quantization=config.quant)
        self.lora = config.lora.build() if config.method == "lora" else None
        if self.lora is not None:
            add_lora(self.decoder, self.lora, config.loop.seed)
        elif not any(p.requires_grad for p in self.decoder.parameters()):
            raise ValueError(
                f"{source.path} holds quantized weights, which stay as they are: train an adapter "
                "(method lora), or give the unquantized model's directory"
            )
        self.model = distributed.shard(self.decoder)
        self.optimizer = make_optimizer(
            self.model, OptimConfig(lr=lr, weight_decay=config.weight_decay)
        )
        self.tokenizer = tokenizer
        self.end_ids = sorted(end_ids)
        self.template = template
        self.checkpointing = config.checkpointing
        self.base_name = config.model
        self._quantized = config.quant is not None or is_quantized(source)
        self._requantized = config.quant is not None and is_quantized(source)

    def describe(self) -> list[str]:
        """What is trained, on what."""
        trained = sum(p.numel() for p in self.decoder.parameters() if p.requires_grad)
        what = "all weights" if self.lora is None else f"an adapter of rank {self.lora.r}"
        base = " on packed quantized weights" if self._quantized and self.lora else ""
        return [*self._quantization_lines(), f"training {what}{base}: {trained:,} parameters"]

    def _quantization_lines(self) -> list[str]:
        report = self.decoder.quantization
        if report is None:
            return []
        again = ["the file's weights were quantized already: errors of both roundings add up"]
        return [report.summary(), *report.fallbacks(), *(again if self._requantized else [])]

    def training_flops(self, places: int, targets: int) -> float:
        """Products of the weights for `places` tokens: forward, gradient of inputs and, in full, of
        weights. The LM head works where there is a target."""
        body, head = self._matrix_values
        products = 6.0 if self.lora is None else 4.0
        return products * (body * places + head * targets)

    @cached_property
    def _matrix_values(self) -> tuple[int, int]:
        """Values of the blocks' matrices, and of the LM head."""
        config = self.decoder.config
        body = sum(
            torch.Size(shape).numel()
            for name, shape in config.weight_shapes().items()
            if len(shape) == 2 and ".layers." in name
        )
        return body, config.vocab_size * config.hidden_size

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        adapter = None
        if self.lora is not None:
            targets = self.lora.target_modules
            adapter = {
                "rank": self.lora.r,
                "scale": self.lora.scale,
                "targets": targets if isinstance(targets, str) else list(targets),
            }
        shapes = self.decoder.config.weight_shapes()
        report = self.decoder.quantization
        return ({} if report is None else {"quant": report.format}) | {
            "weights": len(shapes),
            "values": sum(torch.Size(shape).numel() for shape in shapes.values()),
            "tokenizer": self.tokenizer.fingerprint,
            "adapter": adapter,
        }

    # files

    def weights(self) -> dict[str, Tensor]:
        """The adapter's factors under PEFT's names, or every weight."""
        if self.lora is None:
            return weights_of(self.decoder)
        return adapter_tensors(self.decoder)

    def write_weights(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """A PEFT adapter, or a Hugging Face directory, with tokenizer and chat template."""
        if self.lora is None:
            config = self.decoder.config
            ordered = {name: in_file_order(t, name, config) for name, t in weights.items()}
            save_directory(directory, to_files(ordered, config), config.to_hf())
            if self.end_ids:
                text = json.dumps({"eos_token_id": self.end_ids}, indent=2) + "\n"
                (directory / "generation_config.json").write_text(text, encoding="utf-8")
        else:
            save_adapter(self.decoder, directory, self.base_name, weights)
        self.tokenizer.save(directory)
        if self.template is not None:
            file = directory / "chat_template.jinja"
            file.write_text(self.template, encoding="utf-8", newline="\n")

    def read_weights(self, directory: Path) -> None:
        """The inverse of `write_weights`."""
        if self.lora is not None:
            super().read_weights(directory)
            return
        live = {n: t for n, t in self.weights().items() if not distributed.is_master(t)}
        read_weights(live, self.decoder.config, directory)
        with torch.no_grad():
            for name, tensor in live.items():
                read = distributed.whole(tensor.detach())
                ordered = in_model_order(read, name, self.decoder.config)
                if ordered is not read:
                    distributed.fill(tensor, ordered)

    def save(self, directory: Path) -> None:
        """Write the model's files; a directory of an earlier run is replaced whole."""
        copies = {}
        for name, tensor in self.weights().items():
            value = distributed.whole(tensor.detach())
            value = value.bfloat16() if distributed.is_master(tensor) else value
            copies[name] = value.cpu().contiguous()
        if distributed.rank() != 0:
            return
        aside = directory.with_name(f".{directory.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        self.write_weights(copies, aside)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(aside, directory)

    def save_result(self, out: str | os.PathLike[str]) -> Path:
        """Write `adapter` or `model` into the run's folder and return where it is."""
        output = Path(out) / ("model" if self.lora is None else "adapter")
        self.save(output)
        return output

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Without gradients, dropout off."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            distributed.reshard(self.model)  # else the whole weights pass for the model's own
            self.model.train(training)

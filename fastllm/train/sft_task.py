"""The model of a fine-tuning run as the loop sees it: loss, evaluation, answers, files."""

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

from fastllm.engine.llm import LLM
from fastllm.engine.request import SamplingParams
from fastllm.models.adapters import adapter_tensors, save_adapter
from fastllm.models.expert_files import to_files
from fastllm.models.loader import in_file_order, in_model_order, is_quantized
from fastllm.models.safetensors_files import save_directory
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import WeightSource
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.quantize.rule import FallbackWarning
from fastllm.train import distributed
from fastllm.train.data.batch import MicroBatch
from fastllm.train.data.conversations import Conversation
from fastllm.train.data.examples import ExampleBatches, micro_batches
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.decoder_weights import read_weights, weights_of
from fastllm.train.optim import OptimConfig, make_optimizer
from fastllm.train.task import Task

MAX_ANSWER = 128  # tokens of a sample


class SftTask(Task):
    """A model with its data. lora: None trains all of its weights. quant: see `load_model`.

    Raises ValueError if a quantized model is to be trained in full, and what loading raises.
    """

    name = "sft"

    def __init__(
        self,
        source: WeightSource,
        encoder: ConversationEncoder,
        *,
        dtype: str | None = None,
        device: torch.device | str = "cpu",
        lora: LoraConfig | None,
        lr: float,
        weight_decay: float = 0.0,
        seed: int = 0,
        checkpointing: bool = False,
        base_name: str,
        quant: str | None = None,
    ) -> None:
        if quant is not None and lora is None:
            raise ValueError(
                f"quant {quant!r} freezes the weights: train an adapter on them (method lora)"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # `describe` says it
            self.decoder = load_trainable(source, dtype, device, quantization=quant)
        if lora is None and not any(p.requires_grad for p in self.decoder.parameters()):
            raise ValueError(
                f"{source.path} holds quantized weights, which stay as they are: train an adapter "
                "(method lora), or give the unquantized model's directory"
            )
        self.lora = lora
        if lora is not None:
            add_lora(self.decoder, lora, seed)
        self.model = distributed.shard(self.decoder)
        self.optimizer = make_optimizer(self.model, OptimConfig(lr=lr, weight_decay=weight_decay))
        self.encoder = encoder
        self.tokenizer: Tokenizer = encoder.tokenizer
        self.checkpointing = checkpointing
        self.base_name = base_name
        self._quantized = quant is not None or is_quantized(source)
        self._requantized = quant is not None and is_quantized(source)
        self._held_out: Sequence[Example] = ()
        self._micro_tokens = 0
        self.asked: Sequence[Conversation] = ()
        self._lines: tuple[str, ...] = ()

    def set_data(
        self,
        batches: ExampleBatches,
        held_out: Sequence[Example],
        micro_tokens: int,
        asked: Sequence[Conversation] = (),
        lines: Sequence[str] = (),
    ) -> None:
        """What is trained on, evaluated on and asked; `lines` say so to people."""
        self.asked = asked
        self.batches = batches
        self._lines = tuple(lines)
        self._held_out = held_out
        self._micro_tokens = micro_tokens

    def describe(self) -> list[str]:
        """What is trained, on what."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        what = "all weights" if self.lora is None else f"an adapter of rank {self.lora.r}"
        base = " on packed quantized weights" if self._quantized and self.lora else ""
        last = f"training {what}{base}: {trained:,} parameters"
        return [*self._lines, *self._quantization_lines(), last]

    def _quantization_lines(self) -> list[str]:
        report = self.decoder.quantization
        if report is None:
            return []
        again = ["the file's weights were quantized already: errors of both roundings add up"]
        return [report.summary(), *report.fallbacks(), *(again if self._requantized else [])]

    # what the loop calls

    def loss(self, micro: MicroBatch) -> Tensor:
        """The summed cross entropy of the targets that count."""
        micro = micro.to(self.device)
        return self.decoder.loss(
            micro.documents, micro.targets, "sum", checkpoint=self.checkpointing
        )

    def evaluate(self) -> dict[str, float]:
        """Loss per target of the held-out examples."""
        loss = self.held_out_loss()
        return {} if loss is None else {"eval_loss": loss}

    def flops(self, micro: MicroBatch) -> float:
        """Products of the weights: forward, gradient of inputs and, in full, of weights. The LM
        head works where there is a target."""
        body, head = self._matrix_values
        products = 6.0 if self.lora is None else 4.0
        return products * (body * len(micro.targets) + head * micro.tokens)

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
            generation = {"eos_token_id": sorted(self.encoder.end_ids)}
            _write(directory / "generation_config.json", generation)
        else:
            save_adapter(self.decoder, directory, self.base_name, weights)
        self.tokenizer.save(directory)
        template = self.encoder.template.source
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")

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

    # beside the loop

    def held_out_loss(self) -> float | None:
        """Loss per target of the held-out examples; None without any."""
        if not self._held_out:
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        rank, world = distributed.rank(), distributed.world()
        chosen = range(len(self._held_out))
        with self._untrained():
            for micro in micro_batches(self._held_out, chosen, self._micro_tokens, rank, world):
                sums[0] += self.loss(micro)
                sums[1] += micro.tokens
        total, tokens = distributed.sum_(sums).tolist()
        return total / tokens

    def sample(self) -> list[tuple[str, str]]:
        """The questions and what the live weights answer."""
        return [(question(c)[0], a) for c, a in zip(self.asked, self.answers(), strict=True) if a]

    def answers(self) -> list[str]:
        """What the live weights answer to the first question of each conversation, greedily."""
        if not self.asked or distributed.world() > 1:
            return ["" for _ in self.asked]  # sharded weights do not generate
        prompts = [self._prompt(conversation) for conversation in self.asked]
        params = SamplingParams(
            temperature=0.0, max_tokens=MAX_ANSWER, stop_token_ids=sorted(self.encoder.end_ids)
        )
        with self._untrained():
            outputs = self._llm.generate(prompts, params)
        return [output.outputs[0].text.strip() for output in outputs]

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

    @contextmanager
    def _untrained(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _prompt(self, conversation: Conversation) -> list[int]:
        turn = next(turn for turn in conversation.answers if turn)
        text = self.encoder.prompt(conversation, turn)
        room = self._llm.max_model_len - MAX_ANSWER
        return self.tokenizer.encode(text, add_special_tokens=False)[-room:]

    @cached_property
    def _llm(self) -> LLM:
        longest = min(self.decoder.max_positions, 4096)
        return LLM.from_model(self.decoder, self.tokenizer, max_model_len=longest, max_num_seqs=4)

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


def question(conversation: Conversation) -> tuple[str, str]:
    """The first question that is answered, and the answer."""
    turn = next(turn for turn in conversation.answers if turn)
    return _text(conversation.messages[turn - 1]), _text(conversation.messages[turn])


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

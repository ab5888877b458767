"""Models that judge: a decoder with a scalar head, as reward model or as critic.

On disk they are what transformers' `AutoModelForSequenceClassification` loads with one label: a
directory whose class ends in ForSequenceClassification, with `score.weight` and without a language
model's head; or an adapter in PEFT's format that carries `score.weight` (`modules_to_save`). The
score of a document is that of its last token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from fastllm.errors import ModelFileError
from fastllm.models.adapters import CONFIG_FILE, load_adapter
from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.fields import MAX_CONFIG_BYTES, read_json_object
from fastllm.models.loader import check_device, choose_compute, load_model, read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.stored_tensor import StoredTensor
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import WeightSource, open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.rows import take_rows
from fastllm.nn.scalar_head import ScalarHead, scalar_head

HEAD = "score.weight"


class Scorer:
    """Scores of documents.

    read_tokenizer: gives the tokenizer when it is first asked for; None: there is none.
    Raises ValueError if `decoder` has no scalar head.
    """

    def __init__(
        self, decoder: Decoder, read_tokenizer: Callable[[], Tokenizer] | None = None
    ) -> None:
        head = scalar_head(decoder)
        if head is None:
            raise ValueError(
                "the model has no scalar head: `fastllm reward` trains one, and "
                "fastllm.models.scorer.with_head puts one on a language model"
            )
        self.decoder = decoder
        self.head: ScalarHead = head
        self._read_tokenizer = read_tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one beside the weights. Raises ModelFileError if there is none."""
        if self._read_tokenizer is None:
            raise ModelFileError("the scorer", "", "was made without a tokenizer")
        return self._read_tokenizer()

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.decoder.device

    def scores(
        self, documents: Documents, *, rows: Tensor | None = None, checkpoint: bool = False
    ) -> Tensor:
        """A score for each of T tokens, float32 [T], differentiable.

        rows: `[N]` int64, the tokens whose scores are wanted, any of them more than once: [N].
        checkpoint: see `Decoder.train_hidden`.
        """

        def judge(x: Tensor, _: object) -> Tensor:
            return self.head(x if rows is None else take_rows(x, rows))

        return self.decoder.with_head(documents, judge, checkpoint=checkpoint)

    def last_scores(self, documents: Documents, *, checkpoint: bool = False) -> Tensor:
        """The score of each of S documents, at its last token: float32 [S], differentiable.

        Of documents that share their beginnings (`Documents.pack_shared`) give `scores` the rows.
        """
        ends = documents.cu_seqlens[1:].long() - 1
        return self.scores(documents, rows=ends, checkpoint=checkpoint)


class HeadedWeights:
    """The weights of a language model with a scalar head of zeros in place of its own."""

    def __init__(self, source: WeightSource, pad_token_id: int | None = None) -> None:
        self.source = source
        self.path = source.path
        self.config = replace(
            source.config, scalar_head=True, tie_word_embeddings=True, pad_token_id=pad_token_id
        )
        self.names = tuple(self.config.weight_shapes())

    def format(self, name: str) -> str:
        """As `WeightSource.format`."""
        return self._head.format if name == HEAD else self.source.format(name)

    def get(self, name: str) -> StoredTensor:
        """As `WeightSource.get`."""
        return self._head if name == HEAD else self.source.get(name)

    def get_expert(self, name: str, expert: int) -> StoredTensor:
        """As `WeightSource.get_expert`."""
        return self.source.get_expert(name, expert)

    def release(self, name: str | None = None) -> None:
        """As `WeightSource.release`."""
        if name != HEAD:
            self.source.release(name)

    @property
    def _head(self) -> StoredTensor:
        shape, whole = (1, self.config.hidden_size), self.config.dtype == torch.float32
        dtype = torch.float32 if whole else torch.bfloat16
        return StoredTensor("f32" if whole else "bf16", shape, torch.zeros(shape, dtype=dtype))


def with_head(source: WeightSource, tokenizer: Tokenizer | None = None) -> WeightSource:
    """The weights to load a scorer from: `source` as it is if it has a scalar head, else with one.

    A new head is zero: every score is 0 until it is trained. tokenizer: for the padding token that
    the saved configuration names.
    """
    if source.config.scalar_head:
        return source
    return HeadedWeights(source, None if tokenizer is None else padding_token(tokenizer))


def padding_token(tokenizer: Tokenizer) -> int | None:
    """A token for transformers to pad with: one that no document ends with.

    transformers takes the score of the last token that is not padding, so an end token must not be
    it. The tokenizer's own, or a special token, that ends nothing; None (batches of one) if there
    is none.
    """
    own = tokenizer.pad_token_id
    if own is not None and own not in tokenizer.eos_token_ids:
        return own
    ids = map(tokenizer.token_to_id, tokenizer.special_texts)
    return max((i for i in ids if i is not None and i not in tokenizer.eos_token_ids), default=None)


def load_scorer(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    trainable: bool = False,
    quantization: str | None = None,
    max_positions: int | None = None,
) -> Scorer:
    """A scorer from a directory that `fastllm reward` wrote, or transformers, or PEFT.

    Args:
        path: a model's directory, or that of an adapter: its base is loaded too.
        dtype: see `load_model`. Inputs of quantized weights stay in it, as in training.
        device: "cpu" (default) or "cuda".
        trainable: plain weights as parameters (of an adapter: its factors and the head).
        quantization: see `load_model`; what the adapter was trained with.
        max_positions: the longest document; default that of the configuration.

    Raises:
        ModelNotFoundError, ModelFileError: naming file, tensor and remedy.
        ValueError: if the model has no scalar head.
    """
    folder, adapter = Path(path), None
    if (folder / CONFIG_FILE).is_file():
        adapter, path = folder, _base_of(folder)
    source: WeightSource = open_weights(resolve(path))
    if adapter is None and not source.config.scalar_head:
        raise ValueError(
            f"{path} is a language model without a scalar head, and cannot judge: give what "
            "`fastllm reward` made (RUN/model or RUN/adapter)"
        )
    tokenizer: Callable[[], Tokenizer] = partial(read_tokenizer, source)
    if adapter is not None and (adapter / "tokenizer.json").is_file():
        tokenizer = partial(Tokenizer.from_hf, adapter)
    source = with_head(source)
    if trainable:
        decoder = load_trainable(source, dtype, device, max_positions, quantization)
    else:
        compute, _ = choose_compute(source, dtype, check_device(device), None)
        mode = "bf16" if compute == torch.bfloat16 else "fp32"
        decoder = load_model(source, compute, device, mode, max_positions, quantization)
    if adapter is not None:
        load_adapter(decoder, adapter)
        if not trainable:
            decoder.requires_grad_(False)
    return Scorer(decoder.train(trainable), tokenizer)


def _base_of(adapter: Path) -> str:
    base = read_json_object(adapter / CONFIG_FILE, MAX_CONFIG_BYTES).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelFileError(
            adapter / CONFIG_FILE,
            "base_model_name_or_path",
            "names no model, so the adapter's base is not known",
            "Write the base model's directory or name there",
        )
    return base

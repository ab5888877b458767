"""Models that judge: their scores are transformers' and PEFT's, and their files are theirs too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastllm import LLM
from fastllm.errors import ModelFileError
from fastllm.models.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter,
    save_adapter,
)
from fastllm.models.config import ModelConfig
from fastllm.models.gguf_export import export_gguf, export_hf, weights_of
from fastllm.models.loader import save_pretrained
from fastllm.models.scorer import Scorer, load_scorer, padding_token, with_head
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize, load_trainable
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters
from fastllm.testing.small_models import CONFIGS, SPARSE, config_of, model_of, random_documents

# PEFT asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
DOCUMENTS = random_documents([9, 1, 14, 5], seed=4)
# transformers sums in other orders: float32 differences of a two-layer model
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


def scorer_of(case: str, dtype: torch.dtype = torch.float32, **more: Any) -> Scorer:
    config = replace(config_of(case), scalar_head=True, tie_word_embeddings=True, **more)
    decoder = initialize(config, dtype=dtype, seed=2)
    with torch.no_grad():
        for parameter in decoder.weights().values():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    return Scorer(decoder)


def last_scores(scorer: Scorer) -> Tensor:
    with torch.no_grad():
        return scorer.last_scores(Documents.pack(DOCUMENTS))


def padded(pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, DOCUMENTS))
    ids = torch.tensor([[*d, *[pad] * (longest - len(d))] for d in DOCUMENTS])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in DOCUMENTS])
    return ids, mask


@pytest.mark.parametrize("case", [*CONFIGS, *(c for c in SPARSE if c != "olmoe")])
def test_transformers_loads_what_is_saved_and_gives_the_same_scores(
    case: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    scorer = scorer_of(case, pad_token_id=95)
    documents = [[t % 95 for t in d] for d in DOCUMENTS]  # the padding token is in none of them
    save_pretrained(scorer.decoder, tmp_path / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert theirs.config.num_labels == 1 and theirs.score.weight.shape == (1, 48)
    longest = max(map(len, documents))
    ids = torch.tensor([[*d, *[95] * (longest - len(d))] for d in documents])
    with torch.no_grad():
        expected = theirs.eval()(ids, attention_mask=(ids != 95).long()).logits[:, 0]
        mine = load_scorer(tmp_path / "model").last_scores(Documents.pack(documents))
        live = scorer.last_scores(Documents.pack(documents))
    torch.testing.assert_close(mine, live)
    torch.testing.assert_close(mine, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert mine.std() > 0.05


def test_what_transformers_saves_is_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path)
    ids = torch.tensor([DOCUMENTS[0]])
    with torch.no_grad():
        expected = theirs(ids).logits[0, 0]
        mine = scorer.last_scores(Documents.pack([DOCUMENTS[0]]))
    torch.testing.assert_close(mine[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    config.num_labels = 3
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelFileError, match=r"id2label.*3 labels.*one"):
        load_scorer(tmp_path / "three")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_depends_on_its_document_up_to_its_token_alone(dtype: torch.dtype) -> None:
    scorer = scorer_of("qwen3", dtype)
    documents = Documents.pack(DOCUMENTS)
    with torch.no_grad():
        every = scorer.scores(documents)
        last = scorer.last_scores(documents)
        alone = [scorer.last_scores(Documents.pack([d]))[0] for d in DOCUMENTS]
        prefix = scorer.last_scores(Documents.pack([DOCUMENTS[2][:6]]))[0]
    ends = documents.cu_seqlens[1:].long() - 1
    assert every.dtype == torch.float32 and every.shape == (29,)
    assert torch.equal(every[ends], last) and torch.equal(last, torch.stack(alone))
    assert torch.equal(prefix, every[10 + 5])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_the_plain_formula(checkpoint: bool) -> None:
    scorer = scorer_of("llama")
    documents = Documents.pack(DOCUMENTS)
    weight = torch.tensor([0.3, -1.2, 2.0, 0.7])
    scorer.last_scores(documents, checkpoint=checkpoint).mul(weight).sum().backward()
    mine = {n: p.grad.clone() for n, p in scorer.decoder.named_parameters() if p.grad is not None}
    scorer.decoder.zero_grad()
    x = scorer.decoder.train_hidden(documents)
    rows = x[documents.cu_seqlens[1:].long() - 1]
    ((rows * scorer.head.weight[0]).sum(-1) * weight).sum().backward()
    assert "score.weight" in mine and "model.layers.0.mlp.up_proj.weight" in mine
    for name, parameter in scorer.decoder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_zero_and_replaces_the_language_models(tmp_path: Path) -> None:
    base = model_of("llama", torch.float32)
    save_pretrained(base, tmp_path / "base")
    source = with_head(open_weights(tmp_path / "base"))
    assert "lm_head.weight" not in source.config.weight_shapes()
    scorer = Scorer(load_trainable(source))
    assert torch.equal(last_scores(scorer), torch.zeros(4))
    documents = Documents.pack(DOCUMENTS)
    with torch.no_grad():
        assert torch.equal(scorer.decoder.train_hidden(documents), base.train_hidden(documents))
    with pytest.raises(ValueError, match="without a scalar head"):
        load_scorer(tmp_path / "base")
    with pytest.raises(ValueError, match="no scalar head"):
        Scorer(base)


def test_a_scorer_has_no_loss_over_tokens() -> None:
    decoder = scorer_of("llama").decoder
    documents, targets = Documents.pack(DOCUMENTS), torch.zeros(29, dtype=torch.int64)
    with pytest.raises(ValueError, match="predicts no tokens"):
        decoder.loss(documents, targets)
    with pytest.raises(ValueError, match="predicts no tokens"):
        decoder.log_probs(documents, targets)


def test_a_scorer_does_not_generate(tmp_path: Path) -> None:
    save_pretrained(scorer_of("llama").decoder, tmp_path / "model")
    with pytest.raises(ValueError, match="scalar head"):
        LLM(tmp_path / "model")
    with pytest.raises(ValueError, match="scalar head"):
        LLM.from_model(scorer_of("llama").decoder)


def adapted(base: Path, folder: Path) -> Scorer:
    scorer = Scorer(load_trainable(with_head(open_weights(base))))
    add_lora(scorer.decoder, LoraConfig(r=4, alpha=8, target_modules="all-linear"))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*lora_parameters(scorer.decoder).values(), scorer.head.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    save_adapter(scorer.decoder, folder, str(base))
    return scorer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer") / "base"
    save_pretrained(model_of("llama", torch.float32), folder, train_tokenizer(["abc"] * 9, 300,
                    allow_smaller=True))  # fmt: skip
    return folder


def test_an_adapter_trains_its_factors_and_the_whole_head(base: Path, tmp_path: Path) -> None:
    scorer = adapted(base, tmp_path / "adapter")
    trained = {n for n, p in scorer.decoder.named_parameters() if p.requires_grad}
    assert trained == {*lora_parameters(scorer.decoder), "score.weight"}
    scorer.last_scores(Documents.pack(DOCUMENTS)).sum().backward()
    assert all(p.grad is not None for p in scorer.decoder.parameters() if p.requires_grad)


def test_peft_loads_an_adapter_with_its_head_and_gives_the_same_scores(
    base: Path, tmp_path: Path
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    scorer = adapted(base, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 95
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    for document in DOCUMENTS:
        with torch.no_grad():
            expected = theirs(torch.tensor([document])).logits[:, 0]
            mine = scorer.last_scores(Documents.pack([document]))
        torch.testing.assert_close(mine, expected, rtol=TOLERANCE, atol=TOLERANCE)
    theirs.save_pretrained(tmp_path / "peft")  # and what PEFT saves loads here, base and all
    again = load_scorer(tmp_path / "peft")
    torch.testing.assert_close(last_scores(again), last_scores(scorer))
    assert again.tokenizer.fingerprint == Tokenizer.from_hf(base).fingerprint
    assert not any(p.requires_grad for p in again.decoder.parameters())
    trainable = load_scorer(tmp_path / "peft", trainable=True)
    assert trainable.head.weight.requires_grad


def test_a_merged_export_keeps_the_head(base: Path, tmp_path: Path) -> None:
    scorer = adapted(base, tmp_path / "judge")
    weights = weights_of(open_weights(base), read_adapter(tmp_path / "judge"))
    export_hf(weights, tmp_path / "merged", "f32", None)
    merged = load_scorer(tmp_path / "merged")
    torch.testing.assert_close(last_scores(merged), last_scores(scorer), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="scalar head"):
        export_gguf(weights, tmp_path / "merged.gguf", "f32", None)


def test_an_adapter_with_a_head_goes_on_no_language_model_and_the_reverse(
    base: Path, tmp_path: Path
) -> None:
    adapted(base, tmp_path / "judge")
    with pytest.raises(ModelFileError, match="scalar head: the adapter judges"):
        load_adapter(load_trainable(base), tmp_path / "judge")
    plain = load_trainable(base)
    add_lora(plain, LoraConfig(r=4))
    save_adapter(plain, tmp_path / "plain", str(base))
    with pytest.raises(ModelFileError, match=r"score\.weight: is missing"):
        load_adapter(load_trainable(with_head(open_weights(base))), tmp_path / "plain")


def test_the_padding_token_ends_no_document() -> None:
    tokenizer = train_tokenizer(["some words to learn"] * 4, 300, allow_smaller=True)
    pad = padding_token(tokenizer)
    assert pad is None or pad not in tokenizer.eos_token_ids


def test_the_configuration_survives_its_file() -> None:
    config = replace(config_of("qwen3"), scalar_head=True, tie_word_embeddings=True, pad_token_id=3)
    values = config.to_hf()
    assert values["architectures"] == ["Qwen3ForSequenceClassification"]
    read = ModelConfig.from_hf(values)
    assert (read.scalar_head, read.pad_token_id) == (True, 3)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        replace(config, tie_word_embeddings=False)

"""llama.cpp and fastllm, given the same quantized GGUF file, predict alike.

The files are made by llama.cpp's own quantizer: in plain runs from a model of random weights that
are large enough for sharp predictions (of a nearly uniform one every divergence is small), in full
runs also from one that is trained here and from SmolLM2. llama.cpp rounds activations to 8 bits too
(in blocks of 32, of 256 for K-quants), so no mode of ours has its bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from torch import Tensor

from fastllm import LLM
from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_gguf import PRE_TOKENIZERS
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents

ROOT = Path(__file__).parents[2]
# llama.cpp's numbers of file types; pure files have every matrix in the one format
FILE_TYPES = {
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "q4_k": 15, "q5_k": 17, "q6_k": 18,
}  # fmt: skip
MODES = ("int8", "bf16", "fp32")
PLAIN_MODES = MODES[:2]  # of plain runs
LIMIT = 0.01  # nats a token
TOKENS = 96
STEPS, ROWS, LENGTH = 200, 8, 64


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    """The module; skips where it is not installed."""
    return pytest.importorskip("llama_cpp")


def _tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE of 384 tokens that llama.cpp knows how to cut."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS["smollm"].build(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=[AddedToken("<|end|>", special=True)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Tokenizer(backend, special_tokens={"bos_token": "<|end|>", "eos_token": "<|end|>"})


def _config() -> ModelConfig:
    """Rows fill the blocks of 256 of K-quants."""
    return ModelConfig(
        model_type="llama", vocab_size=384, hidden_size=256, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        rms_norm_eps=1e-5, max_position_embeddings=512, eos_token_ids=(0,), bos_token_id=0,
    )  # fmt: skip


def _sharp() -> Decoder:
    """Random layers, and a head whose logits lie some 3 nats apart."""
    model = initialize(_config(), dtype=torch.float32, seed=0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                size = {"lm_head.weight": 3.0, "model.embed_tokens.weight": 4.0}.get(name, 1.0)
                scale = size * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=g) * scale)
    return model


def _trained(ids: Tensor) -> Decoder:
    """After some steps of AdamW."""
    model = initialize(_config(), dtype=torch.float32, seed=0)
    rate = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH - 1, (ROWS,), generator=g).tolist()
        rows = [ids[s : s + LENGTH + 1] for s in starts]
        documents = Documents.pack([row[:-1] for row in rows])
        loss = model.loss(documents, torch.cat([row[1:] for row in rows]), "mean")
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, 1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 4.2, f"the model has not learned: {loss.item()} (uniform: 5.95)"
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[int]]]:
    """A GGUF file of float32 of the model "sharp" or "trained", and ids that neither has seen."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokenizer = _tokenizer(text)
    ids = tokenizer.encode(text)
    folder, made = tmp_path_factory.mktemp("llama"), dict[str, Path]()

    def get(kind: str) -> tuple[Path, list[int]]:
        if kind not in made:
            model = _sharp() if kind == "sharp" else _trained(torch.tensor(ids[TOKENS:]))
            made[kind] = folder / f"{kind}.gguf"
            export_gguf(weights_of(model), made[kind], "f32", tokenizer)
        return made[kind], ids[:TOKENS]

    return get


def quantized_by_llama_cpp(
    llama_cpp: Any, source: Path, target: Path, format: str, *, pure: bool
) -> Path:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[format], 1
    parameters.allow_requantize, parameters.pure = True, pure
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    assert status == 0
    return target


def their_log_probs(llama_cpp: Any, path: Path, ids: list[int]) -> Tensor:
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 8, n_threads=threads, n_threads_batch=threads,
        logits_all=True, verbose=False,
    )  # fmt: skip
    try:
        model.eval(ids)
        return torch.tensor(model.scores[: len(ids)]).double().log_softmax(-1)
    finally:
        model.close()


def divergences(
    llama_cpp: Any, path: Path, ids: list[int], modes: Sequence[str] = MODES
) -> tuple[dict[str, float], float]:
    """Mean KL(llama.cpp || fastllm) in nats a token, for each activation mode, and the entropy."""
    theirs = their_log_probs(llama_cpp, path, ids)
    found = {}
    for mode in modes:
        llm = LLM(
            path, activation=mode, dtype="float32" if mode == "fp32" else "bfloat16",
            enforce_eager=True, max_model_len=len(ids) + 8, max_num_seqs=1,
        )  # fmt: skip
        ours = llm.logits(ids).double().log_softmax(-1)
        found[mode] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    return found, -float((theirs.exp() * theirs).sum(-1).mean())


@pytest.mark.parametrize("kind", ["sharp", pytest.param("trained", marks=pytest.mark.full)])
@pytest.mark.parametrize("format", FILE_TYPES)
def test_llama_cpp_predicts_alike_on_the_same_file(
    format: str, kind: str, files: Callable[[str], tuple[Path, list[int]]], llama_cpp: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    source, ids = files(kind)
    path = quantized_by_llama_cpp(llama_cpp, source, tmp_path / "q.gguf", format, pure=True)
    weights = open_weights(path)
    assert {weights.format(n) for n in weights.names if "norm" not in n} == {format}
    modes = PLAIN_MODES if kind == "sharp" else MODES
    found, entropy = divergences(llama_cpp, path, ids, modes)
    print(f"{format} {kind}: entropy {entropy:.2f}, KL {found}")
    assert entropy < 4.5, "predictions are nearly uniform (5.95): the test would tell nothing"
    assert all(0 <= kl < LIMIT for kl in found.values()), found


def test_the_limit_tells_one_format_from_another(
    files: Callable[[str], tuple[Path, list[int]]], llama_cpp: Any, tmp_path: Path
) -> None:
    source, ids = files("sharp")
    one, other = (
        quantized_by_llama_cpp(llama_cpp, source, tmp_path / f, f, pure=True)
        for f in ("q4_0", "q4_1")
    )
    theirs = their_log_probs(llama_cpp, one, ids)
    ours = LLM(other, dtype="float32", activation="fp32", enforce_eager=True).logits(ids)
    assert float((theirs.exp() * (theirs - ours.double().log_softmax(-1))).sum(-1).mean()) > LIMIT


@pytest.mark.full
@pytest.mark.parametrize("format", FILE_TYPES)
def test_llama_cpp_predicts_alike_on_a_real_model(
    format: str, llama_cpp: Any, tmp_path: Path
) -> None:
    try:
        source = resolve("smollm2")
    except LookupError:
        pytest.skip("smollm2 is not installed")
    path = quantized_by_llama_cpp(llama_cpp, source, tmp_path / "q.gguf", format, pure=False)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = Tokenizer.from_gguf(open_weights(path).file.metadata, file=path).encode(text)[:TOKENS]  # type: ignore[union-attr]
    found, entropy = divergences(llama_cpp, path, ids)
    print(f"{format} smollm2: entropy {entropy:.2f}, KL {found}")
    # On float32 weights the two differ by 1e-6. Here llama.cpp's rounding of activations costs it
    # 0.0042 (q4_1) to 0.0085 (q5_k) against exact products, our int8 mode's about as much: where
    # both round, in blocks of other sizes, the two add up, to 0.0119 of q5_k and 0.0097 of q6_k,
    # whose activations llama.cpp rounds in blocks of 256. All others stay below the limit.
    wide = 1.5 if format in ("q5_k", "q6_k") else 1.0
    limits = {"int8": wide * LIMIT, "bf16": LIMIT, "fp32": LIMIT}
    assert all(0 <= kl < limits[mode] for mode, kl in found.items()), found

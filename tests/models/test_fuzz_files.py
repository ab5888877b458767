"""Damaged and hostile model files: always success or ModelFileError, fast and within memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.loader import save_pretrained
from fastllm.models.rope_scaling import rope_frequencies
from fastllm.models.safetensors_files import save_directory
from fastllm.models.stored_tensor import StoredTensor
from fastllm.models.trainable import initialize
from fastllm.models.weights import GGUFWeights, open_weights
from fastllm.quantize.gguf_blocks import quantize
from fastllm.testing.small_models import SPARSE, config_of

SHORT, FULL = 1_000, 100_000
SECONDS_PER_CASE = 10  # a case takes 1 ms; the rest is for machines that are busy elsewhere
ADDRESS_SPACE = 512 << 20  # that a case may add, touched or not
RESIDENT = 64 << 20  # that all cases together may add

HOSTILE_NUMBERS = [0, 1, 2, 7, 31, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
                   1 << 60, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
HOSTILE_JSON = ["0", "-1", "1e999", "-0.0", "1e-320", "NaN", "null", "true", '""', '"F64"', "[]",
                "{}", "[0]", "[[]]", '"../../x"', "1152921504606846976", "18446744073709551616",
                "9" * 400, "0.1", '"\\u0000"', "[1,2,3,4,5,6,7,8,9]", "[" * 2000]  # fmt: skip

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 40,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
    "eos_token_id": [1, 2], "torch_dtype": "float32", "rope_theta": 10000.0,
}  # fmt: skip


def valid_gguf(path: Path) -> None:
    """A small llama-order file with every kind of field that the reader knows."""
    config = ModelConfig.from_hf(CONFIG)
    gguf_names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
    }  # fmt: skip
    tensors = {"rope_freqs.weight": StoredTensor("f32", (8,), torch.ones(8))}
    formats = ("q4_0", "q4_1", "q8_0", "f32")
    for number, (name, shape) in enumerate(config.weight_shapes().items()):
        format = "f32" if len(shape) == 1 else formats[number % 4]
        for ours, theirs in gguf_names.items():
            name = name.replace(ours, theirs)
        x = torch.ones(shape)
        data = x if format == "f32" else quantize(format, x)
        tensors[name] = StoredTensor(format, shape, data)
    metadata = {
        "general.architecture": "llama", "general.alignment": 32, "llama.block_count": 2,
        "llama.context_length": 64, "llama.embedding_length": 32, "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 1e4, "llama.rope.scaling.type": "none",
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(40)],
        "tokenizer.ggml.token_type": [1] * 40, "tokenizer.ggml.scores": [0.5] * 40,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    write_gguf(path, metadata, tensors)


def valid_directory(path: Path) -> None:
    shapes = ModelConfig.from_hf(CONFIG).weight_shapes()
    save_directory(path, {n: torch.ones(s) for n, s in shapes.items()}, CONFIG,
                   max_shard_bytes=32_000)  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))


def sparse_gguf(path: Path) -> None:
    config = config_of("mixtral")
    export_gguf(weights_of(initialize(config)), path, "f16", None)


def sparse_directory(path: Path) -> None:
    save_pretrained(initialize(config_of("deepseek v3 experts"), dtype=torch.float32), path)


def mutate_bytes(raw: bytes, header: int, rng: random.Random) -> bytes:
    """One to three damages, most of them in the first `header` bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        limit = max(1, min(header, len(data)) if rng.random() < 0.9 else len(data))
        at, kind = rng.randrange(limit), rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << rng.randrange(8)])
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", rng.choice(HOSTILE_NUMBERS))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", rng.choice(HOSTILE_NUMBERS) & 0xFFFFFFFF)
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 6:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        else:
            source = rng.randrange(limit)
            data[at:at] = data[source : source + rng.randrange(1, 200)]
    return bytes(data)


def mutate_number_field(raw: bytes, header: int, rng: random.Random) -> bytes:
    """Replace one aligned-or-not small integer, where counts, sizes and types live."""
    for _ in range(50):
        at = rng.randrange(4, header - 8)
        if struct.unpack_from("<Q", raw, at)[0] < 1 << 16:
            hostile = struct.pack("<Q", rng.choice(HOSTILE_NUMBERS))
            return raw[:at] + hostile + raw[at + 8 :]
    return raw


def mutate_json(text: str, rng: random.Random) -> str:
    """Replace one value of a JSON text, found by where values start and end."""
    starts = [i + 1 for i, c in enumerate(text) if c in ":[,"]
    start = rng.choice(starts)
    end = start
    while end < len(text) and text[end] not in ",}]":
        end += 1
    return text[:start] + rng.choice(HOSTILE_JSON) + text[end:]


@contextmanager
def limits() -> Iterator[None]:
    """Fail on a hang, on a large allocation even if untouched, and on a grown process."""

    def hang(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"a case took more than {SECONDS_PER_CASE} s")

    def size(column: int) -> int:
        return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    resident = size(1)
    resource.setrlimit(resource.RLIMIT_AS, (size(0) + ADDRESS_SPACE, hard))
    try:
        yield
        assert size(1) - resident < RESIDENT
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def use(path: Path) -> None:
    """Everything that a loader does with a model's files."""
    source = open_weights(path)
    rope_frequencies(source.config, 64)
    for name in source.names:
        source.get(name).to_float32()
    if isinstance(source, GGUFWeights):
        for value in source.file.metadata.values():
            if not isinstance(value, bool | int | float | str):
                list(value)
    source.release()


def fuzz(path: Path, cases: int, damage: Callable[[random.Random], object]) -> dict[str, int]:
    """Run `cases` damages; returns how many were accepted and refused."""
    counts = {"accepted": 0, "refused": 0}
    use(path)  # undamaged, and everything is imported before memory is measured
    with limits():
        for seed in range(cases):
            rng = random.Random(seed)
            damage(rng)
            signal.alarm(SECONDS_PER_CASE)
            try:
                use(path)
                counts["accepted"] += 1
            except ModelFileError as error:
                assert str(path) in str(error), f"seed {seed}: {error} does not name the file"
                assert len(str(error)) < 2000, f"seed {seed}: the message is too long"
                counts["refused"] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            signal.alarm(0)
    return counts


def fuzz_gguf(
    folder: Path, cases: int, write: Callable[[Path], None] = valid_gguf
) -> dict[str, int]:
    path = folder / "model.gguf"
    write(path)
    raw = path.read_bytes()
    header = min(t.offset for t in open_weights(path).file.tensors.values())

    def damage(rng: random.Random) -> None:
        mutate = rng.choice((mutate_bytes, mutate_number_field))
        path.write_bytes(mutate(raw, header, rng))

    return fuzz(path, cases, damage)


def fuzz_directory(
    folder: Path, cases: int, write: Callable[[Path], None] = valid_directory
) -> dict[str, int]:
    path = folder / "model"
    write(path)
    originals = {file: file.read_bytes() for file in sorted(path.iterdir())}
    touched: list[Path] = []

    def damage(rng: random.Random) -> None:
        for file in touched:
            file.write_bytes(originals[file])
        touched[:] = [rng.choice(list(originals))]
        raw = originals[touched[0]]
        header = len(raw)
        if touched[0].suffix == ".safetensors":
            header = 8 + struct.unpack_from("<Q", raw)[0]
        if rng.random() < 0.5:
            touched[0].write_bytes(mutate_bytes(raw, header, rng))
            return
        start = 8 if touched[0].suffix == ".safetensors" else 0
        text = mutate_json(raw[start:header].decode(), rng).encode()
        length = struct.pack("<Q", len(text)) if start else b""
        touched[0].write_bytes(length + text + raw[header:])

    return fuzz(path, cases, damage)


FUZZERS: dict[str, Callable[[Path, int], dict[str, int]]] = {
    "gguf": fuzz_gguf,
    "directory": fuzz_directory,
    "sparse gguf": partial(fuzz_gguf, write=sparse_gguf),
    "sparse directory": partial(fuzz_directory, write=sparse_directory),
}


@pytest.mark.parametrize("kind", FUZZERS)
def test_a_thousand_damaged_models(kind: str, tmp_path: Path) -> None:
    counts = FUZZERS[kind](tmp_path, SHORT)
    # both outcomes must come up, or the damages test nothing
    assert counts["refused"] > SHORT // 4 and counts["accepted"] > SHORT // 50, counts


@pytest.mark.full
@pytest.mark.parametrize("kind", FUZZERS)
def test_a_hundred_thousand_damaged_models(kind: str, tmp_path: Path) -> None:
    counts = FUZZERS[kind](tmp_path, FULL)
    assert sum(counts.values()) == FULL
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("case", SPARSE)
def test_every_key_of_a_mixture_with_every_hostile_value(case: str) -> None:
    unread = {"num_nextn_predict_layers"}  # and a window that is switched off
    unread |= {"sliding_window"} if case == "qwen3 moe" else set()
    values = config_of(case).to_hf()
    for key in values:
        outcomes = set()
        for text in HOSTILE_JSON:
            try:
                hostile = values | {key: json.loads(text)}
            except (ValueError, RecursionError):
                continue
            try:
                ModelConfig.from_hf(hostile, "config.json")
                outcomes.add("accepted")
            except ModelFileError as error:
                assert "config.json" in str(error)
                outcomes.add("refused")
        assert "refused" in outcomes or key in unread, key


@pytest.mark.parametrize("key", CONFIG)
def test_a_config_key_with_every_hostile_value(key: str) -> None:
    outcomes = set()
    for text in HOSTILE_JSON:
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError):
            continue  # refused by the parser, which has its own tests
        try:
            ModelConfig.from_hf(CONFIG | {key: value}, "config.json")
            outcomes.add("accepted")
        except ModelFileError as error:
            assert "config.json" in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes

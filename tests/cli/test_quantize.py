"""`fastllm quantize`: what it says, what it writes, what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastllm.cli.main import main
from fastllm.models.config import ModelConfig
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.nn.batch import Documents
from fastllm.nn.linear import Linear

TEXT = "The cat sat on the mat, and the dog barked at 1234 cats. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = train_tokenizer([TEXT], 300, allow_smaller=True, show_progress=False)
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    save_pretrained(initialize(config, dtype=torch.float32), folder, tokenizer)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_rule_the_rows_and_the_real_bits_are_shown(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--format", "int4", "--method", "gptq", "--calibration", str(text), "--out", str(out)]
    assert main(["quantize", str(model), *words, "--samples", "9", "--length", "32"]) == 0
    shown = capsys.readouterr()
    assert "self_attn.q_proj: int4_g128" in shown.out
    assert "int4_g128 does not fit the rows of mlp.down_proj (2 matrices): int4_g32" in shown.out
    assert "left as they are: model.embed_tokens, lm_head" in shown.out
    assert f"{out}: " in shown.out
    assert "bits per quantized weight    4.18" in shown.out
    assert "calibration: 9 rows of 32 tokens" in shown.err
    assert "layer 2/2: relative error" in shown.err
    assert (out / "tokenizer.json").exists()
    assert load_model(out).config.hidden_size == 128


def test_an_importance_matrix_is_kept_and_used_again(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["quantize", str(model), "--format", "q4_0", "--method", "imatrix"]
    kept = str(tmp_path / "imatrix.gguf")
    first = ["--calibration", str(text), "--length", "32", "--save-imatrix", kept]
    assert main([*base, *first, "--out", str(tmp_path / "a.gguf")]) == 0
    assert main([*base, "--imatrix", kept, "--out", str(tmp_path / "b.gguf")]) == 0
    a, b = (load_model(tmp_path / f"{name}.gguf") for name in "ab")
    first_down, again = (m.get_submodule("model.layers.1.mlp.down_proj") for m in (a, b))
    assert isinstance(first_down, Linear) and isinstance(again, Linear)
    assert first_down.packed is not None and again.packed is not None
    assert torch.equal(first_down.packed.data, again.packed.data)
    assert "the importance matrix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "int5"], "format 'int5' is not known; did you mean"),
        (["--format", "int4", "--method", "gptq"], "--method gptq needs --calibration FILE"),
        (["--format", "int4", "--save-imatrix", "x"], "--save-imatrix goes with --method imatrix"),
        (["--format", "q4_0", "--method", "imatrix", "--imatrix", "x", "--calibration", "y"],
         "--imatrix takes the place of --calibration"),
        (["--format", "int4", "--method", "awq", "--calibration", "EMPTY"],
         "the calibration text is empty"),
        (["--format", "int4", "--method", "awq", "--calibration", "MISSING"], "MISSING"),
        (["--format", "int4", "--method", "gptq", "--calibration", "TEXT", "--damping", "0"],
         "damping must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], message: str, model: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    places = {"EMPTY": str(empty), "TEXT": str(text), "MISSING": str(tmp_path / "MISSING")}
    out = tmp_path / "out"
    given = [places.get(word, word) for word in words]
    assert main(["quantize", str(model), *given, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["missing/x.gguf", ".", "text.txt/x.gguf"])
def test_an_importance_matrix_that_cannot_be_kept_is_refused_before_the_work(
    place: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    words = ["quantize", str(model), "--format", "q4_0", "--method", "imatrix", "--out", str(out)]
    words += ["--calibration", str(text), "--save-imatrix", str(tmp_path / place)]
    assert main(words) == 2
    assert f"--save-imatrix {tmp_path / place}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@torch.no_grad()
def costs(exact: Path, found: Path, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(held-out loss above the exact model's, divergence from it), both a token, in float32."""
    models = [load_model(path, dtype="float32", activation="fp32") for path in (exact, found)]
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(texts), 16):
        parts = [torch.tensor(ids) for ids in texts[first : first + 16]]
        documents = Documents.pack(parts)
        inner = torch.cat([torch.arange(len(ids)) < len(ids) - 1 for ids in parts])
        targets = torch.cat([ids[1:] for ids in parts]).unsqueeze(1)
        p, q = (m.logits(m.train_hidden(documents)).log_softmax(-1)[inner] for m in models)
        sums[0] += (p - q).gather(1, targets).sum(dtype=torch.float64)
        sums[1] += (p.exp() * (p - q)).sum(dtype=torch.float64)
        sums[2] += len(targets)
    gap, divergence = (sums[:2] / sums[2]).tolist()
    return gap, divergence


NAMES = "Ada Ben Carla Deniz Elif Farid Grace Hugo Ines Jonas Kira Leon Mina Noor Omar".split()
THINGS = "apples books coins cards eggs flowers grapes hats keys lamps marbles nuts pens".split()
PLACES = "market school garden station library kitchen harbor village museum bakery".split()
GETS = {"buys": "bought", "finds": "found", "picks": "picked", "wins": "won", "makes": "made"}
LOSES = {"sells": "sold", "loses": "lost", "eats": "ate", "breaks": "broke", "hides": "hid"}


def story(g: random.Random) -> str:
    """A made-up word problem and how it is solved."""
    a, b = g.sample(NAMES, 2)
    thing, other = g.sample(THINGS, 2)
    place, count = g.choice(PLACES), g.randint(2, 60)
    text, steps = f"{a} has {count} {thing} and goes to the {place}.", []
    for _ in range(g.randint(1, 4)):
        if count < 2 or g.random() < 0.5:
            verb, n = g.choice(list(GETS)), g.randint(2, 30)
            text += f" There {a} {verb} {n} more {thing}."
            steps.append(f"{a} {GETS[verb]} {n}, so {count} + {n} = {count + n}.")
            count += n
        elif g.random() < 0.3:
            text += f" {b} comes by with {g.randint(2, 9)} {other}, which do not matter."
        else:
            verb, n = g.choice(list(LOSES)), g.randint(1, count)
            text += f" Then {a} {verb} {n} of the {thing}."
            steps.append(f"{a} {LOSES[verb]} {n}, so {count} - {n} = {count - n}.")
            count -= n
    text += f" How many {thing} does {a} have now?\n"
    return text + " ".join(steps) + f"\n{a} has {count} {thing} now.\n"


@pytest.mark.full
def test_gptq_recovers_much_of_what_rounding_a_trained_model_costs(tmp_path: Path) -> None:
    """A model that the project trains, in 4 bits of groups of 128.

    Calibration reads what training read; losses are those of stories that neither has seen.
    """
    g = random.Random(0)
    held_out = [story(g) for _ in range(800)]
    text = tmp_path / "stories.jsonl"
    with text.open("w") as file:
        for _ in range(16000):  # training sees each once
            file.write(json.dumps({"text": story(g)}) + "\n")
    tokens, store, trained = (str(tmp_path / name) for name in ("tokens", "store", "run"))
    words = [str(text), "--vocab-size", "512", "--out", tokens]
    assert main(["tokenizer", "train", *words]) == 0
    words = [str(text), "--tokenizer", tokens, "--out", store, "--holdout", "0", "--processes", "1"]
    assert main(["data", "prepare", *words, "--keep-duplicates"]) == 0
    shape = ["model.layers=2", "model.width=256", "model.head_dim=64", "model.heads=4",
             "model.kv_heads=2", "model.inner=768", "model.context=128"]  # fmt: skip
    rest = ["data.seq_len=128", "data.batch_tokens=4096", "loop.schedule.final=0.0"]
    steps = ["--steps", "300", "--out", trained, "loop.metrics.progress=none"]
    assert main(["pretrain", "--store", store, *shape, *rest, *steps]) == 0
    (checkpoint,) = sorted(Path(trained, "checkpoints").iterdir())[-1:]
    tokenizer = Tokenizer.from_hf(tokens)
    start = tokenizer.bos_token_id  # which documents of training begin with
    texts = [[start, *tokenizer.encode(text)][:128] for text in held_out]
    gap, divergence = {}, {}
    for method in ("rtn", "imatrix", "awq", "gptq"):
        out = tmp_path / method
        words = ["--format", "int4", "--method", method, "--out", str(out), "--length", "128"]
        given = [] if method == "rtn" else ["--calibration", str(text), "--samples", "384"]
        assert main(["quantize", str(checkpoint), *words, *given]) == 0
        gap[method], divergence[method] = costs(checkpoint, out, texts)
    assert 0 < gap["gptq"] <= 0.6 * gap["rtn"], (gap, divergence)
    assert divergence["gptq"] < 0.5 * divergence["rtn"], (gap, divergence)
    for method in ("imatrix", "awq"):
        assert divergence[method] < 1.05 * divergence["rtn"], (gap, divergence)

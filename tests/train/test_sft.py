"""Fine-tuning: tiny models learn their dialogues; runs repeat, resume and leave usable files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm import LLM, SamplingParams
from fastllm.cli import sft as cli
from fastllm.cli.training import parse
from fastllm.errors import CheckpointError, DataError
from fastllm.models.config import ModelConfig
from fastllm.models.loader import read_tokenizer, save_pretrained
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights
from fastllm.testing.small_models import config_of
from fastllm.train import sft
from fastllm.train.data.conversations import parse_record
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.epochs import split

CHATS = [
    ("What is two and two?", "Two and two are four."),
    ("Name a color.", "Blue is a color."),
    ("Who are you?", "I am a small model."),
    ("Say hello.", "Hello there!"),
]
QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: two layers of random weights and a tokenizer for the chats."""
    folder = tmp_path_factory.mktemp("sft") / "base"
    tokenizer = train_tokenizer([f"{q} {a}" for q, a in CHATS] * 2, 330, allow_smaller=True)
    config = ModelConfig(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
    )
    save_pretrained(initialize(config, seed=1), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in CHATS))
    return file


def fine_tune(model: Path, data: Path, out: Path, *more: str) -> sft.SftResult:
    words = [f"--model={model}", f"--data={data}", f"--out={out}", "--holdout=none", *QUIET]
    return sft.main(sft.load(None, [*words, *more]), say=lambda line: None)


LEARN = ["--batch_size=4", "--epochs=60", "--lr=1e-2", "--samples=4", "--weight_decay=0"]


def test_a_full_run_learns_its_answers_and_where_they_end(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    result = fine_tune(base, chats, tmp_path / "run", "--method=full", *LEARN)
    assert result.run.status == "finished" and result.run.step == 60
    assert [a.after for a in result.answers] == [a.expected for a in result.answers]
    assert [a.before for a in result.answers] != [a.expected for a in result.answers]
    assert result.output == tmp_path / "run" / "model"
    llm = LLM(result.output)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    for question, answer in CHATS:
        (output,) = llm.chat([{"role": "user", "content": question}], params)
        assert output.outputs[0].text == answer
        assert output.outputs[0].finish_reason == "stop"
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.output)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHATS[0][0]}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    generated = loaded.generate(**ids, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == CHATS[0][1]


# PEFT reads a property that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_learns_its_answers_and_is_loaded_by_peft_and_by_name(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    result = fine_tune(base, chats, tmp_path / "run", "--rank=8", *LEARN, "--epochs=100")
    assert [a.after for a in result.answers] == [a.expected for a in result.answers]
    assert result.output == tmp_path / "run" / "adapter"
    llm = LLM(base, adapter=result.output)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    (output,) = llm.chat([{"role": "user", "content": CHATS[1][0]}], params)
    assert output.outputs[0].text == CHATS[1][1]
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, result.output)
    assert adapted.peft_config["default"].base_model_name_or_path == str(base)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    with torch.no_grad():
        theirs = adapted(torch.tensor([ids])).logits[0]
    answer = theirs[len(output.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
    assert answer == list(output.outputs[0].token_ids)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_ends_with_the_same_bits(
    base: Path, chats: Path, tmp_path: Path, method: str
) -> None:
    options = [f"--method={method}", "--batch_size=2", "--epochs=3", "--samples=0",
               "--lora.dropout=0.1", "--lr=1e-3", "--loop.save_every=2"]  # fmt: skip
    whole = fine_tune(base, chats, tmp_path / "whole", *options)
    middle = tmp_path / "whole" / "checkpoints" / "step-000004"
    assert whole.run.step == 6 and middle.is_dir()
    resumed = fine_tune(base, chats, tmp_path / "resumed", *options, f"--resume={middle}")
    assert resumed.run.step == 6 and resumed.loss_before is None
    for file in whole.output.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(resumed.output / file.name)
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(CheckpointError, match="position in the examples was saved with data"):
        fine_tune(base, other, tmp_path / "o", *options, f"--resume={middle}")


def test_how_a_step_is_cut_changes_its_loss_by_rounding_only(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    losses = []
    for tokens in (32, 1000):
        run = fine_tune(
            base, chats, tmp_path / str(tokens), "--method=full", "--batch_size=4", "--epochs=3",
            f"--micro_tokens={tokens}", "--samples=0", "--dtype=float32", "--lr=1e-3",
        )  # fmt: skip
        losses.append(run.run.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_left_open_is_chosen_from_the_data(base: Path) -> None:
    tokenizer = read_tokenizer(open_weights(base))
    conversation = parse_record({"prompt": "a", "completion": "b"}, "prompt")
    (example,) = ConversationEncoder(tokenizer).encode([conversation])
    config = sft.SftConfig(data=("x",))
    # examples -> epochs, batch, steps
    expected = {10: (10, 4, 25), 100: (10, 4, 250), 400: (3, 8, 150), 10_000: (2, 32, 625)}
    for count, wanted in expected.items():
        plan = sft.choose(config, [example] * count, 2000)
        assert (plan.epochs, plan.batch_size, plan.steps) == wanted
        assert plan.lr == pytest.approx(5e-4)
    full = dataclasses.replace(config, method="full", lr_multiplier=2.0, epochs=1.5, batch_size=7)
    plan = sft.choose(full, [example] * 100, 500)
    assert (plan.epochs, plan.batch_size, plan.examples, plan.steps) == (1.5, 7, 150, 22)
    assert plan.lr == pytest.approx(2 * 5e-5 * 4**0.78)
    loop = config.loop_of(sft.choose(config, [example] * 400, 2000).steps)
    assert (loop.steps, loop.schedule.warmup) == (150, 8)
    short = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=9))
    assert short.loop_of(plan.steps).steps == 9


def test_the_split_is_seeded_and_disjoint() -> None:
    everything: list[Any] = [
        parse_record({"prompt": str(i), "completion": "x"}, "prompt") for i in range(100)
    ]
    for holdout, count in (("auto", 5), ("none", 0), ("0.1", 10), ("0.999", 99)):
        train, held = split(everything, holdout, seed=1)
        assert len(held) == count and len(train) == 100 - count
        assert not {id(c) for c in train} & {id(c) for c in held}
    assert split(everything, "auto", 1)[1] != split(everything, "auto", 2)[1]
    for wrong in ("0", "1", "-0.1", "nothing.jsonl"):
        if wrong == "0":
            assert not split(everything, wrong, 1)[1]
            continue
        with pytest.raises(ValueError, match="holdout must be auto, none, a share"):
            split(everything, wrong, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modle=x"], "modle.*model"),
        (["--method=lorra"], "method must be one of lora, full.*mean lora"),
        (["--lora.rank=two"], "lora.rank must be integer"),
        (["--epochs=0"], "epochs must be above 0"),
        (["--seq_len=1"], "seq_len must be at least 2"),
        (["--warmup=2"], "warmup must be a share"),
        (["--samples=-1"], "samples must be at least 0"),
    ],
)
def test_bad_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sft.load(None, words)


def test_what_cannot_be_trained_is_said(base: Path, chats: Path, tmp_path: Path) -> None:
    def attempt(*more: str, data: Path = chats) -> None:
        fine_tune(base, data, tmp_path / "run", *more)

    with pytest.raises(ValueError, match="data is empty"):
        sft.main(sft.SftConfig(model=str(base)))
    with pytest.raises(ValueError, match="chat_template must be model, chatml, plain or a file"):
        attempt("--chat_template=alpaca")
    with pytest.raises(ValueError, match="seq_len 4096 is beyond the model's context of 128"):
        attempt("--seq_len=4096")
    with pytest.raises(DataError, match="all 4 examples are too long for 8 tokens"):
        attempt("--seq_len=8", "--overlong=drop")
    with pytest.raises(
        ValueError, match=r"target_modules: 'q_porj' names no layer.*did you mean q_proj"
    ):
        attempt("--lora.targets=q_porj")
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(DataError, match=r"chats.jsonl: line 1: messages\[1\].*never stop"):
        attempt(f"--chat_template={endless}")


def test_quantized_weights_are_not_trained_in_full(real_model: Path, chats: Path) -> None:
    config = sft.load(None, [f"--model={real_model}", f"--data={chats}", "--method=full"])
    with pytest.raises(ValueError, match=r"quantized weights, which stay as they are.*adapter"):
        sft.main(config)


def test_the_command_takes_model_and_data_or_a_file(
    base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = [str(base), str(chats), "--epochs=1", "--out", str(out), "--holdout=none", "--rank=2"]
    assert cli.run([*words, *QUIET, "--samples=1"]) == 0
    said = capsys.readouterr().out
    assert CHATS[0][1] in said and "finished after 1 steps" in said
    again = parse(["--config", str(out / "config.yaml"), "--out", "elsewhere"], sft.load, cli.USAGE)
    assert again == dataclasses.replace(
        parse([*words, *QUIET, "--samples=1"], sft.load, cli.USAGE),
        loop=dataclasses.replace(again.loop, out="elsewhere"),
    )
    for wrong, message in (
        ([], "a model and data, or --config, are needed"),
        (["smollm2"], "no data is given"),
        (["--config"], "--config needs a file"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(wrong, sft.load, cli.USAGE)
    assert cli.run(["--help"]) == 0
    assert "--lora.rank" in capsys.readouterr().out


def test_a_latent_model_is_saved_and_resumed_in_the_order_of_its_file(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_hf(base)
    config = dataclasses.replace(config_of("deepseek v3"), vocab_size=tokenizer.vocab_size)
    model = tmp_path / "latent"
    save_pretrained(initialize(config, seed=1), model, tokenizer)
    still = ["--method=full", "--batch_size=4", "--lr=1e-30", "--weight_decay=0"]
    fine_tune(model, chats, tmp_path / "run", *still, "--loop.steps=1")
    result = fine_tune(model, chats, tmp_path / "run", *still, "--loop.steps=2", "--resume=auto")
    assert result.run.step == 2
    expected = load_file(model / "model.safetensors")
    found = load_file(result.output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name

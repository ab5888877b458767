"""Models quantized layer by layer: what the files hold, that work goes on, memory, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.models.gguf_export import export_gguf, export_hf, weights_of
from fastllm.models.imatrix import read_imatrix, save_imatrix
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.moe_config import MoeConfig
from fastllm.models.quantizing import methods, work
from fastllm.models.quantizing.block import Block
from fastllm.models.quantizing.calibration import calibration_rows
from fastllm.models.quantizing.methods import Awq, Settings
from fastllm.models.quantizing.run import Progress, Report, _Run, plan_of, quantize_files
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.moe import Experts
from fastllm.quantize.packed import PackedWeight, pack, unpack

SIZES: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "bos_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "tie_word_embeddings": True},
    "mixtral": {
        "model_type": "mixtral", "num_hidden_layers": 1, "intermediate_size": 128,
        "experts": MoeConfig(
            num_experts=4, per_token=2, moe_intermediate_size=128, renormalize=True
        ),
    },
}  # fmt: skip
GENERATOR_SEED = 3


def make(folder: Path, kind: str = "llama", **fields: Any) -> Path:
    """A directory of a random model whose inputs have channels of very different sizes."""
    model = initialize(ModelConfig(**SIZES | KINDS[kind] | fields), dtype=torch.float32)
    g = torch.Generator().manual_seed(GENERATOR_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = 0.7 * torch.randn(parameter.shape, generator=g)
                parameter.mul_(noise.exp() if name.endswith("norm.weight") else 1).add_(
                    0.1 * noise if name.endswith("bias") else 0
                )
    save_pretrained(model, folder)
    return folder


def rows(count: int = 24, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def made(source: Path, out: Path, format: str, method: str, **options: Any) -> Report:
    calibration = options.pop("calibration", rows())
    settings = {k: options.pop(k) for k in ("min_expert_tokens",) if k in options}
    return quantize_files(
        open_weights(source), out, Settings(format=format, method=method, **settings), None,
        calibration=calibration, **options,
    )  # fmt: skip


@torch.no_grad()
def logits(path: Path) -> Tensor:
    model = load_model(path, dtype="float32", activation="fp32")
    documents = Documents.pack(list(rows(8, seed=9)))
    return model.logits(model.train_hidden(documents))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_methods_change_a_model_less_than_rounding_to_nearest(
    kind: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "model", kind)
    exact = logits(source)
    distance = {}
    for method in ("rtn", "imatrix", "awq", "gptq"):
        out = tmp_path / f"{method}.gguf"
        made(source, out, "q4_0", method, min_expert_tokens=16)
        distance[method] = float((logits(out) - exact).square().mean())
    assert distance["gptq"] < 0.7 * distance["rtn"], distance
    assert distance["awq"] < distance["rtn"] and distance["imatrix"] < distance["rtn"], distance


@pytest.mark.parametrize(
    ("format", "quant_method"),
    [("int4_asym_g64", "compressed-tensors"), ("int8", "compressed-tensors"),
     ("fp8", "compressed-tensors"), ("nf4", "bitsandbytes"), ("nf4_dq", "fastllm")],
)  # fmt: skip
def test_directories_say_how_they_are_quantized_and_are_read_back(
    format: str, quant_method: str, llama: Path, tmp_path: Path
) -> None:
    made(llama, tmp_path / "out", format, "rtn")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == quant_method
    exact, found = logits(llama), logits(tmp_path / "out")
    assert 0 < float((found - exact).square().mean()) < 0.2 * float(exact.square().mean())
    packed = load_model(tmp_path / "out").get_submodule("model.layers.0.mlp.down_proj").packed
    assert isinstance(packed, PackedWeight) and packed.format == format


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_gguf_files_of_mixes_are_read_back(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "model", kind, hidden_size=256)
    report = made(source, tmp_path / "m.gguf", "q4_k_m", "gptq", min_expert_tokens=200)
    exact, found = logits(source), logits(tmp_path / "m.gguf")
    assert float((found - exact).square().mean()) < 0.05 * float(exact.square().mean())
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert set(report.plan.formats.values()) >= {"q4_k", "q6_k"}
    assert not list(tmp_path.glob(".*"))


def test_what_awq_scales_leaves_the_model_s_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With formats that lose nothing the layer computes as before, biases and shared heads too."""
    source = open_weights(make(tmp_path / "model", "qwen2"))
    found: list[Tensor] = []

    def search(weights: list[Tensor], *_: Any, **options: Any) -> Tensor:
        repeats, size = options["shared"] or (1, weights[0].shape[1])
        g = torch.Generator().manual_seed(len(found))
        scales = torch.rand(weights[0].shape[1] // (repeats * size), 1, size, generator=g) + 0.5
        found.append(scales.expand(-1, repeats, -1).flatten())
        return found[-1]

    monkeypatch.setattr(methods.awq, "search_scales", search)
    monkeypatch.setattr(methods, "in_pieces", lambda w, *_: pack("f32", w.contiguous(), *w.shape))
    monkeypatch.setattr(methods, "clipped", lambda w, *_: w)
    settings = Settings(format="int4", method="awq")
    block = Block(source, 0, torch.float32, 32)
    block.fill()
    states = torch.randn(3, 32, 128, generator=torch.Generator().manual_seed(1))
    before = states.clone()
    block.forward_(before)
    method = Awq(block, plan_of(source.config, settings), settings)
    method.run(states)
    after = states.clone()
    block.forward_(after)
    assert len(found) == 4  # q, k, v; o; gate, up; down
    assert set(method.result.dense) == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias",
    }  # fmt: skip
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    scaled = unpack(method.result.packs["self_attn.v_proj"])
    assert not torch.allclose(scaled, block.matrix("self_attn.v_proj"))


def test_experts_that_few_tokens_come_to_are_rounded_to_nearest_and_named(tmp_path: Path) -> None:
    source = make(tmp_path / "model", "mixtral")
    said: list[str] = []

    class Listener(Progress):
        def note(self, text: str) -> None:
            said.append(text)

    made(source, tmp_path / "few", "int4", "gptq", min_expert_tokens=10**6, progress=Listener())
    assert said == [
        "layer 0: 4 of 4 experts get fewer than 1000000 calibration tokens and are rounded to "
        "nearest"
    ]
    made(source, tmp_path / "plain", "int4", "rtn")
    few, plain = (
        load_model(tmp_path / name).get_submodule("model.layers.0.mlp.experts")
        for name in ("few", "plain")
    )
    assert isinstance(few, Experts) and isinstance(plain, Experts)
    assert few.packed_down is not None and plain.packed_down is not None
    assert torch.equal(few.packed_down.data, plain.packed_down.data)


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import test_quantizing as t
from fastllm.models.quantizing import work
from fastllm.models.quantizing.run import Progress

class Killer(Progress):
    def layer(self, index, errors, resumed):
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL)

t.made(t.Path({source!r}), t.Path({out!r}), "int4", "gptq", progress=Killer())
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = KILLED.format(folder=str(Path(__file__).parent), source=str(llama), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    resumed: list[bool] = []

    class Listener(Progress):
        def layer(self, index: int, errors: Any, found: bool) -> None:
            resumed.append(found)

    made(llama, out, "int4", "gptq", progress=Listener())
    assert resumed == [True, False]
    made(llama, tmp_path / "whole", "int4", "gptq")
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_unfinished_work_of_other_settings_is_begun_anew(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, after=2)
    with pytest.raises(OSError, match="No space left"):
        made(llama, tmp_path / "out", "int4", "rtn")
    monkeypatch.undo()
    said: list[str] = []
    resumed: list[bool] = []

    class Listener(Progress):
        def note(self, text: str) -> None:
            said.append(text)

        def layer(self, index: int, errors: Any, found: bool) -> None:
            resumed.append(found)

    made(llama, tmp_path / "out", "int8", "rtn", progress=Listener())
    assert resumed == [False, False] and "begun anew" in said[0]


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.resumed: list[bool] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def layer(self, index: int, errors: Any, found: bool) -> None:
        self.resumed.append(found)


def unfinished(source: Path, out: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a run whose parts are all there, and the output is not."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("fastllm.models.quantizing.run.write_directory", full)
        made(source, out, "int4", method)
    return out.with_name(f".{out.name}.quantizing")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("part", ["top", "layer-0000", "layer-0001", "states"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_part_is_named_and_made_again(
    left: int, part: str, method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, heard = tmp_path / "out", Heard()
    file = unfinished(llama, out, method, monkeypatch) / f"{part}.safetensors"
    if part == "states" and method == "rtn":
        file.touch()
    os.truncate(file, left)
    made(llama, out, "int4", method, progress=heard)
    assert heard.said == [f"{file} is damaged: what it held is made again"]
    made(llama, tmp_path / "whole", "int4", method)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_layer_that_is_gone_is_not_made_from_later_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source", num_hidden_layers=4)
    out, heard = tmp_path / "out", Heard()
    folder = unfinished(source, out, "gptq", monkeypatch)
    (folder / "layer-0001.safetensors").unlink()
    made(source, out, "int4", "gptq", progress=heard)
    assert heard.resumed == [False, False, False, True]
    made(source, tmp_path / "whole", "int4", "gptq")
    file = "model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("identity", [b"\xff\xfe", b"", None])
def test_a_work_folder_of_unknown_work_is_named_and_begun_anew(
    identity: bytes | None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, heard = tmp_path / "out", Heard()
    folder = unfinished(llama, out, "rtn", monkeypatch)
    if identity is None:
        (folder / "identity.json").unlink()
    else:
        (folder / "identity.json").write_bytes(identity)
    made(llama, out, "int4", "rtn", progress=heard)
    assert heard.said == [f"{folder} is not of this model and these settings: begun anew"]
    assert heard.resumed == [False, False] and not folder.exists()


def test_importances_of_equal_sums_are_other_importances(llama: Path, tmp_path: Path) -> None:
    name, one = "model.layers.0.mlp.up_proj.weight", torch.ones(128)
    other = one.clone()
    other[0], other[1] = 0.5, 1.5
    said = []
    for given in (one, other):
        heard = Heard()
        settings, source = Settings(format="int4", method="imatrix"), open_weights(llama)
        run = _Run(source, tmp_path / "out", settings, None, {name: given}, heard)
        said.append(run.work.set_aside)
    assert said == [False, True]


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """After so many finished parts the disk is full."""
    save, calls = work.save_file, []

    def limited(tensors: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"cut")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(work, "save_file", limited)


@pytest.mark.parametrize("format", ["q8_0", "int8"])
def test_a_full_disk_leaves_the_old_output_and_work_to_go_on_with(
    format: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made(llama, out, format, "rtn")
    files = [out] if out.is_file() else sorted(out.iterdir())
    before = [file.read_bytes() for file in files]
    full_disk(monkeypatch, after=2)
    with pytest.raises(OSError, match="No space left"):
        made(llama, out, format, "imatrix", overwrite=True)
    assert [file.read_bytes() for file in files] == before
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    made(llama, out, format, "imatrix", overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_importance_matrices_go_to_llama_cpp_s_files_and_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = make(tmp_path / "model", "mixtral")
    report = made(source, tmp_path / "a", "int4", "imatrix", min_expert_tokens=1)
    assert len(report.sums) == 6
    path = tmp_path / "imatrix.gguf"
    save_imatrix(path, report.sums, ["text.txt"], 24, 32)
    config = open_weights(source).config
    found = read_imatrix(path, config)
    assert found.keys() == report.sums.keys()
    for name, (squares, counts) in report.sums.items():
        mean = squares / counts.view(-1, *[1] * (squares.dim() - 1))
        torch.testing.assert_close(found[name], mean.view_as(found[name]))
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_down_exps.weight.in_sum2"].shape.tolist() == [128, 4]
    assert tensors["blk.0.ffn_gate_exps.weight.counts"].data.sum() == 24 * 32 * 2
    made(source, tmp_path / "b", "int4", "imatrix", calibration=None, importance=found)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_importance_matrices_of_other_models_are_refused(llama: Path, tmp_path: Path) -> None:
    sums = {"model.layers.0.mlp.down_proj.weight": (torch.ones(64), torch.ones(1))}
    save_imatrix(tmp_path / "m.gguf", sums, [], 1, 1)
    with pytest.raises(ValueError, match="has 64 values, the model's matrix 256"):
        read_imatrix(tmp_path / "m.gguf", open_weights(llama).config)


@pytest.mark.full
def test_memory_stays_below_two_layers_and_the_calibration(tmp_path: Path) -> None:
    """Measured in a process of its own: nothing that tests leave behind is counted or reused."""
    source = make(
        tmp_path / "model", num_hidden_layers=2, hidden_size=512, intermediate_size=1536,
        num_attention_heads=8, head_dim=64, num_key_value_heads=8,
    )  # fmt: skip
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_quantizing as t
from fastllm.testing.memory import peak_extra_bytes
t.torch.set_num_threads(1)
small = t.make(t.Path({str(tmp_path)!r}) / "small")
t.made(small, t.Path({str(tmp_path)!r}) / "warm", "int4", "gptq")
source = t.Path({str(source)!r})
print(peak_extra_bytes(lambda: t.made(source, source.with_name("out"), "int4", "gptq",
                                      calibration=t.rows(32, 64))))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 1536)
    states = 4 * 32 * 64 * 512
    mapped = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert int(run.stdout) < 2 * layer + states + mapped, (
        f"{int(run.stdout) / layer:.2f} layers, {mapped / layer:.2f} of them may be mapped"
    )


def test_calibration_rows_are_spread_over_the_text(tokenizer: Tokenizer) -> None:
    texts = [f"The cat number {i} sat on the mat." for i in range(200)]
    found = calibration_rows(texts, tokenizer, 5, 16)
    ids = [i for text in texts for i in tokenizer.encode(text, parse_special=False)]
    assert found.shape == (5, 16)
    assert found[0].tolist() == ids[:16]
    assert found[-1].tolist() == ids[len(ids) // 16 * 16 - 16 : len(ids) // 16 * 16]
    assert calibration_rows(["The cat sat."], tokenizer, 5, 16).shape[0] == 1
    with pytest.raises(ValueError, match="the calibration text is empty"):
        calibration_rows(["", " \n"], tokenizer, 5, 16)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"calibration": None}, ValueError, "gptq needs calibration text"),
        ({"calibration": torch.zeros(0, 8)}, ValueError, "at least one row of two"),
    ],
)
def test_missing_calibration_is_an_error(
    options: dict[str, Any], error: type[Exception], words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        made(llama, tmp_path / "out", "int4", "gptq", **options)
    assert not list(tmp_path.iterdir())


def test_output_that_exists_is_kept(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="overwrite"):
        made(llama, tmp_path / "out", "int4", "rtn")


@pytest.mark.parametrize("format", ["int8", "q8_0"])
@pytest.mark.parametrize("place", ["{}", "{}/../{name}", "{}/inside", "{}/..", "link"])
def test_the_model_that_is_read_is_never_written_over(
    place: str, format: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "models" / "source")
    (tmp_path / "link").symlink_to(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    out = tmp_path / place.format(source, name=source.name)
    with pytest.raises(ValueError, match="is not written: the model that is read lies there"):
        made(source, out, format, "rtn", overwrite=True)
    if format == "int8":
        with pytest.raises(ValueError, match="is not written: the model that is read lies there"):
            export_hf(weights_of(open_weights(source)), out, "bf16", None, overwrite=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_a_gguf_file_may_lie_beside_its_weights_and_is_not_written_over_itself(
    tmp_path: Path,
) -> None:
    source = make(tmp_path / "source")
    file = source / "m.gguf"
    for _ in range(2):
        made(source, file, "q8_0", "rtn", overwrite=True)
    before = file.read_bytes()
    for write in (
        lambda: made(file, file, "q4_0", "rtn", overwrite=True),
        lambda: export_gguf(weights_of(open_weights(file)), file, "f16", None, overwrite=True),
    ):
        with pytest.raises(ValueError, match="the model that is read lies there"):
            write()
    assert file.read_bytes() == before


def test_a_full_disk_is_told_with_the_name_of_the_gguf_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "fastllm.models.gguf_writer.os", SimpleNamespace(**vars(os) | {"fsync": full})
    )
    with pytest.raises(OSError, match=r"No space left on device: '.*/m\.gguf'"):
        export_gguf(weights_of(open_weights(llama)), tmp_path / "m.gguf", "f16", None)
    assert not list(tmp_path.iterdir())


def test_links_are_followed(llama: Path, tmp_path: Path) -> None:
    for name, format in (("folder", "int8"), ("file.gguf", "q8_0")):
        link = tmp_path / f"link-{name}"
        link.symlink_to(name)
        for _ in range(2):  # the first time it leads nowhere
            made(llama, link, format, "rtn", overwrite=True)
            assert link.is_symlink() and not (tmp_path / name).is_symlink()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "format", "error", "words"),
    [
        ("folder", "q8_0", FileExistsError, "is a directory and is not replaced by a file"),
        ("file", "int8", FileExistsError, "is a file and is not replaced by a directory"),
        ("notes", "int8", FileExistsError, r"no model's directory \(it has no config.json"),
        ("mixed", "int8", FileExistsError, "no model's file: checkpoints, notes.txt$"),
        ("new.gguf", "int8", ValueError, "int8 is written as a Hugging Face directory"),
    ],
)
def test_places_that_do_not_fit_are_refused_before_any_work(
    name: str, format: str, error: type[Exception], words: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("kept")
    (tmp_path / "mixed" / "checkpoints").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "notes.txt"):
        (tmp_path / "mixed" / file).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    settings = Settings(format=format, method="rtn")
    with pytest.raises(error, match=words):
        quantize_files(open_weights(llama), tmp_path / name, settings, None, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_matrices_that_an_importance_matrix_leaves_out_are_told(
    llama: Path, tmp_path: Path
) -> None:
    class Notes(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    source = open_weights(llama)
    name = "model.layers.0.mlp.down_proj.weight"
    known = {name: torch.ones(source.config.weight_shapes()[name][1])}
    settings = Settings(format="q8_0", method="imatrix")
    quantize_files(source, tmp_path / "m.gguf", settings, None, importance=known, progress=Notes())
    assert any("leaves out" in note and "of 14 matrices" in note for note in notes), notes


def test_broken_weights_are_named(tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    model = initialize(open_weights(source).config, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = float("nan")
    save_pretrained(model, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        made(tmp_path / "broken", tmp_path / "out", "int8", "rtn")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "broken"}


@pytest.mark.parametrize("method", ["rtn", "imatrix", "awq"])
def test_llama_cpp_gives_the_same_greedy_tokens_of_quantized_files(
    method: str, tokenizer: Tokenizer, llama_cpp: Any, tmp_path: Path
) -> None:
    helpers = sys.modules["exported_models"]
    config = helpers.small_config("llama", tokenizer.vocab_size)
    folder = helpers.save_model(tmp_path / "model", config, tokenizer)
    ids = rows(8, 32) + 3
    file = tmp_path / "model.gguf"
    format = {"rtn": "q5_1", "imatrix": "q4_k_m", "awq": "q8_0"}[method]
    quantize_files(
        open_weights(folder), file, Settings(format=format, method=method), tokenizer,
        calibration=ids,
    )  # fmt: skip
    prompt, answer = helpers.decided_answer(file, 16)
    assert helpers.greedy_llama_cpp(llama_cpp, file, prompt, 16) == answer

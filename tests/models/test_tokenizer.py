"""Tokenizer: Hugging Face directories and GGUF metadata give the model's own ids and text."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from fastllm.errors import ModelFileError
from fastllm.models.gguf import GGUFFile
from fastllm.models.literal_tokens import LiteralTokens
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_gguf import PRE_TOKENIZERS

TEXT = [
    "The quick brown fox doesn't jump over the lazy dog; it's 1234 o'clock.",
    "def f(x):\n    return {'a': [x ** 2, 3.14]}  # comment\n\n\n",
    "中文字符。你好世界 日本語 한국어 العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ½ Ⅷ \u00a0\u2003 \x00\x1b[0m",
]


def trained(pattern: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 tokens over TEXT."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    return backend


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of the trained tokenizer; a change to None removes the field."""
    state = json.loads(trained().to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token in ("<|end|>", "<|start|>") else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in state["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    fields.update(changes)
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}


def varied_strings(count: int) -> list[str]:
    rng = random.Random(0)
    letters = "ab cDE12'\n\t .,!?中文😀é\u200d\u00a0ñЖ<|>_-=+#$%^&*()[]{}\r\x07"
    words = ["I'm", "THEY'RE", "  x", "\n\n", "中文", "👩‍👧", "<|im_end|>", "x+=1;", "1234", "\t"]
    strings = [*TEXT, "", " " * 50, "\n" * 20, "a" * 300, "<|im_start|>user\nhi<|im_end|>\n"]
    while len(strings) < count:
        strings.append("".join(rng.choice(letters) for _ in range(rng.randrange(1, 60))))
        strings.append("".join(rng.choice(words) for _ in range(rng.randrange(1, 12))))
        points = (rng.choice([(1, 0x250), (0x250, 0xD800), (0xE000, 0x1F900)]) for _ in range(20))
        strings.append("".join(chr(rng.randrange(*span)) for span in points))
    return strings


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.from_gguf(gguf_metadata())


@pytest.fixture(scope="module")
def real(real_model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile.open(real_model).metadata, file=real_model)


def test_real_gguf_encodes_as_transformers_does(real: Tokenizer, real_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, name = real_model.parent, real_model.name
    peer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    strings = varied_strings(600)
    plain = [s for s in strings if not any(unicodedata.category(c)[0] == "N" for c in s)]
    assert len(plain) > 100
    for text in plain:
        assert real.encode(text, add_special_tokens=False) == peer.encode(
            text, add_special_tokens=False
        )
    # transformers ignores tokenizer.ggml.pre. SmolLM splits digits before the byte-level step; with
    # that added, both agree on everything.
    backend = peer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for text in strings:
        ids = real.encode(text, add_special_tokens=False)
        assert ids == peer.encode(text, add_special_tokens=False)
        assert real.decode(ids, skip_special_tokens=False) == peer.decode(ids)


def test_real_gguf_fields(real: Tokenizer) -> None:
    assert (real.vocab_size, real.bos_token_id, real.eos_token_ids) == (49152, 1, {2})
    assert real.special_tokens["eos_token"] == "<|im_end|>"
    assert real.chat_template is not None and "SmolLM" in real.chat_template
    assert real.encode("Hello world 42") == [19556, 905, 216, 36, 34]


def test_saved_directory_gives_equal_encodings(small: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    again = Tokenizer.from_hf(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id) == (small.bos_token_id, small.eos_token_id)
    for text in varied_strings(100):
        ids = small.encode(text)
        assert again.encode(text) == ids == peer.encode(text)
        assert again.decode(ids) == small.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert again.special_tokens == small.special_tokens
    assert again.eos_token_ids == small.eos_token_ids


def test_directory_saved_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(), bos_token="<|start|>", eos_token="<|end|>"
    )
    peer.chat_template = "{{ messages }}"
    peer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    ours = Tokenizer.from_hf(tmp_path)
    assert ours.chat_template == "{{ messages }}"
    assert (ours.bos_token_id, ours.eos_token_id, ours.eos_token_ids) == (1, 0, {0, 7})
    for text in varied_strings(60):
        assert ours.encode(text) == peer.encode(text)


@pytest.mark.parametrize("parse", [True, False])
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
@example("<|end|>")
@settings(max_examples=100, deadline=None)
def test_round_trip(small: Tokenizer, parse: bool, text: str) -> None:
    ids = small.encode(text, parse_special=parse)
    assert small.decode(ids, skip_special_tokens=False) == text
    assert small.encode_batch([text, text], parse_special=parse) == [ids, ids]


def test_special_tokens_in_text(small: Tokenizer) -> None:
    parsed = small.encode("a<|end|>b")
    literal = small.encode("a<|end|>b", parse_special=False)
    assert 0 in parsed and small.is_special(0)
    assert not any(small.is_special(i) for i in literal)
    assert small.decode(parsed) == "ab"
    assert small.decode(parsed, skip_special_tokens=False) == "a<|end|>b" == small.decode(literal)


@given(
    pieces=st.lists(
        st.one_of(st.sampled_from(["<|end|>", "<|start|>", " ", "\n", "\U000f0000"]), st.text(
            st.characters(exclude_categories=("Cs",)), max_size=4)),
        max_size=6,
    ),
    answer=st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted),
)  # fmt: skip
@example(pieces=["<|start|>", "a", " <|end|>", "b", "<|end|>"], answer=(1, 4))
@settings(max_examples=150, deadline=None)
def test_special_tokens_that_an_answer_spells_are_characters_and_others_tokens(
    small: Tokenizer, pieces: list[str], answer: tuple[int, int]
) -> None:
    before, said, after = (
        "".join(pieces[a:b]) for a, b in ((0, answer[0]), answer, (answer[1], 9))
    )
    text, span = before + said + after, (len(before), len(before + said))
    ((ids, places),) = small.encode_with_offsets([text], [[span]])
    assert small.decode(ids, skip_special_tokens=False) == text
    meant = [place for i, place in zip(ids, places, strict=True) if small.is_special(i)]
    assert [text[a:b] for a, b in meant] == re.findall(r"<\|end\|>|<\|start\|>", before) + (
        re.findall(r"<\|end\|>|<\|start\|>", after)
    )
    assert all(b <= span[0] or a >= span[1] for a, b in meant)


@pytest.mark.parametrize("prefix", ["bytes", "first", "always"])
def test_standing_aside_changes_no_id_and_no_place(prefix: str) -> None:
    backend = trained()
    if prefix == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme=prefix), backend.pre_tokenizer]
        )
    backend.add_tokens([AddedToken("<tool>", rstrip=True, normalized=False)])
    backend.add_special_tokens([AddedToken("<pad>", lstrip=True, normalized=False)])
    tokenizer = Tokenizer(backend)
    for text in ("<|start|>fox\nthe <pad> dog<tool> x<|end|><|end|> lazy", "a<|end|>", "", *TEXT):
        found = LiteralTokens(backend).encode(text, [])
        assert [found] == tokenizer.encode_with_offsets([text])


def test_user_defined_tokens_are_whole_and_not_skipped() -> None:
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.tokens"].append("<tool>")
    metadata["tokenizer.ggml.token_type"].append(4)
    tokenizer = Tokenizer.from_gguf(metadata)
    token = tokenizer.token_to_id("<tool>")
    assert token == tokenizer.vocab_size - 1 and tokenizer.id_to_token(token) == "<tool>"
    for parse in (True, False):
        assert tokenizer.encode("<tool>", parse_special=parse) == [token]
    assert tokenizer.decode([token]) == "<tool>"


def test_bos_and_eos_are_added_when_the_file_says_so() -> None:
    plain = Tokenizer.from_gguf(gguf_metadata()).encode("fox")
    both = Tokenizer.from_gguf(gguf_metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("fox") == [1, *plain, 0]
    assert both.encode("fox", add_special_tokens=False) == plain
    assert both.encode_batch(["fox", ""]) == [[1, *plain, 0], [1, 0]]
    llama3 = Tokenizer.from_gguf(gguf_metadata(pre="llama-bpe"))
    assert llama3.encode("fox")[0] == 1


def test_space_prefix_is_added_when_the_file_says_so() -> None:
    prefixed = Tokenizer.from_gguf(gguf_metadata(add_space_prefix=True))
    assert prefixed.decode(prefixed.encode("fox")) == " fox"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'm 123  x", ["I", "'m", " 123", " ", " x"]),
        ("smollm", "I'm 123  x", ["I", "'m", " ", "1", "2", "3", " ", " x"]),
        ("qwen2", "I'M 1234\n\nx.y", ["I", "'M", " ", "1", "2", "3", "4", "\n\n", "x", ".y"]),
        ("qwen2", "e\u0301", ["é"]),
        ("llama-bpe", "I'M 1234!\n x", ["I", "'M", " ", "123", "4", "!\n", " x"]),
        ("tekken", "fooBar 12/\nX", ["foo", "Bar", " ", "1", "2", "/\n", "X"]),
    ],
)
def test_pre_tokenizers_split_as_the_models_do(pre: str, text: str, pieces: list[str]) -> None:
    backend = Tokenizer.from_gguf(gguf_metadata(pre=pre))._backend
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    spelled = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [decoders.ByteLevel().decode([piece]) for piece in spelled] == pieces


def test_every_known_pre_tokenizer_loads() -> None:
    for pre in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_gguf(gguf_metadata(pre=None), pre=pre)
        ids = tokenizer.encode("Fox's 42\n", add_special_tokens=False)
        assert tokenizer.decode(ids) == "Fox's 42\n"


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"model": "llama"}, "model", "byte-level BPE"),
        ({"model": None}, "model", "missing"),
        ({"pre": "martian"}, "pre", "martian"),
        ({"pre": None}, "pre", "pass pre="),
        ({"tokens": None}, "tokens", "missing"),
        ({"tokens": [1, 2]}, "tokens", "int"),
        ({"tokens": ["a", "a"]}, "tokens", "twice"),
        ({"token_type": [1]}, "token_type", "1 elements"),
        ({"merges": ["zz qq"]}, "merges", "'zz qq'"),
        ({"merges": [5]}, "merges", "5"),
        ({"merges": "a b"}, "merges", "not an array"),
        ({"bos_token_id": 10**6}, "bos_token_id", "outside"),
        ({"eot_token_id": -1}, "eot_token_id", "outside"),
        ({"eos_token_id": "0"}, "eos_token_id", "str"),
        ({"add_bos_token": 1}, "add_bos_token", "int"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token", "missing"),
    ],
)
def test_bad_gguf_metadata_names_the_field(changes: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        Tokenizer.from_gguf(gguf_metadata(**changes), file="m.gguf")
    assert (caught.value.file, caught.value.field) == ("m.gguf", f"tokenizer.ggml.{field}")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "not a tokenizer"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "not in the vocabulary"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("generation_config.json", '{"eos_token_id": ["x"]}', "eos_token_id"),
        ("special_tokens_map.json", "nul", "not valid JSON"),
    ],
)
def test_bad_directory_names_the_file(
    small: Tokenizer, tmp_path: Path, name: str, text: str, words: str
) -> None:
    small.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelFileError, match=words) as caught:
        Tokenizer.from_hf(tmp_path)
    assert Path(caught.value.file).name in (name, "tokenizer.json")


def test_missing_directory_and_unknown_decoder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        Tokenizer.from_hf(tmp_path)
    backend = trained()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFileError, match="decoder: WordPiece"):
        Tokenizer.from_hf(tmp_path)


def test_invalid_text_is_refused_with_its_place(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"surrogate.*index 2"):
        small.encode("ab\ud800")
    with pytest.raises(ValueError, match=r"texts\[1\].*surrogate"):
        small.encode_batch(["a", "\udfff"])
    with pytest.raises(ValueError, match="0xff at offset 1"):
        small.encode(b"a\xff")
    assert small.encode("é中".encode()) == small.encode("é中")
    with pytest.raises(TypeError, match="NoneType"):
        small.encode(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence of strings"):
        small.encode_batch("abc")


def test_ids_without_a_token_decode_to_nothing(small: Tokenizer) -> None:
    ids = small.encode("fox")
    assert small.decode([*ids, small.vocab_size, 1 << 40]) == "fox"
    assert small.id_to_token(small.vocab_size) is None and small.id_to_token(1 << 40) is None
    with pytest.raises(ValueError, match="negative"):
        small.decode([-1])


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = trained()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_hf(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]


def test_post_processor_of_the_file_is_kept(tmp_path: Path) -> None:
    backend = trained()
    backend.add_tokens([AddedToken("<x>", special=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_hf(tmp_path)
    assert tokenizer.encode("fox")[0] == 1
    assert tokenizer.encode("fox<x>", parse_special=False)[-1] == tokenizer.token_to_id("<x>")

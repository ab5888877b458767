"""Small models that are exported, their tokenizer, and llama.cpp's answers on the files.

conftest.py loads this file under its own name: test folders are not packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from fastllm import LLM, SamplingParams
from fastllm.models.config import ModelConfig
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_gguf import PRE_TOKENIZERS
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights

TEXT = [
    "The cat sat on the mat, and the dog barked at 1234 cats.",
    "She sells sea shells by the sea shore; the shells she sells are sea shells I'm sure.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好 世界。",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def small_tokenizer(pre: str = "stablelm2") -> Tokenizer:
    """A byte-level BPE of TEXT that cuts as llama.cpp's pre-tokenizer of that name does."""
    backend = tokenizers.Tokenizer(models.BPE())
    recipe = PRE_TOKENIZERS[pre]
    if recipe.nfc:
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = recipe.build(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|end|>", "<|im_start|>", "<|im_end|>")]
    backend.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return Tokenizer(
        backend,
        special_tokens={"bos_token": "<|end|>", "eos_token": "<|im_end|>", "pad_token": "<|end|>"},
        chat_template=TEMPLATE,
    )


def small_config(model_type: str, vocab: int, **fields: Any) -> ModelConfig:
    """Two layers whose rows are whole blocks of every format."""
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab + 5,  # rows without a token
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        eos_token_ids=(2,),
        bos_token_id=0,
        attention_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        **fields,
    )


def spread(model: torch.nn.Module, seed: int) -> None:
    """Weights whose logits lie apart and whose vectors are not 1: no answer hangs on rounding."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.dim() == 1:
                parameter.add_((0.3 * noise).to(parameter.dtype))
            else:
                scale = 4.0 if "embed" in name or "lm_head" in name else 2.0
                parameter.copy_((noise * scale * parameter.shape[-1] ** -0.5).to(parameter.dtype))


def save_model(folder: Path, config: ModelConfig, tokenizer: Tokenizer, seed: int = 5) -> Path:
    """A Hugging Face directory of a random model."""
    model = initialize(config, dtype=torch.float32, seed=seed)
    spread(model, seed)
    save_pretrained(model, folder, tokenizer)
    return folder


def greedy_llama_cpp(llama_cpp: Any, path: Path, ids: list[int], count: int) -> list[int]:
    """llama.cpp's greedy answer, of count tokens, in one thread."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=False,
        verbose=False,
        seed=0,
    )
    try:
        answer: list[int] = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if len(answer) == count:
                break
        return answer
    finally:
        model.close()


def decided_answer(path: Path, count: int, **options: Any) -> tuple[list[int], list[int]]:
    """A prompt, of 64, and its greedy answer, of whose tokens none hangs on a rounding: the
    answer with the largest distance between best and second logit where that is smallest."""
    llm = LLM(path, activation="fp32", **options)
    g = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, llm.config.vocab_size, (64, 6), generator=g).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=2)
    best, found = 0.0, ([0], [0])
    for prompt, output in zip(drawn, llm.generate(drawn, params), strict=True):
        answer = output.outputs[0]
        top = [sorted((p.logprob for p in place.values()), reverse=True)
               for place in answer.logprobs]  # fmt: skip
        margin = min(first - second for first, second, *_ in top)
        if margin > best and len(set(answer.token_ids)) > 6:
            best, found = margin, (prompt, answer.token_ids)
    assert best > 0.25, f"answers hang on differences of {best}"
    return found


def same_greedy(llama_cpp: Any, folder: Path, file: Path, type: str, tokenizer: Tokenizer) -> None:
    """Exports the model of a folder: llama.cpp and fastllm answer alike on the file."""
    source = open_weights(folder)
    export_gguf(weights_of(source), file, type, Tokenizer.from_hf(folder))
    prompt, answer = decided_answer(file, 16)
    theirs = greedy_llama_cpp(llama_cpp, file, prompt, 16)
    assert theirs == answer, f"llama.cpp answers {theirs}, fastllm {answer}"
    if type in ("f32", "f16", "bf16"):  # and the file holds the model
        greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        own = LLM(folder).generate([prompt], greedy)[0].outputs[0].token_ids
        assert own == answer, f"the folder answers {own}, the file {answer}"

"""Generation on the weights of a model in training: its log-probabilities are training's, always.

After optimizer steps, loads, copies and moved tensors; captured steps and eager ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllm import LLM, SamplingParams
from fastllm.models.decoder import Decoder
from fastllm.nn.batch import Documents
from fastllm.testing.small_models import batch_of, model_of, random_documents
from fastllm.train.optim import AdamW

PROMPTS = random_documents((5, 61, 1), seed=3)  # one crosses into the second page as it goes on
CASES = ["llama", "llama tied, biases", "mistral window", "qwen3 tied"]


def _llm(model: Decoder, **options: object) -> LLM:
    return LLM.from_model(model, max_model_len=128, max_num_seqs=4, **options)


def _generated(llm: LLM, seed: int) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probabilities of an answer to each prompt."""
    params = SamplingParams(
        temperature=1.0, max_tokens=9, seed=seed, logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = [out.outputs[0] for out in llm.generate(PROMPTS, params)]
    return [
        (o.token_ids, [e[t].logprob for t, e in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outputs
    ]


def _assert_parity(model: Decoder, llm: LLM, seed: int) -> list[tuple[list[int], list[float]]]:
    answers = _generated(llm, seed)
    whole = [prompt + ids for prompt, (ids, _) in zip(PROMPTS, answers, strict=True)]
    documents, targets = batch_of(whole)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logp, _ = model.log_probs(documents, targets)
        for ids, (new, got), own in zip(
            whole, answers, logp.split([len(ids) for ids in whole]), strict=True
        ):
            assert got == own[len(ids) - len(new) - 1 : -1].tolist(), f"gradients {grad}"
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_generation_has_trainings_log_probs_after_every_step(case: str, dtype: torch.dtype) -> None:
    model = model_of(case, dtype)
    llm = _llm(model)
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.02}])
    seen: list[object] = []
    for step in range(4):
        answers = _assert_parity(model, llm, seed=step // 2)
        assert answers not in seen
        seen.append(answers)
        model.loss(*batch_of(random_documents((40, 24), seed=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.weights_changed()
    assert len(llm._engine.runner._steps) <= 2  # weights changed in place: nothing captured anew


def _torch_step(model: Decoder) -> None:
    model.loss(*batch_of(random_documents((30,)))).backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad.to(parameter.dtype)
        parameter.grad_dtype = None
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def _loaded(model: Decoder) -> None:
    model.load_state_dict(model_of("llama tied, biases", model.dtype, seed=5).state_dict())


def _assigned(model: Decoder) -> None:
    state = model_of("llama tied, biases", model.dtype, seed=5).state_dict()
    model.load_state_dict(state, assign=True)
    model.lm_head.weight = model.model.embed_tokens.weight


def _copied(model: Decoder) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.1 * parameter)


def _one_bias(model: Decoder) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.add_(0.5)


def _one_norm(model: Decoder) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)


def _moved(model: Decoder) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def _unseen(model: Decoder) -> None:
    """As a native kernel writes: autograd's version counters do not see it."""
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 0.9
    model.weights_changed()


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
@pytest.mark.parametrize(
    "change", [_torch_step, _loaded, _assigned, _copied, _one_bias, _one_norm, _moved, _unseen]
)
def test_no_cache_is_stale_after(change: Callable[[Decoder], None], eager: bool) -> None:
    model = model_of("llama tied, biases", torch.float32)
    llm = _llm(model, enforce_eager=eager)
    before = _assert_parity(model, llm, seed=1)
    logits = llm.logits(PROMPTS[1])
    change(model)
    assert _assert_parity(model, llm, seed=1) != before
    changed = llm.logits(PROMPTS[1])
    assert not torch.equal(changed, logits)
    assert torch.equal(changed, _logits(model, PROMPTS[1]))


def test_weights_that_change_between_two_steps_of_a_stream_are_used_from_there() -> None:
    model = model_of("llama", torch.float32)
    llm = _llm(model)
    params = SamplingParams(
        temperature=0.0, max_tokens=6, logprobs=0, detokenize=False, ignore_eos=True
    )
    whole = llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids
    stream = llm.generate(PROMPTS[0], params, stream=True)
    next(stream)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))  # token i is now 95 - i
    model.weights_changed()
    *_, last = stream
    ids = last.outputs[0].token_ids
    assert ids[0] == whole[0] and ids[1] == 95 - whole[1]


def test_float32_masters_and_caches_are_no_parameters() -> None:
    model = model_of("llama", torch.bfloat16)
    names, count = list(model.state_dict()), sum(1 for _ in model.parameters())
    _llm(model)
    assert list(model.state_dict()) == names
    assert sum(1 for _ in model.parameters()) == count


def test_training_goes_on_after_generation() -> None:
    """Packed caches serve where no gradient is recorded, and only there."""
    model, batch = model_of("llama", torch.float32), batch_of(random_documents((30,)))
    model.loss(*batch).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    _generated(_llm(model), 0)
    model.zero_grad()
    model.loss(*batch).backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))


def test_lengths_and_missing_tokenizers_are_named() -> None:
    model = model_of("llama", torch.float32)
    with pytest.raises(ValueError, match="max_model_len must be from 2 to 256"):
        LLM.from_model(model, max_model_len=257)
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM.from_model(model, max_num_seqs=0)
    llm = _llm(model)
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate("text")
    assert llm.generate([1, 2], SamplingParams(max_tokens=2, detokenize=False))[0].outputs


def _logits(model: Decoder, ids: list[int]) -> Tensor:
    return model.logits(model.train_hidden(Documents.pack([ids]))).detach()

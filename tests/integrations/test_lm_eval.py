"""The lm-evaluation-harness: our model class beside its own, and its own on a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizer import tiny_tokenizer

import fastllm
from fastllm.engine.continuations import Continued, continuation_log_probs, continuation_scores

harness = pytest.importorskip("lm_eval.models.huggingface")
pytest.importorskip("sacrebleu")  # what its tasks need

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from fastllm.integrations.lm_eval import FastLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own, of packages it reads

LONG = "the quick brown fox, " * 30
PAIRS = [
    ("2 + 2 = ", "4"),
    ("2 + 2 = ", "5"),
    ("2 + 2 = ", "twenty two"),
    ("", "nothing before"),
    ("a trailing space ", " is moved"),
    (LONG, "jumps"),  # longer than the context
    ("what", LONG[:50]),
]
TEXTS = ["short", LONG, "a text of one window or so " * 5]
MAX_LENGTH = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = tiny("llama")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> FastLM:
    return FastLM(directory, max_length=MAX_LENGTH, dtype="float32")


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return harness.HFLM(
        str(directory), max_length=MAX_LENGTH, dtype="float32", device="cpu", batch_size=3
    )


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def log_likelihoods(lm: Any) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)


def rolling(lm: Any) -> list[float]:
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


def answers(lm: Any) -> list[str]:
    options: list[dict[str, Any]] = [
        {"max_gen_toks": 12, "until": ["\n\n"]},
        {"max_gen_toks": 20, "until": ["7", "u", "not there"], "do_sample": False},
        {"max_gen_toks": 7, "until": "no such stop", "temperature": 0.0},
    ]
    requests = [(prompt, given) for prompt in ("2 + 2 = ", LONG) for given in options]
    return lm.generate_until(instances("generate_until", requests), disable_tqdm=True)


def test_the_harness_knows_the_name() -> None:
    assert get_model("fastllm") is FastLM


def test_log_likelihoods_are_those_of_the_harness_on_transformers(
    ours: FastLM, theirs: Any
) -> None:
    found, wanted = log_likelihoods(ours), log_likelihoods(theirs)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    torch.testing.assert_close(
        torch.tensor([p for p, _ in found]), torch.tensor([p for p, _ in wanted]),
        rtol=1e-4, atol=1e-3,
    )  # fmt: skip


def test_what_greedy_decoding_gives_is_greedy(ours: FastLM) -> None:
    prompt = ours.tok_encode("2 + 2 = ")
    params = fastllm.SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    answer = ours.llm.generate([prompt], params)[0].outputs[0].token_ids
    other = [*answer[:4], (answer[4] + 1) % 100]
    groups = [Continued(prompt, [answer, other, answer[:2]])]
    scores = continuation_scores(ours.llm.model, groups)[0]
    assert [greedy for _, greedy in scores] == [True, False, True]
    plain = continuation_log_probs(ours.llm.model, groups)[0]
    assert all(torch.equal(a, b) for a, (b, _) in zip(plain, scores, strict=True))


def test_rolling_log_likelihoods_are_those_of_the_harness(ours: FastLM, theirs: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(rolling(ours)), torch.tensor(rolling(theirs)), rtol=1e-4, atol=1e-3
    )


def test_answers_are_those_of_the_harness(ours: FastLM, theirs: Any) -> None:
    found = answers(ours)
    assert found == answers(theirs)
    assert len(set(found)) > 2 and not any("7" in t for t in (found[1], found[4]))


def test_thinking_ends_with_a_text_or_a_token(
    ours: FastLM, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = instances("generate_until", [("2 + ", {"max_gen_toks": 16, "until": []})])
    whole = ours.generate_until(requests)[0]
    end = ours.tokenizer.encode(whole, add_special_tokens=False)[5]
    for given in (end, str(end), ours.tokenizer.decode([end])):
        lm = FastLM(ours.llm, max_length=MAX_LENGTH, think_end_token=given)
        monkeypatch.setattr(theirs, "think_end_token", lm.think_end_token)
        answer = lm.generate_until(requests)
        assert answer == theirs.generate_until(requests) and len(answer[0]) < len(whole)


def test_sampled_answers_repeat_with_their_seed(directory: Path, ours: FastLM) -> None:
    options = {"max_gen_toks": 16, "do_sample": True, "temperature": 1.0, "until": []}
    requests = instances("generate_until", [("2 + ", options)] * 2)
    first = ours.generate_until(requests)
    assert first == ours.generate_until(requests) and first[0] != first[1]
    other = FastLM(ours.llm, max_length=MAX_LENGTH, seed=5)
    assert other.generate_until(requests) != first


def test_a_whole_task_gives_the_results_of_the_harness_on_transformers(
    tmp_path: Path, ours: FastLM, theirs: Any
) -> None:
    found, wanted = (evaluated(lm, tmp_path) for lm in (ours, theirs))
    assert found.keys() == wanted.keys() and "acc,none" in found
    for name, value in wanted.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def evaluated(lm: Any, folder: Path) -> dict[str, Any]:
    """The results of a multiple-choice task made of a local file."""
    import json

    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "x"], "answer": 0}
        for a in range(4) for b in range(3)
    ]  # fmt: skip
    data = folder / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["sums"], task_manager=manager, bootstrap_iters=0
    )
    return results["results"]["sums"]


@pytest.fixture(scope="module")
def patched(directory: Path) -> Iterator[Any]:
    lm = harness.HFLM(
        str(directory), max_length=MAX_LENGTH, dtype="float32", device="cpu", batch_size=3
    )
    report = fastllm.patch(lm.model)
    assert report.replaced("attention") and report.replaced("norm")
    yield lm
    fastllm.unpatch(lm.model)


def test_the_harness_gives_a_patched_model_the_results_of_the_unpatched(
    patched: Any, theirs: Any
) -> None:
    assert answers(patched) == answers(theirs)
    for run in (lambda lm: [p for p, _ in log_likelihoods(lm)], rolling):
        torch.testing.assert_close(
            torch.tensor(run(patched)), torch.tensor(run(theirs)), rtol=1e-5, atol=1e-3
        )


def test_chat_prompts_are_the_templates(ours: FastLM) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "we "}]
    assert ours.apply_chat_template(messages[:1]) == "u:hi\na:"
    assert ours.apply_chat_template(messages, add_generation_prompt=False) == "u:hi\na:we"
    assert ours.chat_template(True) == tiny_tokenizer().chat_template
    assert ours.tokenizer_name.startswith("fastllm_")


def test_what_does_not_fit_is_said(directory: Path, ours: FastLM) -> None:
    with pytest.raises(ValueError, match="max_length must be from 2 to 64, got 65"):
        FastLM(ours.llm, max_length=65)
    with pytest.raises(ValueError, match="dtype is an argument of LLM"):
        FastLM(ours.llm, dtype="float32")
    with pytest.raises(ValueError, match="max_gen_toks 64 leaves no room"):
        ours.generate_until(instances("generate_until", [("a", {"max_gen_toks": 64})]))
    with pytest.raises(ValueError, match="generation option 'penalty_alpha'"):
        ours.generate_until(
            instances("generate_until", [("a", {"max_gen_toks": 4, "penalty_alpha": 1})])
        )
    with pytest.raises(ValueError, match="a continuation of 0 tokens"):
        ours._loglikelihood_tokens([(None, [5], [])])
    assert ours.generate_until([]) == [] and ours.loglikelihood_rolling([]) == []

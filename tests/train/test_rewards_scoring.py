"""What rewards give is checked; what goes wrong stops the run and names the answer."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastllm.errors import FastLLMError, ModelNotFoundError, RewardError
from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.testing.small_models import config_of
from fastllm.train.reward_model import RewardModel
from fastllm.train.rewards import NamedReward, check, resolve, score
from fastllm.train.rewards.process import FunctionProcess

FILE = """
import ctypes, os, sys, time
from beside import HALF

def lengths(prompts, completions, **columns):
    print("a line")
    return [HALF * len(completion) for completion in completions]

def names(prompts, completions, answer, scale=None):
    return [float(answer[i]) + (scale or [0, 0])[i] for i in range(len(prompts))]

def bad(prompts, completions, **columns):
    for completion in completions:
        if completion == "raise": raise KeyError("no such thing")
        if completion == "exit": sys.exit(3)
        if completion == "vanish": os._exit(4)
        if completion == "crash": ctypes.string_at(0)
        while completion == "loop":
            try: time.sleep(0.01)
            except BaseException: pass
        if completion == "lock": ctypes.PyDLL(None).sleep(60)
        if completion == "nan": return [float("nan")] * len(completions)
    return [1.0] * len(completions)

number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "beside.py").write_text("HALF = 0.5\n")
    (folder / "own.py").write_text(FILE)
    return folder / "own.py"


@pytest.fixture(scope="module")
def bad(file: Path) -> NamedReward:
    return resolve([f"{file}:bad"])[0]


def run(reward: Any, completions: list[str], timeout: float = 20.0, **columns: Any) -> list[float]:
    rewards = [reward] if isinstance(reward, NamedReward) else resolve([reward])
    prompts = [f"prompt {i}" for i in range(len(completions))]
    return [float(x) for x in score(rewards, None, prompts, completions, columns, timeout)[:, 0]]


def failure(reward: Any, completions: list[str], timeout: float = 20.0, **more: Any) -> RewardError:
    with pytest.raises(RewardError) as caught:
        run(reward, completions, timeout, **more)
    return caught.value


def giving(value: Any) -> Callable[..., Any]:
    def reward(prompts: list[str], completions: list[str]) -> Any:
        return value

    return reward


def test_scores_are_a_matrix_that_weights_multiply() -> None:
    def second(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert columns.pop("finish_reasons") == ["stop"] * len(prompts)
        return [
            float(len(p) + len(c) + len(columns)) for p, c in zip(prompts, completions, strict=True)
        ]

    rewards = resolve(["exact_match", second])
    assert [reward.name for reward in rewards] == ["exact_match", "second"]
    arguments = (["a", "b", "c"], ["1", "22", "3"], {"answer": [1, 2, 3]})
    plain = score(rewards, None, *arguments)
    assert plain.dtype == torch.float32 and plain.is_contiguous()
    assert plain.tolist() == [[1, 3], [0, 4], [1, 3]]
    assert score(rewards, [2.0, -0.5], *arguments).tolist() == [[2, -1.5], [0, -2], [2, -1.5]]
    assert score(rewards, None, [], [], {"answer": []}).shape == (0, 2)


def test_functions_get_words_and_reward_models_get_messages() -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.append(prompts)
        return [0.0] * len(prompts)

    prompts = ["a", [{"role": "user", "content": "b"}]]
    for messages in (False, True):
        score([NamedReward("r", reward, messages=messages)], None, prompts, ["x", "y"], {})
    assert seen == [["a", "b"], prompts]


@pytest.mark.parametrize(
    "result",
    [[1, 0], (1.0, 0.0), [True, False], np.array([1.0, 0.0]), torch.tensor([1.0, 0.0]),
     torch.tensor([[1.0], [0.0]]), iter([1, 0]), [np.float32(1), torch.tensor(0)]],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_lists_arrays_and_tensors_are_rewards(result: Any) -> None:
    assert run(giving(result), ["a", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "sample", "words"),
    [
        ([1.0, math.nan], 1, "returned nan: expected a finite number"),
        ([math.inf, 1.0], 0, "returned inf"),
        ([1.0, 1e39], 1, "returned 1e+39"),
        ([1.0, None], 1, "returned None: expected a number"),
        ([1.0, "0.5"], 1, "returned a str ('0.5'): expected a number"),
        ([1.0, torch.tensor([1.0, 2.0])], 1, "returned a Tensor"),
        ([1.0, 10**400], 1, "returned a int"),
        ([1.0, 1j], 1, "returned a complex"),
    ],
)
def test_what_is_no_number_is_named_with_its_answer(result: Any, sample: int, words: str) -> None:
    error = failure(giving(result), ["a", "b"])
    assert (error.reward, error.sample, error.prompt) == ("reward", sample, f"prompt {sample}")
    assert str(error).startswith(
        f"reward 'reward', completions[{sample}] (prompt 'prompt {sample}'): {words}"
    )


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0] * 3, "returned 3 rewards for 2 completions"),
        (None, "returned None: expected a list of 2 numbers"),
        (1.0, "returned a float"),
        ("12", "returned a str"),
        ({0: 1.0, 1: 2.0}, "returned a dict"),
    ],
)
def test_the_wrong_number_of_rewards_is_an_error(result: Any, words: str) -> None:
    error = failure(giving(result), ["a", "b"])
    assert str(error).startswith(f"reward 'reward': {words}") and error.sample is None


def test_an_error_of_all_answers_is_traced_to_one() -> None:
    def some(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.0 / (len(c) - 2) for c in completions]

    error = failure(some, ["a", "abc", "ab", "abcd"], x=[1, 2, 3, 4])
    assert error.sample == 2 and "raised ZeroDivisionError" in error.problem

    def together(prompts: list[str], completions: list[str]) -> list[float]:
        if len(prompts) > 1:
            raise SystemExit("only one at a time")
        return [1.0]

    error = failure(together, ["a", "b"])
    assert error.sample is None
    assert "with 2 answers together, with none of them alone" in str(error)


def test_an_endless_function_is_left_behind() -> None:
    end = threading.Event()

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        if "slow" in completions:
            end.wait(60)
        return [0.0] * len(completions)

    start = time.monotonic()
    error = failure(slow, ["a", "slow", "b"], timeout=0.3)
    assert time.monotonic() - start < 5
    end.set()
    assert error.sample == 1 and error.problem == "took longer than 0.3 s"
    assert run(slow, ["a", "b"], timeout=5.0) == [0.0, 0.0]


def test_scores_may_be_asked_for_from_another_thread() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run("accuracy", ["72"], answer=["72"])))
    thread.start()
    thread.join()
    assert found == [[1.0]]


def test_a_function_of_a_file_runs_in_its_own_process(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lengths, names = resolve([f"{file}:lengths", f"{file}:names"])
    assert (lengths.name, names.name) == ("lengths", "names")
    assert run(lengths, ["abc", ""], other=[1, 2]) == [1.5, 0.0]
    assert run(names, ["a", "b"], answer=["1", "2"], other=[0, 0]) == [1.0, 2.0]
    assert run(names, ["a", "b"], answer=["1", "2"], scale=[3, 4]) == [4.0, 6.0]
    out, err = capfd.readouterr()
    assert "a line" in err and "a line" not in out
    assert "own" not in sys.modules and "beside" not in sys.modules


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("raise", "raised KeyError: 'no such thing' (own.py, line 14)"),
        ("exit", "raised SystemExit: 3 (own.py, line 15)"),
        ("vanish", "its process ended with exit status 4"),
        ("crash", "its process ended with signal 11"),
        ("nan", "returned nan: expected a finite number"),
    ],
)
def test_a_function_of_a_file_that_fails_is_named(
    bad: NamedReward, completion: str, words: str
) -> None:
    error = failure(bad, [completion, "b"])
    assert (error.sample, error.prompt) == (0, "prompt 0")
    assert words in str(error)
    assert run(bad, ["a", "b"]) == [1.0, 1.0]  # another process takes its place


@pytest.mark.parametrize("completion", ["loop", "lock"])
def test_a_process_that_never_answers_is_killed(bad: NamedReward, completion: str) -> None:
    function = bad.function
    assert isinstance(function, FunctionProcess)
    assert run(bad, ["a"]) == [1.0]
    stuck = function._process
    start = time.monotonic()
    error = failure(bad, [completion], timeout=0.4)
    assert time.monotonic() - start < 5
    assert error.sample == 0 and "took longer than 0.4 s" in str(error)
    assert stuck.returncode == -signal.SIGKILL


def test_the_answer_that_a_process_hangs_on_is_found(bad: NamedReward) -> None:
    error = failure(bad, ["a", "b", "loop"], timeout=1.0)
    assert (error.sample, error.prompt) == (2, "prompt 2")


def test_large_batches_pass_through(file: Path) -> None:
    text = "a" * 1_000_000
    assert run(f"{file}:lengths", [text] * 8) == [500_000.0] * 8


def test_a_process_ends_with_the_one_that_called_it(file: Path) -> None:
    code = (
        "import os, sys, threading; from fastllm.train.rewards.process import FunctionProcess; "
        f"f = FunctionProcess({str(file) + ':lengths'!r}); print(f._process.pid, flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(found.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # a zombie
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_forked_twin_starts_a_process_of_its_own(file: Path) -> None:
    function = FunctionProcess(f"{file}:lengths")
    pid = function._process.pid
    child = os.fork()
    if not child:
        found = function.call((["p"], ["ab"]), {}, 20.0, 1)
        os._exit(0 if found == [1.0] and function._process.pid != pid else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert function.call((["p"], ["abcd"]), {}, 20.0, 1) == [2.0]
    assert function._process.pid == pid
    function.close()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("acuracy", ValueError, "did you mean accuracy"),
        ("best", ValueError, "there are accuracy, exact_match"),
        ("length:0", ValueError, "whole number above 0"),
        ("length:x", ValueError, "whole number above 0"),
        ("accuracy:3", ValueError, "takes no number"),
        ("model:", ValueError, "names no directory"),
        ("{}", ValueError, "names no function"),
        ("{}:a-b", ValueError, "name of a function"),
        ("{}:absent", ValueError, "cannot be loaded: AttributeError"),
        ("{}:number", ValueError, "is a int, not a function"),
        ("nowhere.py:f", FileNotFoundError, "no such file"),
        (3, TypeError, "a reward is a name or a function"),
    ],
)
def test_a_reward_that_there_is_not_is_named(
    file: Path, name: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        resolve([name.format(file) if isinstance(name, str) else name])


def test_a_file_that_fails_is_named_before_anything_runs(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nraise RuntimeError('not today')\n")
    with pytest.raises(ValueError, match=r"not today \(broken.py, line 2\)"):
        resolve([f"{broken}:f"])
    broken.write_text("def f(x):\n    return 0\n")
    with pytest.raises(ValueError, match=r"called as reward\(prompts, completions"):
        resolve([f"{broken}:f"])


def test_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'length' is given twice"):
        resolve(["length", "length"])
    assert len(resolve(["length", "length:5"])) == 2
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for file in files:
        file.write_text("def polite(prompts, completions):\n    return [0.0] * len(prompts)\n")
    given = [f"{file}:polite" for file in files]
    assert [reward.name for reward in resolve(given)] == ["polite", given[1]]
    for twice in (given[:1] * 2, [*given, given[1]], [*given, given[0]]):
        with pytest.raises(ValueError, match="is given twice"):
            resolve(twice)
    with pytest.raises(TypeError, match="sequence of names"):
        resolve("accuracy")


def test_functions_get_why_a_completion_ended() -> None:
    def reward(
        prompts: list[str], completions: list[str], finish_reasons: list[str]
    ) -> list[float]:
        return [float(reason == "length") for reason in finish_reasons]

    rewards = resolve([reward])
    check(rewards, {})
    found = score(rewards, None, ["p"] * 2, ["a", "b"], {}, truncated=[False, True])
    assert found.tolist() == [[0], [1]]
    assert score(rewards, None, ["p"], ["a"], {}).tolist() == [[0]]
    for name in ("finish_reasons", "completions"):
        with pytest.raises(ValueError, match=f"a column '{name}'"):
            check(rewards, {name: ["stop"]})
    with pytest.raises(ValueError, match="truncated has 1 values for 2"):
        score(rewards, None, ["p"] * 2, ["a", "b"], {}, truncated=[True])


def test_missing_columns_are_found_before_a_run() -> None:
    rewards = resolve(["length", "exact_match"])
    with pytest.raises(RewardError, match="needs the column 'answer'; the data has solution, x"):
        check(rewards, {"solution": ["a"], "x": ["b"]})
    for empty in (None, "", " ", True, [1]):
        with pytest.raises(RewardError, match=r"prompt 2 of 2: .*'answer' holds"):
            check(rewards, {"answer": ["1", empty]})
    check(rewards, {"answer": ["1", 2]})
    assert "needs the column 'answer'; the data has none" in str(failure("exact_match", ["a"]))
    error = failure("exact_match", ["a", "b"], answer=["1", None])
    assert error.sample == 1 and "'answer' holds None" in error.problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": []}, "no rewards"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 rewards"),
        ({"weights": [math.nan]}, "weights must be finite"),
        ({"completions": ["a"]}, "2 prompts for 1 completions"),
        ({"columns": {"x": [1]}}, "column 'x' has 1 values for 2 prompts"),
        ({"columns": {"prompts": [1, 2]}}, "a column 'prompts'"),
        ({"timeout": 0}, "timeout must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "rewards": resolve(["length"]), "weights": None, "prompts": ["p", "q"],
        "completions": ["a", "b"], "columns": {},
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        score(**{**arguments, **change})


def test_the_error_survives_pickling_and_shows_the_beginning_of_the_prompt() -> None:
    error = RewardError("mine", 3, "p" * 200, "raised")
    copy = pickle.loads(pickle.dumps(error))
    assert (
        str(copy) == str(error) == f"reward 'mine', completions[3] (prompt '{'p' * 77}...'): raised"
    )
    assert isinstance(error, FastLLMError)


def test_a_reward_model_is_a_reward(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tokenizer = train_tokenizer(
        ["user: hello there, how are you? fine."] * 3, 300, allow_smaller=True
    )
    config = replace(
        config_of("llama"), vocab_size=tokenizer.vocab_size, scalar_head=True,
        tie_word_embeddings=True, eos_token_ids=(0,), bos_token_id=0,
    )  # fmt: skip
    save_pretrained(initialize(config, dtype=torch.float32, seed=2), folder, tokenizer)
    rewards = resolve([f"model:{folder}", "length"])
    assert [reward.name for reward in rewards] == ["model", "length"]
    user = {"role": "user", "content": "hello"}
    prompts = ["hello", [user], [{"role": "system", "content": "there"}, user], "how"]
    completions = ["fine"] * 4
    found = score(rewards, [2.0, 1.0], prompts, completions, {"answer": [None] * 4})
    own = RewardModel(folder)(prompts, completions)
    assert found[:, 0].tolist() == pytest.approx([2 * value for value in own])
    assert found[0, 0] == found[1, 0] and len(set(found[1:, 0].tolist())) == 3
    with pytest.raises(ModelNotFoundError):
        resolve([f"model:{tmp_path / 'nothing'}"])
    error = failure(rewards[0], ["fine", "a\ud800"])
    assert error.sample == 1 and "surrogate" in error.problem

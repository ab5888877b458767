"""The registries of transformers: our name on import, the default names by wish, originals back."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import fastllm
from fastllm.integrations.transformers import registry, versions
from fastllm.integrations.transformers.attention import attention_forward
from fastllm.integrations.transformers.experts import experts_forward
from fastllm.integrations.transformers.masks import make_mask

OURS = {"attention": attention_forward, "mask": make_mask, "experts": experts_forward}
INTERFACES = {
    "attention": AttentionInterface,
    "mask": AttentionMaskInterface,
    "experts": ExpertsInterface,
}


def names() -> dict[str, object]:
    return {kind: INTERFACES[kind]()[name] for kind, name in registry.DEFAULTS.items()}


@pytest.fixture(autouse=True)
def default_names_restored() -> Iterator[None]:
    before = names()
    yield
    fastllm.unpatch()
    assert names() == before


def test_our_name_is_in_all_three_registries() -> None:
    assert {kind: INTERFACES[kind]()["fastllm"] for kind in OURS} == OURS


@pytest.mark.parametrize("first", ["fastllm", "transformers.modeling_utils"])
def test_importing_both_packages_in_any_order_makes_the_name_known(first: str) -> None:
    second = "fastllm" if first != "fastllm" else "transformers.modeling_utils"
    code = (
        f"import {first}\nimport sys\n"
        f"assert {first != 'fastllm'} or 'transformers' not in sys.modules\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('transformers.modeling_utils')  # imports nothing\n"
        f"import {second}\nfrom transformers.modeling_utils import AttentionInterface\n"
        "assert 'fastllm' in AttentionInterface(), 'unknown'\n"
        "assert [type(f).__name__ for f in sys.meta_path].count('_Finder') == 1\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_our_own_modules_may_be_what_imports_the_other_packages() -> None:
    pytest.importorskip("peft")
    code = (
        "import sys\n"
        "import fastllm.integrations.transformers.quantizer as ours\n"
        "assert ours.METHOD in ours.AUTO_QUANTIZER_MAPPING\n"
        "assert 'peft.tuners.lora.model' not in sys.modules\n"
        "import fastllm.integrations.peft\n"
        "from peft.tuners.lora import model\n"
        "assert model.dispatch_default.fastllm_original\n"
        "from transformers.modeling_utils import AttentionInterface\n"
        "assert 'fastllm' in AttentionInterface()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "does not fit" not in run.stderr, run.stderr


@pytest.mark.parametrize("default", [False, True])
def test_registries_that_a_reload_makes_anew_get_our_names_again(default: bool) -> None:
    code = (
        "import importlib\nimport transformers.modeling_utils\nimport fastllm\n"
        "from fastllm.integrations.transformers import registry\n"
        f"fastllm.patch(default={default})\n"
        "for name in ('modeling_utils', 'masking_utils', 'integrations.moe', 'modeling_utils'):\n"
        "    before = registry._interfaces()\n"
        "    importlib.reload(importlib.import_module(f'transformers.{name}'))\n"
        "    interfaces, ours = registry._interfaces(), registry._functions()\n"
        "    assert before != interfaces, 'nothing was made anew'\n"
        "    for kind, interface in interfaces.items():\n"
        "        assert interface()['fastllm'] is ours[kind], (name, kind)\n"
        f"    assert registry.defaults_taken() is {default}, name\n"
        "fastllm.unpatch()\n"
        "names = registry._interfaces().items()\n"
        "served = {kind: one()[registry.DEFAULTS[kind]] for kind, one in names}\n"
        "assert all(f.__module__.startswith('transformers.') for f in served.values())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_default_takes_the_default_names_and_gives_them_back() -> None:
    before = names()
    assert not registry.defaults_taken()
    fastllm.patch()
    assert names() == before
    fastllm.patch(default=True)
    fastllm.patch(default=True)
    assert names() == OURS and registry.defaults_taken()
    assert {kind: registry.original(kind) for kind in OURS} == before
    fastllm.unpatch()
    assert names() == before
    fastllm.unpatch()


def test_a_name_that_somebody_registered_after_us_stays_theirs() -> None:
    mine = AttentionInterface()["sdpa"]

    def another(*args: object, **kwargs: object) -> None: ...

    fastllm.patch(default=True)
    AttentionInterface.register("sdpa", another)
    try:
        fastllm.unpatch()
        assert AttentionInterface()["sdpa"] is another
        assert AttentionMaskInterface()["sdpa"] is not make_mask
    finally:
        AttentionInterface.register("sdpa", mine)


def test_a_with_block_takes_the_default_names_for_its_length() -> None:
    before = names()
    with fastllm.patched(default=True):
        with fastllm.patched(default=True):
            assert names() == OURS
        assert names() == OURS
    assert names() == before


def test_registering_from_many_threads_keeps_the_originals() -> None:
    before = names()
    start = threading.Barrier(8)

    def work(take: bool) -> None:
        start.wait()
        for _ in range(20):
            fastllm.patch(default=take)
            fastllm.unpatch()

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fastllm.unpatch()
    assert names() == before


def test_an_untested_version_warns_once_and_an_old_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.__version__", "5.99.0.dev0")
    with pytest.warns(UserWarning, match=r"5\.99\.0\.dev0 is outside the tested range"):
        versions.check_version()
    versions.check_version()  # a second warning would be an error
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"4\.57\.1 is too old"):
        fastllm.patch()

"""Sizes of captured steps, and how their results come to the host."""

from __future__ import annotations

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.engine.runner import bucket, on_host
from fastllm.testing.small_models import model_of


def test_buckets_waste_at_most_half_of_a_small_batch_and_a_third_of_a_large_one() -> None:
    sizes = [bucket(count) for count in range(1, 257)]
    assert sorted(set(sizes)) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for count, size in enumerate(sizes, start=1):
        assert count <= size < 2 * count and (count <= 8 or size <= 1.5 * count)


@pytest.mark.parametrize("slots", [13, 24])
def test_every_number_of_sequences_has_a_step(slots: int) -> None:
    llm = LLM.from_model(model_of("llama", torch.float32), max_num_seqs=slots, max_model_len=64)
    params = [
        SamplingParams(max_tokens=1 + slots - i, temperature=0.0, detokenize=False, ignore_eos=True)
        for i in range(slots)
    ]
    outputs = llm.generate([[1, 2, 3]] * slots, params)
    longest = outputs[0].outputs[0]  # the others follow it: its prompt is theirs
    for i, out in enumerate(outputs):
        assert out.outputs[0].token_ids == longest.token_ids[: 1 + slots - i]
        assert out.outputs[0].token_logprobs == longest.token_logprobs[: 1 + slots - i]
    assert set(llm._engine.runner._steps) == {min(bucket(n), slots) for n in range(1, slots + 1)}


def test_results_come_to_the_host_in_one_piece_with_their_bits() -> None:
    ids = torch.tensor([0, 5, -1, 2**31 - 1, 8388607], dtype=torch.int32)
    values = torch.tensor([-0.5, 0.0, float("nan"), -1e-42, -3.4e38])
    got_ids, got = on_host(ids, values)
    assert got_ids.tolist() == ids.tolist()
    assert torch.equal(torch.from_numpy(got).view(torch.int32), values.view(torch.int32))

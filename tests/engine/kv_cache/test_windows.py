"""Engines whose layers see windows: blocks in use are few, and tokens are those of Hugging Face."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from millrace.engine.llm import LLM
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from oracles import greedy

WINDOWS = {"mistral": 6, "qwen2": 7, "gemma2": 6}
BLOCK_SIZE, STEP_TOKENS, MAX_TOKENS = 4, 16, 20
PARAMS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


def long_prompt(family: str, seed: int = 0) -> list[int]:
    """A prompt of 20 windows."""
    return random.Random(seed).choices(range(3, 250), k=20 * WINDOWS[family])


@pytest.fixture(params=sorted(WINDOWS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def llm(family, tiny_model, device) -> Iterator[LLM]:
    settings = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 4}
    with LLM(str(tiny_model(family)), dtype="float32", device=device, overlap_depth=1, **settings) as llm:
        yield llm


def blocks_of_steps(llm: LLM, prompt: list[int]) -> tuple[list[int], list[list[int]]]:
    """Runs a prompt; returns its tokens, and for each step the blocks that it holds in each group."""
    engine = llm.llm_engine
    engine.add_request(GenerateRequest("0", None, prompt, PARAMS))
    (sequence,) = engine._groups["0"].sequences
    steps = []
    while engine.has_unfinished_requests():
        engine.step()
        engine.check_integrity()
        held = [len(blocks) for blocks in engine.scheduler.kv_cache.held_blocks(sequence)]
        assert engine.scheduler.kv_cache.pool.num_used == sum(held)
        steps.append(held)
    return sequence.output_token_ids, steps[: -(-len(prompt) // STEP_TOKENS) + MAX_TOKENS - 1]


def test_blocks_of_a_prompt_of_20_windows_are_freed_as_the_windows_pass(family, llm, tiny_model):
    prompt, window = long_prompt(family), WINDOWS[family]
    token_ids, steps = blocks_of_steps(llm, prompt)
    (reference,) = greedy(tiny_model(family), [prompt], MAX_TOKENS)
    assert token_ids == reference.token_ids
    num_chunks = -(-len(prompt) // STEP_TOKENS)
    for group, cache in enumerate(llm.llm_engine.scheduler.kv_cache.caches):
        held = [counts[group] for counts in steps]
        if cache.window:
            assert max(held[:num_chunks]) <= -(-(window + STEP_TOKENS) // BLOCK_SIZE) + 1
            assert max(held[num_chunks:]) <= -(-window // BLOCK_SIZE) + 1
        else:
            assert max(held) == -(-(len(prompt) + MAX_TOKENS - 1) // BLOCK_SIZE)


def test_an_equal_prompt_finds_its_prefix_in_all_groups(family, llm, tiny_model):
    prompt = long_prompt(family)
    first, second = (llm.generate([prompt], PARAMS, use_tqdm=False)[0] for _ in range(2))
    assert second.num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    llm.llm_engine.check_integrity()


def test_a_prefix_whose_window_blocks_went_to_others_is_computed_again(family, llm, tiny_model):
    prompt = long_prompt(family)
    (first,) = llm.generate([prompt], PARAMS, use_tqdm=False)
    kv_cache = llm.llm_engine.scheduler.kv_cache
    windowed = [group for group, cache in enumerate(kv_cache.caches) if cache.window]
    for block in range(kv_cache.pool.num_blocks):
        key = kv_cache.pool._hash_of[block]
        if key is not None and key[-1] in windowed:
            kv_cache.pool.forget([block])
    (second,) = llm.generate([prompt], PARAMS, use_tqdm=False)
    assert second.num_cached_tokens == 0
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_sequences_of_one_request_share_the_prompt_in_all_groups(family, llm):
    prompt = long_prompt(family)[: STEP_TOKENS - 2]
    params = SamplingParams(temperature=0.8, seed=5, n=4, max_tokens=MAX_TOKENS, ignore_eos=True)
    (together,) = llm.generate([prompt], params, use_tqdm=False)
    assert llm.stats().counters.num_cached_tokens > 0
    llm.llm_engine.reset_prefix_cache()
    (again,) = llm.generate([prompt], params, use_tqdm=False)
    assert [one.token_ids for one in together.outputs] == [one.token_ids for one in again.outputs]

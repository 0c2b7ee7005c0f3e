"""Models whose layers keep states: a sequence owns a row of them, which says nothing of the sequences before it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from checkpoints import tiny_config
from millrace.engine import EngineConfig, Footprint
from millrace.engine.errors import ConfigError, UnsupportedModelError
from millrace.engine.kv_cache import StateShape
from millrace.engine.llm import LLM
from millrace.engine.models import describe_model
from millrace.engine.models.pp_stages import cache_groups, cache_pairs, cache_shape, check_parallel, state_shape
from millrace.engine.parallel.context import SINGLE, ParallelContext
from millrace.engine.sampling_params import SamplingParams

PROMPTS = [[5 + i % 3, 30, 31, *range(40, 41 + 7 * (i % 4))] for i in range(8)]
PARAMS = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
SETTINGS = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "block_size": 4}


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_do_not_depend_on_who_had_the_row_before(tiny_model, depth: int) -> None:
    with LLM(str(tiny_model("bamba")), max_num_seqs=8, **SETTINGS) as llm:
        alone = [tokens(llm, [prompt])[0] for prompt in PROMPTS]
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 11, "overlap_depth": depth}
    with LLM(str(tiny_model("bamba")), **settings, **SETTINGS) as llm:
        engine = llm.llm_engine
        states = engine.executor._runner.kv_cache[-2:]  # the two layers that keep states
        assert all(tensor.shape[0] == 3 for pair in states for tensor in pair)
        for tensor in (tensor for pair in states for tensor in pair):
            tensor.fill_(torch.nan)
        assert tokens(llm, PROMPTS) == alone
        engine.check_integrity()
        assert sorted(engine.scheduler._free_rows) == [0, 1, 2], "a row of states was not freed"


def test_a_prompt_that_comes_again_is_computed_again(tiny_model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), LLM(str(tiny_model("bamba")), max_num_seqs=4, **SETTINGS) as llm:
        first, second = tokens(llm, PROMPTS), tokens(llm, PROMPTS)
        counters = llm.stats().counters
    assert first == second
    assert counters.num_cached_tokens == 0
    assert counters.num_prompt_tokens == 2 * sum(map(len, PROMPTS))
    assert caplog.text.count("prefix caching is off") == 1


def test_attention_layers_alone_have_blocks() -> None:
    spec = describe_model(tiny_config("bamba"))
    (group,) = cache_groups(spec)
    assert group.layers == (1,)
    assert cache_pairs(spec, range(3)) == {0: 1, 1: 0, 2: 2}
    # The last pp stage has no attention; its blocks are those of one pair, which no layer reads.
    assert cache_pairs(spec, range(2, 3)) == {2: 1}


def test_a_layer_that_keeps_nothing_takes_no_memory() -> None:
    spec = describe_model(tiny_config("nemotron-h"))
    assert spec.attention_layers == [2]
    assert cache_pairs(spec, range(5)) == {0: 1, 1: 0, 2: 0, 3: 0, 4: 2}
    assert cache_pairs(spec, range(1, 2)) == {1: 0}
    assert [cache_shape(spec, SINGLE).num_pairs, state_shape(spec, SINGLE).num_layers] == [1, 2]


def test_ranks_share_the_heads_of_a_state_and_the_layers() -> None:
    spec = describe_model(tiny_config("bamba", mamba_n_groups=2))
    whole = state_shape(spec, SINGLE)
    assert whole == StateShape(2, (3, 8 * 16 + 2 * 2 * 13), (8, 16, 13))
    assert whole.row_bytes(torch.bfloat16) == 2 * (2 * 3 * 180 + 4 * 8 * 16 * 13)
    part = state_shape(spec, ParallelContext.of_rank(1, 2, 1))
    assert part == StateShape(2, (3, 4 * 16 + 2 * 13), (4, 16, 13))
    stages = [state_shape(spec, ParallelContext.of_rank(rank, 1, 2)).num_layers for rank in range(2)]
    assert sum(stages) == 2
    assert spec.state is not None
    six_heads = replace(spec, state=replace(spec.state, num_heads=6))
    with pytest.raises(ConfigError, match="the number of heads with states=6"):
        check_parallel(six_heads, 4, 1)


def test_a_model_of_states_alone_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'layers_block_type'.*at least one layer must have attention"):
        describe_model(tiny_config("bamba", attn_layer_indices=[]))


def test_the_footprint_counts_the_states(tiny_model) -> None:
    settings = {**SETTINGS, "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 5}
    told = Footprint.of(EngineConfig(model=str(tiny_model("bamba")), **settings))
    with LLM(str(tiny_model("bamba")), **settings) as llm:
        cache = llm.llm_engine.executor._runner.kv_cache
        held = sum(tensor.nbytes for pair in cache for tensor in pair)
    assert held == told.kv_tokens * told.kv_bytes_per_token + 5 * told.state_bytes
    assert held <= 1 << 20
    few = EngineConfig(model=str(tiny_model("bamba")), **{**settings, "max_num_seqs": 500})
    assert "the states of 500 sequences take" in str(Footprint.of(few).problem)


def test_rows_are_as_many_as_memory_holds_where_the_number_is_not_set(tiny_model) -> None:
    config = EngineConfig(model=str(tiny_model("bamba")), **{**SETTINGS, "kv_cache_memory_bytes": 1 << 20})
    told = Footprint.of(config)
    assert told.problem is None
    of_one = told.state_bytes + -(-told.max_model_len // 4) * 4 * told.kv_bytes_per_token
    assert told.max_num_seqs == (1 << 20) // of_one < 256


def test_states_and_deterministic_outputs_exclude_each_other(tiny_model) -> None:
    with pytest.raises(ConfigError, match="deterministic"):
        LLM(str(tiny_model("bamba")), deterministic=True, **SETTINGS)

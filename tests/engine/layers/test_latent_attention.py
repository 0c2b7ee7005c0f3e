"""Attention over latents: the cache of a model, the two ways to attend, the parts of ranks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from checkpoints import tiny_checkpoint
from filling import load_weights
from millrace.engine.errors import ConfigError
from millrace.engine.kv_cache import kv_block_bytes
from millrace.engine.layers import latent_attention as layer
from millrace.engine.llm import LLM
from millrace.engine.models import Decoder, ModelOptions, build_model, describe_model, find_family, load_hf_config
from millrace.engine.models.pp_stages import cache_shape
from millrace.engine.models.registry import names_in_checkpoint
from millrace.engine.parallel.context import ParallelContext
from millrace.kernels import latent_attention
from paged import SCHEDULES, PagedSequences, random_sequences


def load(folder: Path, place: ParallelContext | None = None) -> Decoder:
    config = load_hf_config(folder)
    model = build_model(config, torch.float32, "cpu", parallel=place or ParallelContext())
    load_weights(model, folder, find_family(config).weight_map(model.spec), names_in_checkpoint(config, torch.float32))
    return model


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_rank_keeps_one_latent_for_each_token_and_layer(tp_size: int) -> None:
    spec = describe_model(DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]))  # the published sizes
    for rank in range(tp_size):
        shape = cache_shape(spec, ParallelContext.of_rank(rank, tp_size, 1))
        assert kv_block_bytes(shape, 16, torch.bfloat16) == 61 * 16 * 576 * 2


@torch.inference_mode()
def test_prompts_are_expanded_and_other_tokens_are_absorbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_checkpoint(tmp_path, "youtu", num_hidden_layers=1))
    num_absorbed: list[int] = []

    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        num_absorbed.append(len(query))
        return latent_attention(query, *args, **kwargs)

    monkeypatch.setattr(layer, "latent_attention", attend)
    sequences = random_sequences()
    expanded = PagedSequences(model, sequences, torch.float32).run(SCHEDULES["prefill"]())
    assert not num_absorbed
    pages = PagedSequences(model, sequences, torch.float32)
    for ours, theirs in zip(pages.run(SCHEDULES["decode"]()), expanded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sum(num_absorbed) == sum(map(len, sequences)) - len(sequences)  # The first token of each is a prompt.


@torch.inference_mode()
def test_the_addends_of_two_ranks_are_the_result_of_one(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "youtu", num_hidden_layers=1)
    results, tokens = [], random_sequences()[0]
    places = [ParallelContext(), *(ParallelContext.of_rank(rank, 2, 1) for rank in range(2))]
    for place in places:
        model = load(folder, place)
        pages = PagedSequences(model, [tokens], torch.float32)
        batch, (latents, values) = pages.batch({0: len(tokens)}), pages.kv_cache[0]
        hidden = torch.randn(len(tokens), model.spec.hidden_size, generator=torch.Generator().manual_seed(3))
        results.append(model.layers[0].attention(hidden, batch, latents, values))
    whole, *addends = results
    torch.testing.assert_close(sum(addends), whole, rtol=1e-4, atol=1e-4)


def test_settings_that_latents_do_not_have_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "youtu", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8'.*latents"):
        LLM(str(folder), dtype="bfloat16", kv_cache_dtype="fp8", device="cpu")
    with pytest.raises(ConfigError, match=r"deterministic=True.*latents"):
        build_model(load_hf_config(folder), torch.float32, "meta", ModelOptions(deterministic=True))

"""How a model is cut: dimensions, heads, layers, weights. Nothing here runs on more than one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint, tiny_config
from filling import load_weights
from millrace.engine.errors import CheckpointError, ConfigError
from millrace.engine.kv_cache import CacheShape
from millrace.engine.models import build_model, describe_model, find_family, load_hf_config, load_model
from millrace.engine.models.pp_stages import cache_shape, check_parallel, stage_layers
from millrace.engine.models.registry import names_in_checkpoint
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.parallel.shard import Shard
from millrace.engine.weights.checkpoint import match_tensor, read_part
from millrace.engine.weights.model_slots import weight_slots


@given(size=st.integers(1, 1000), count=st.integers(1, 16))
def test_shards_are_the_whole(size: int, count: int) -> None:
    shards = [Shard(size, index, count) for index in range(count)]
    covered = [i for shard in shards for i in range(shard.start, shard.start + shard.length)]
    assert covered == list(range(size))
    assert all(shard.length <= shard.room == shards[0].room for shard in shards)


def test_ranks_run_through_a_stage_first() -> None:
    places = [ParallelContext.of_rank(rank, 2, 3) for rank in range(6)]
    assert [(place.pp_rank, place.tp_rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [place.rank for place in places] == list(range(6))
    assert [place.rank for place in places if place.reports] == [4]


def test_few_kv_heads_are_held_by_neighbours() -> None:
    shards = [ParallelContext.of_rank(rank, 4, 1).kv_shard(2) for rank in range(4)]
    assert [(shard.start, shard.length) for shard in shards] == [(0, 1), (0, 1), (1, 1), (1, 1)]


@settings(deadline=None)
@given(num_layers=st.integers(1, 40), data=st.data())
def test_stages_are_all_layers_in_order(num_layers: int, data: st.DataObject) -> None:
    pp_size = data.draw(st.integers(1, num_layers))
    spec = describe_model(tiny_config("llama", num_hidden_layers=num_layers))
    stages = stage_layers(spec, pp_size)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert min(map(len, stages)) >= 1


def test_a_large_head_counts_as_layers() -> None:
    spec = describe_model(tiny_config("llama", num_hidden_layers=12))
    layer = 64 * (12 * 16 + 3 * 96)
    assert list(map(len, stage_layers(dataclasses.replace(spec, vocab_size=1), 2))) == [6, 6]
    assert list(map(len, stage_layers(dataclasses.replace(spec, vocab_size=4 * layer // 64), 2))) == [8, 4]


def test_layers_with_experts_count_as_many_layers() -> None:
    spec = describe_model(tiny_config("mixtral", num_hidden_layers=8, num_local_experts=60))
    first_four = dataclasses.replace(spec.experts, layers=frozenset(range(4)))
    spec = dataclasses.replace(spec, vocab_size=1, experts=first_four)
    assert stage_layers(spec, 2) == [range(2), range(2, 8)]
    assert stage_layers(spec, 3) == [range(2), range(2, 3), range(3, 8)]


@pytest.mark.parametrize(
    ("tp_size", "expert_parallel", "message"),
    [
        (2, False, r"num_attention_heads=4 and moe_intermediate_size=39, .*use one of 1$"),
        (4, True, r"num_attention_heads=4 and num_experts=6, .*use one of 1, 2$"),
    ],
)
def test_experts_that_cannot_be_cut_are_said(tp_size: int, expert_parallel: bool, message: str) -> None:
    spec = describe_model(tiny_config("mixtral", intermediate_size=39, num_local_experts=6))
    with pytest.raises(ConfigError, match=message):
        check_parallel(spec, tp_size, 1, expert_parallel=expert_parallel)
    check_parallel(spec, 2, 1, expert_parallel=True)


def test_expert_parallelism_needs_experts() -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel=True is for models with experts"):
        check_parallel(describe_model(tiny_config("llama")), 2, 1, expert_parallel=True)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "message"),
    [
        (3, 1, "tensor_parallel_size=3 .* use one of 1, 2, 4$"),
        (8, 1, "must divide num_attention_heads=4"),
        (1, 3, "pipeline_parallel_size=3 is more than the model's 2 layers"),
    ],
)
def test_what_cannot_be_cut_is_said(tp_size: int, pp_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(describe_model(tiny_config("llama")), tp_size, pp_size)


@pytest.mark.parametrize(
    ("family", "tp_size", "pp_size"),
    [
        ("llama3-rope", 2, 2),
        ("qwen3", 4, 1),
        ("opt", 2, 2),
        ("gpt2", 2, 2),
        ("gpt-neox", 2, 2),
        ("cohere", 2, 2),
        ("phi", 2, 1),
        ("codegen", 4, 1),
        ("stablelm", 4, 1),
        ("qwen2-moe", 2, 3),
    ],
)
def test_the_parts_of_all_ranks_are_the_checkpoint(tiny_model, family: str, tp_size: int, pp_size: int) -> None:
    folder = tiny_model(family)
    config = load_hf_config(folder)
    weights, whole = find_family(config).weight_map(describe_model(config)), {}
    slots = weight_slots(build_model(config, torch.float32, "meta"))
    for name, tensor in load_file(folder / "model.safetensors").items():
        whole |= {ours: read_part(slots[ours], part) for ours, part in match_tensor(slots, weights, name, tensor)}
    seen = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for rank in range(tp_size * pp_size):
        place = ParallelContext.of_rank(rank, tp_size, pp_size)
        model = build_model(config, torch.float32, "cpu", parallel=place)
        load_weights(model, folder, weights, names_in_checkpoint(config, torch.float32))
        for name, slot in weight_slots(model).items():
            if name in whole:  # All but the other name of a tied head.
                slot.cut(seen[name]).add_(1)
                assert torch.equal(slot.targets[0], slot.cut(whole[name])), name
    assert all((counts >= 1).all() for counts in seen.values()), "a part is on no rank"
    shared = [name for name, counts in seen.items() if (counts > 1).any()]
    shared = [name for name in shared if not name.endswith(("router.linear.weight", "shared_gate.weight"))]
    assert not [name for name in shared if ".mlp." in name or ".query." in name or ".attention.out." in name]


def test_a_rank_takes_only_its_own_slices(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    config = load_hf_config(folder)
    place = ParallelContext.of_rank(3, 2, 2)
    family = find_family(config)
    slots = weight_slots(build_model(config, torch.float32, "meta", parallel=place))
    poisoned = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        poisoned[name] = torch.full_like(tensor, torch.nan)
        if (ours := family.weights.ours(name)) in slots:
            slots[ours].cut(poisoned[name]).copy_(slots[ours].cut(tensor))
    save_file(poisoned, folder / "model.safetensors")
    model = build_model(config, torch.float32, "cpu", parallel=place)
    load_weights(model, folder, family.weights, names_in_checkpoint(config, torch.float32))
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    assert not [name for name in slots if "layers.0." in name or "embed" in name]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_the_alibi_slopes_of_its_heads(rank: int) -> None:
    model = build_model(tiny_config("bloom"), torch.float32, "cpu", parallel=ParallelContext.of_rank(rank, 2, 1))
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    assert all(torch.equal(layer.attention.alibi_slopes, slopes.chunk(2)[rank]) for layer in model.layers)


def test_a_name_that_no_rank_has_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.router.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    place = ParallelContext.of_rank(1, 1, 2)
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.0\.mlp\.router\.weight"):
        load_model(folder, load_hf_config(folder), torch.float32, "cpu", parallel=place)


def test_a_rank_has_room_for_its_own_keys_only() -> None:
    spec = describe_model(tiny_config("llama", num_hidden_layers=6))
    assert cache_shape(spec, ParallelContext()) == CacheShape(num_pairs=6, num_heads=2, head_dim=16)
    assert cache_shape(spec, ParallelContext.of_rank(0, 4, 2)).num_heads == 1
    layers = [cache_shape(spec, ParallelContext.of_rank(rank, 1, 3)).num_pairs for rank in range(3)]
    assert sum(layers) == 6


def test_rows_without_a_token_are_zero() -> None:
    config = tiny_config("llama", vocab_size=385)
    model = build_model(config, torch.float32, "cpu", parallel=ParallelContext.of_rank(3, 4, 1))
    assert model.lm_head.weight.shape == (97, 64) == model.embed_tokens.weight.shape
    assert not model.lm_head.weight[94:].any() and not model.embed_tokens.weight[94:].any()

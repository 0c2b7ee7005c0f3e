"""Scales of an 8-bit KV cache: from the checkpoint, or chosen at load, so that keys of any size do no harm."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint
from millrace.engine.device import Device
from millrace.engine.errors import CheckpointError, ConfigError
from millrace.engine.layers import KVScales
from millrace.engine.llm import LLM
from millrace.engine.loading.kv_scales import choose_kv_dtype, prepare_kv_scales
from millrace.engine.models import Decoder, describe_model, load_hf_config, load_model
from millrace.engine.parallel.context import SINGLE, ParallelContext
from millrace.engine.parallel.shard import Shard
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.weights.scale_names import scale_names
from paged import PagedSequences, random_sequences

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
PROMPTS = [[5, 6, 7] * 9 + [token] for token in (8, 9, 10, 11)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def with_large_keys(folder: Path, factor: float = 512.0, shift: float = 3.0) -> Path:
    """Adds to the key biases of a checkpoint and multiplies its keys, and divides its queries by the same factor."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj" in name:
            tensors[name] = factor * (tensor + shift * tensor.sign() * name.endswith("bias"))
        if "q_proj" in name:
            tensors[name] = tensor / factor
    save_file(tensors, folder / "model.safetensors")
    return folder


def add_tensors(folder: Path, **tensors: Any) -> None:
    """Adds tensors to layer 0 of a checkpoint; a `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    given = {f"model.layers.0.self_attn.{name.replace('__', '.')}": torch.tensor(x) for name, x in tensors.items()}
    save_file({**load_file(path), **given}, path)


def load(folder: Path, kv_dtype: torch.dtype = E4M3, parallel: ParallelContext = SINGLE) -> Decoder:
    config = load_hf_config(folder)
    model = load_model(folder, config, torch.float32, "cpu", parallel=parallel)
    prepare_kv_scales(model, config, device=CPU, block_size=16, kv_dtype=kv_dtype)
    return model


def scales_of(model: Decoder, index: int = 0) -> KVScales:
    return model.layers[model.spec.attention_layers[index]].attention.kv_scales


@torch.inference_mode()
def logits(model: Decoder, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Returns the logits of all tokens, `[num_tokens, vocab_size]`."""
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, dtype).run(whole))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def generate(folder: Path, kv_cache_dtype: str = "fp8", **settings: Any) -> list[list[int]]:
    with LLM(str(folder), dtype="float32", max_num_seqs=4, kv_cache_dtype=kv_cache_dtype, **settings) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_keys_with_huge_biases_need_the_scales_that_are_chosen_at_load(tmp_path, monkeypatch):
    folder = with_large_keys(tiny_checkpoint(tmp_path, "qwen2"))
    model = load(folder)
    exact, rounded = logits(model, torch.float32), logits(model)
    assert relative_error(rounded, exact) < 0.15
    assert (rounded.argmax(-1) == exact.argmax(-1)).float().mean() > 0.8
    monkeypatch.setattr(KVScales, "choose", lambda scales, *_: None)
    assert relative_error(logits(load(folder)), exact) > 0.4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_scales_are_powers_of_two_so_keys_of_any_size_are_rounded_alike(tmp_path, family):
    small, large = (tiny_checkpoint(tmp_path / name, family) for name in ("small", "large"))
    with_large_keys(large, shift=0.0)
    assert torch.equal(scales_of(load(large)).table[0], 512 * scales_of(load(small)).table[0])
    torch.testing.assert_close(logits(load(large)), logits(load(small)), rtol=1e-4, atol=1e-4)


def test_a_scale_leaves_room_for_twice_the_largest_number_and_at_most_four_times():
    scales = KVScales(Shard(5), CPU)
    peaks = torch.tensor([[1e-2, 3.0, 224.0, 225.0, 5e4], [1e-30, 0.0, torch.inf, torch.nan, 1.0]])
    scales.choose(peaks)
    chosen = scales.table
    assert torch.equal(torch.exp2(torch.log2(chosen).round()), chosen)
    assert ((448 * chosen[0] / peaks[0] >= 2) & (448 * chosen[0] / peaks[0] <= 4)).all()
    assert chosen[1, :4].tolist() == [2.0**-16, 1.0, 1.0, 1.0]
    assert scales.of(torch.empty(0, dtype=E4M3)) is scales.table
    assert scales.of(torch.empty(0, dtype=torch.bfloat16)) is None


def test_every_start_gives_the_same_tokens_with_preemption_and_cached_prefixes_too(tmp_path):
    folder = with_large_keys(tiny_checkpoint(tmp_path, "qwen2", use_sliding_window=False))
    expected = generate(folder, enable_prefix_caching=False)
    settings = {"num_gpu_blocks_override": 8, "block_size": 16, "max_num_batched_tokens": 24}
    with LLM(str(folder), dtype="float32", max_num_seqs=4, kv_cache_dtype="fp8", **settings) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        counters = llm.stats().counters
    assert counters.num_preemptions > 0 and counters.num_cached_tokens > 0


def test_ranks_have_the_scales_of_their_heads(tmp_path):
    folder = with_large_keys(tiny_checkpoint(tmp_path, "qwen2"))
    add_tensors(folder, v_scale=[2.0, 3.0])
    whole = scales_of(load(folder)).table
    assert whole[1].tolist() == [2.0, 3.0]
    for tp_size in (2, 4):  # with four ranks, two share each head
        ranks = [load(folder, parallel=ParallelContext.of_rank(rank, tp_size, 1)) for rank in range(tp_size)]
        parts = torch.cat([scales_of(rank).table for rank in ranks], dim=1)
        assert torch.equal(parts, whole.repeat_interleave(tp_size // 2, dim=1))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_many_ranks_draw_what_one_draws(tmp_path, sizes):
    folder = with_large_keys(tiny_checkpoint(tmp_path, "qwen2"))
    ranks = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}
    assert generate(folder, **ranks) == generate(folder)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1, 1)])
def test_scales_of_a_checkpoint_are_used_and_the_others_are_chosen(tmp_path, shape):
    folder = tiny_checkpoint(tmp_path, "llama")
    chosen = load(folder)
    add_tensors(folder, k_scale=torch.full(shape, 0.7).tolist())
    given = load(folder)
    keys, values = scales_of(given).table
    assert keys.tolist() == pytest.approx([0.7, 0.7])
    assert torch.equal(values, scales_of(chosen).table[1])
    assert scales_of(given).is_given.flatten().tolist() == [True, False]
    assert not scales_of(given, 1).is_given.any()
    assert (scales_of(given, 1).table != 1).any()
    assert 0.001 < relative_error(logits(given), logits(chosen)) < 0.2
    add_tensors(folder, k_scale=torch.full(shape, 0.002).tolist())
    assert relative_error(logits(load(folder)), logits(chosen)) > 0.3  # nearly all keys are clamped


@pytest.mark.parametrize(
    "spellings",
    [("k_proj.k_scale", "v_proj.v_scale"), ("k_proj.output_scale", "v_proj.output_scale"), ("attn.k_scale", "v_scale")],
)
def test_other_spellings_of_the_names_are_known(tmp_path, spellings):
    folder = tiny_checkpoint(tmp_path, "llama")
    add_tensors(folder, **{name.replace(".", "__"): number for name, number in zip(spellings, (3.0, 5.0), strict=True)})
    assert scales_of(load(folder)).table.tolist() == [[3.0, 3.0], [5.0, 5.0]]


def test_one_scale_may_be_for_keys_and_values(tmp_path):
    folder = tiny_checkpoint(tmp_path, "opt")
    path, name = folder / "model.safetensors", "model.decoder.layers.1.self_attn.kv_scale"
    save_file({**load_file(path), name: torch.tensor(6.0)}, path)
    assert scales_of(load(folder), 1).table.unique().tolist() == [6.0]
    assert scale_names("layers.0.mlp.up_proj.weight") == ("layers.0.mlp.up_proj.weight",)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"key_scale": 1.0}, r"unexpected model\.layers\.0\.self_attn\.key_scale"),
        ({"k_proj__input_scale": 1.0}, r"unexpected model\.layers\.0\.self_attn\.k_proj\.input_scale"),
        ({"k_scale": [1.0, 1.0, 1.0]}, r"k_scale has shape \[3\]"),
        ({"k_scale": 1}, r"k_scale is of torch\.int64"),
        ({"k_scale": 0.0}, r"k_scale or v_scale of layers\.0\.attention is not a positive number"),
        ({"k_scale": float("nan")}, "is not a positive number"),
        ({"k_scale": 1.0, "k_proj__k_scale": 2.0}, r"k_proj\.k_scale differs|k_scale differs"),
    ],
)
def test_scales_that_cannot_be_used_are_refused_by_name(tmp_path, tensors, message):
    folder = tiny_checkpoint(tmp_path, "llama")
    add_tensors(folder, **tensors)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_scales_that_clamp_keys_give_a_warning(tmp_path, caplog):
    folder = with_large_keys(tiny_checkpoint(tmp_path, "qwen2"))
    with caplog.at_level(logging.WARNING, "millrace"):
        load(folder)
        assert not caplog.messages
        add_tensors(folder, k_scale=1.0, v_scale=1.0)
        load(folder)
    [message] = caplog.messages
    assert message.startswith("keys of layers.0.attention and 0 more layers are clamped in the 8-bit KV cache")


def test_scales_without_an_8_bit_cache_give_a_warning_and_change_nothing(tmp_path, caplog):
    folder = tiny_checkpoint(tmp_path, "llama")
    expected = logits(load(folder, torch.float32), torch.float32)
    add_tensors(folder, k_scale=5.0)
    with caplog.at_level(logging.WARNING, "millrace"):
        assert torch.equal(logits(load(folder, torch.float32), torch.float32), expected)
    assert "layers.0.attention and 0 more layers, are not used: the cache is in float32" in caplog.text


def test_saved_shards_keep_the_scales_of_the_checkpoint(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    add_tensors(folder, k_scale=[0.7, 0.9])
    with LLM(str(folder), dtype="bfloat16", max_num_seqs=2) as llm:
        llm.save_sharded_state(tmp_path / "saved")
    settings = {"load_format": "sharded_state", "dtype": "bfloat16", "kv_cache_dtype": "fp8", "max_num_seqs": 2}
    with LLM(str(tmp_path / "saved"), **settings) as llm:
        keys, _ = scales_of(llm.llm_engine.executor._runner.model).table
        assert keys.tolist() == pytest.approx([0.7, 0.9])


def test_integers_are_nearer_than_floats_of_8_bits_whatever_the_size_of_keys(tmp_path):
    for factor in (1.0, 512.0):
        folder = with_large_keys(tiny_checkpoint(tmp_path / str(factor), "qwen2"), factor, shift=0.0)
        model = load(folder, torch.int8)
        exact, rounded = logits(model, torch.float32), logits(model, torch.int8)
        assert 0 < relative_error(rounded, exact) < 0.08
        assert relative_error(rounded, exact) < 0.8 * relative_error(logits(load(folder)), exact)


def test_steps_of_integers_are_as_small_as_the_margin_allows(tmp_path, caplog):
    folder = tiny_checkpoint(tmp_path, "llama")
    chosen = scales_of(load(folder, torch.int8)).table
    scales = KVScales(Shard(2), CPU)
    scales.choose(torch.tensor([[254.0, 0.0], [127.0, torch.inf]]), torch.int8)
    assert scales.table.tolist() == [[4.0, 1.0], [2.0, 1.0]]
    assert scales.of(torch.empty(0, dtype=torch.int8)) is scales.table
    add_tensors(folder, k_scale=1.0)  # It is for 8-bit floats: most keys would be 0 or 1.
    with caplog.at_level(logging.WARNING, "millrace"):
        assert torch.equal(scales_of(load(folder, torch.int8)).table, chosen)
    assert "are not used: the cache is in int8" in caplog.text


def test_an_engine_with_integers_draws_the_same_tokens_in_chunks(tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen2")
    assert generate(folder, "int8", max_num_batched_tokens=24) == generate(folder, "int8")


def test_integers_are_for_cpus_and_models_without_latents(tmp_path):
    spec = describe_model(load_hf_config(tiny_checkpoint(tmp_path / "a", "llama")))
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int8' is for CPUs.*use kv_cache_dtype='fp8'"):
        choose_kv_dtype("int8", torch.bfloat16, spec, replace(Device.choose("cpu"), torch_device=torch.device("cuda")))
    latents = describe_model(load_hf_config(tiny_checkpoint(tmp_path / "b", "deepseek-v3")))
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int8' is not supported for models .* latents"):
        choose_kv_dtype("int8", torch.bfloat16, latents, Device.choose("cpu"))

"""What an engine would be like, told from config.json: the same as it turns out to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints import tiny_checkpoint
from tests.gptq_files import awq, quantise_folder, settings

from millrace.engine import LLM, EngineConfig, Footprint, resolve_model
from millrace.engine.device import Device
from millrace.engine.errors import ConfigError
from millrace.engine.loading import adapter_memory
from millrace.engine.lora.layer import LoraLinear
from millrace.engine.lora.slots import SlotSizes
from millrace.engine.models import ModelOptions
from millrace.engine.quantization.group_linear import GroupLinear

MODEL = "bundled:invoices"


def footprint(memory_bytes: int | None = None, **settings: object) -> Footprint:
    return Footprint.of(EngineConfig(model=MODEL, **settings), memory_bytes)  # type: ignore[arg-type]


def test_it_is_what_the_engine_turns_out_to_be() -> None:
    settings = {"kv_cache_memory_bytes": 4 << 20, "max_model_len": 200, "max_num_seqs": 32}
    told = footprint(**settings)
    with LLM(MODEL, device="cpu", **settings) as llm:
        engine = llm.llm_engine
        assert engine.scheduler.kv_cache.pool.num_blocks == told.num_blocks
        runner = engine.executor._runner  # type: ignore[attr-defined]
        held = sum(tensor.numel() * tensor.element_size() for layer in runner.kv_cache for tensor in layer)
        assert held == told.kv_tokens * told.kv_bytes_per_token
    assert told.max_model_len == 200


def test_parameters_are_those_of_the_checkpoint() -> None:
    tensors = load_file(resolve_model(MODEL) / "model.safetensors")
    assert footprint().num_parameters == sum(tensor.numel() for tensor in tensors.values())


def test_memory_that_is_not_here_holds_the_weights_first() -> None:
    # Memory that is not this machine's holds bfloat16; this machine's CPU may have no arithmetic for it.
    weights = footprint(dtype="bfloat16").weight_bytes
    told = footprint(memory_bytes=weights + (1 << 20), gpu_memory_utilization=1.0)
    assert told.problem is None
    assert told.kv_tokens == (1 << 20) // told.kv_bytes_per_token // told.block_size * told.block_size
    assert told.dtype == "bfloat16"


@pytest.mark.parametrize("memory_bytes", [1 << 20, 5_184_000])
def test_a_model_that_does_not_fit_says_so(memory_bytes: int) -> None:
    told = footprint(memory_bytes=memory_bytes, gpu_memory_utilization=1.0)
    assert told.num_blocks == 0
    assert told.problem
    assert told.num_running(10) == 0


def test_sequences_run_at_once_as_many_as_blocks_and_settings_allow() -> None:
    told = footprint(num_gpu_blocks_override=40, max_model_len=100, max_num_seqs=9)
    assert told.num_running(16) == 9
    assert told.num_running(17) == 9
    assert told.num_running(100) == 5


ADAPTERS = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def test_adapter_slots_take_memory_by_their_number_and_rank() -> None:
    told = footprint(dtype="float32", device="cpu", **ADAPTERS)
    with LLM(MODEL, device="cpu", dtype="float32", **ADAPTERS) as llm:
        adapters = llm.llm_engine.executor._runner.model.adapters  # type: ignore[attr-defined]
    # Each part has A and B, and its rank in each slot as an int32.
    linears = [layer.parts for layer in adapters.layers if isinstance(layer, LoraLinear)]
    num_numbers = sum(rows + columns for parts in linears for rows, columns in parts.values())
    assert told.adapter_bytes == 3 * (8 * 4 * num_numbers + 4 * sum(map(len, linears)))
    assert footprint().adapter_bytes == 0
    ranks = footprint(dtype="float32", device="cpu", tensor_parallel_size=2, **ADAPTERS).adapter_bytes
    assert told.adapter_bytes < ranks < 2 * told.adapter_bytes, "each rank has one of the two matrices whole"


def test_adapter_slots_leave_less_for_the_cache_and_too_large_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = footprint(memory_bytes=32 << 20, dtype="bfloat16")
    told = footprint(memory_bytes=32 << 20, dtype="bfloat16", **ADAPTERS)
    assert told.problem is None
    assert told.num_blocks < plain.num_blocks
    more = footprint(memory_bytes=32 << 20, dtype="bfloat16", **{**ADAPTERS, "max_loras": 1000}).problem
    assert more is not None and "lower max_loras or max_lora_rank" in more
    monkeypatch.setattr(adapter_memory, "memory_bytes", lambda _: 1 << 20)
    with pytest.raises(ConfigError, match=r"100 adapter slots .* 1048576 bytes .* lower max_loras or max_lora_rank"):
        LLM(MODEL, device="cpu", **{**ADAPTERS, "max_loras": 100})


def test_adapters_on_a_gpu_are_not_deterministic_and_refused_with_it() -> None:
    gpu, options = Device(torch.device("cuda"), 64, 1), ModelOptions(deterministic=True, adapter_slots=SlotSizes(1, 8))
    with pytest.raises(ConfigError, match="deterministic=True with enable_lora=True: on a GPU"):
        adapter_memory.check_adapter_slots(gpu, 0, options)
    adapter_memory.check_adapter_slots(replace(gpu, torch_device=torch.device("cpu")), 0, options)
    adapter_memory.check_adapter_slots(gpu, 0, replace(options, adapter_slots=None))


def test_eight_bits_take_less() -> None:
    full, eight = footprint(dtype="bfloat16"), footprint(dtype="bfloat16", kv_cache_dtype="fp8")
    assert eight.kv_bytes_per_token * 2 == full.kv_bytes_per_token
    assert footprint(quantization="int8", device="cpu").weight_bytes < footprint().weight_bytes


def test_a_quantised_checkpoint_takes_what_its_files_say(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "model", "llama", hidden_size=64, intermediate_size=128)
    folder, _ = quantise_folder(plain, tmp_path / "out", lambda _, weight: awq(weight), settings("awq"))
    told, full = (Footprint.of(EngineConfig(model=str(path), dtype="float32")) for path in (folder, plain))
    assert told.num_parameters == full.num_parameters
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True) as llm:
        layer = llm.llm_engine.executor._runner.model.layers[0].mlp.down  # type: ignore[attr-defined]
        assert type(layer) is GroupLinear
    assert told.weight_bytes < full.weight_bytes * 0.6

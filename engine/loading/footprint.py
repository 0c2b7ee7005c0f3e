"""`Footprint`: the memory and the limits of an engine, computed from config.json before any weight is read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import EngineConfig
from ..device import LARGE_GPU_BYTES, Device
from ..errors import ConfigError
from ..kv_cache import LayerCache, kv_block_bytes, max_held_blocks
from ..lora.slots import SlotSizes
from ..models import ModelOptions, build_model, describe_model, load_hf_config, weight_map
from ..models.pp_stages import cache_groups, cache_shape, state_shape
from ..parallel.context import SINGLE, ParallelContext
from ..quantization.stored import StoredForms
from ..tasks.choose import choose_task
from ..weights.checkpoint import has_weights
from .adapter_memory import lora_bytes
from .capacity import Capacity, Reserve, choose_max_model_len, fit_to_model, most_num_seqs, plan_capacity
from .kv_scales import choose_kv_dtype
from .model_source import locate_model, resolve_model
from .stored_forms import plan_stored_forms, read_stored_forms

__all__ = ["Footprint"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory and the limits that an engine would have. Bytes are those of all ranks together.

    Attributes:
        num_parameters: Number of parameters of the model.
        weight_bytes: Bytes of the parameters.
        dtype: Number type of the parameters that are not quantised.
        kv_bytes_per_token: Bytes of a token in the KV cache, in all layers; windows free some of them later.
        max_model_len: Most tokens of prompt and output together.
        max_num_seqs: Most requests running at once.
        max_num_batched_tokens: Most tokens of one step.
        block_size: Tokens per KV cache block.
        num_blocks: Number of KV cache blocks; 0 if there is no room for any.
        caches: The `LayerCache` of each group of layers; none for an encoder, which has no KV cache.
        state_bytes: Bytes of the states of one running sequence, in models whose layers keep any.
        adapter_bytes: Bytes of the adapter slots (`max_loras` of `max_lora_rank`); 0 without `enable_lora`.
        num_ranks: Number of processes, each of which has its own accelerator unless the engine runs on CPUs.
        problem: The reason why the engine would not start; None if it would start.
    """

    num_parameters: int
    weight_bytes: int
    dtype: str
    kv_bytes_per_token: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    caches: tuple[LayerCache, ...]
    state_bytes: int = 0
    adapter_bytes: int = 0
    num_ranks: int = 1
    problem: str | None = None

    @classmethod
    def of(cls, config: EngineConfig, memory_bytes: int | None = None) -> Footprint:
        """Computes the footprint of an engine.

        The temporary memory of a step is known only after a step has run and is not counted, so the real KV cache may
        be a little smaller.

        Args:
            config: Settings of the engine.
            memory_bytes: Memory of one accelerator, if the engine will run on another machine; None for the device of
                this machine.

        Raises:
            ConfigError: A setting or the model folder cannot be used.
            UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
        """
        hf_config = load_hf_config(resolve_model(config.model, config.hub), config.hf_overrides, **config.model_code)
        device = Device.choose(config.device if memory_bytes is None else "cpu")
        if memory_bytes is not None:
            device = replace(device, is_large=memory_bytes >= LARGE_GPU_BYTES)
        dtype = _dtype(config, device, hf_config, is_elsewhere=memory_bytes is not None)
        config = fit_to_model(config, device, describe_model(hf_config))
        task = choose_task(config, hf_config)
        stored = _stored_forms(config, hf_config, dtype, device)
        options = ModelOptions(config.quantization, config.deterministic, head=task.model_head, stored=stored)
        plain = build_model(hf_config, dtype, "meta", ModelOptions(head=task.model_head))
        model = build_model(hf_config, dtype, "meta", options)
        tensors = itertools.chain(model.parameters(), model.buffers())
        weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype, model.spec, device)
        block_bytes = kv_block_bytes(cache_shape(model.spec, SINGLE), config.block_size, kv_dtype)
        caches = tuple(group.cache for group in cache_groups(model.spec))
        slots = SlotSizes(config.max_loras, config.max_lora_rank) if config.enable_lora else None
        adapter_bytes = _adapter_bytes(config, hf_config, dtype, replace(options, adapter_slots=slots))
        cache_bytes = _cache_bytes(config, device, weight_bytes + adapter_bytes, memory_bytes)
        max_positions = model.spec.max_position_embeddings
        state_bytes = state_shape(model.spec, SINGLE).row_bytes(dtype)
        sizes = (cache_bytes, block_bytes, state_bytes)
        limits, problem = _capacity(config, device, max_positions, sizes, caches)
        return cls(
            num_parameters=sum(weight.numel() for weight in plain.parameters()),
            weight_bytes=weight_bytes,
            dtype=str(dtype).removeprefix("torch."),
            kv_bytes_per_token=len(caches) * block_bytes // config.block_size,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or device.max_num_batched_tokens,
            block_size=config.block_size,
            num_blocks=limits.num_blocks,
            caches=caches,
            state_bytes=state_bytes,
            adapter_bytes=adapter_bytes,
            num_ranks=config.num_ranks,
            problem=problem,
        )

    @property
    def kv_tokens(self) -> int:
        """Number of tokens that the KV cache holds if no window has passed a token; 0 for an encoder."""
        if not self.caches:
            return 0
        return self.num_blocks // len(self.caches) * self.block_size

    def num_running(self, num_tokens: float) -> int:
        """Returns how many sequences of a given length can run at once, limited by the KV cache and `max_num_seqs`.

        Args:
            num_tokens: Number of tokens of prompt and output of each sequence.
        """
        length = max(1, int(num_tokens))
        if not self.caches:
            return min(self.max_num_seqs, max(1, self.max_num_batched_tokens // length))
        num_held = max_held_blocks(self.caches, length, self.block_size, self.max_num_batched_tokens)
        return min(self.max_num_seqs, self.num_blocks // num_held)


def _dtype(config: EngineConfig, device: Device, hf_config: Any, *, is_elsewhere: bool) -> torch.dtype:
    """Returns the number type of the weights. "auto" is the checkpoint's type if the engine runs on another machine."""
    if is_elsewhere and config.dtype == "auto" and hf_config.dtype is not None:
        return hf_config.dtype
    return device.resolve_dtype(config.dtype, hf_config.dtype)


def _stored_forms(config: EngineConfig, hf_config: Any, dtype: torch.dtype, device: Device) -> StoredForms | None:
    """Returns how the matrices of a quantised checkpoint are stored, by the config if its weights are not there."""
    place = locate_model(config.model, config.hub, with_weights=False)
    if place.is_local and has_weights(place):
        return read_stored_forms(place, weight_map(place, hf_config, dtype), hf_config, config.quantization, device)
    return plan_stored_forms(hf_config, config.quantization, device)


def _adapter_bytes(config: EngineConfig, hf_config: Any, dtype: torch.dtype, options: ModelOptions) -> int:
    """Returns the bytes of the adapter slots on all ranks, of which the first stands for the others."""
    first = ParallelContext.of_rank(0, config.tensor_parallel_size, config.pipeline_parallel_size)
    return lora_bytes(hf_config, dtype, options, first) * config.num_ranks


def _cache_bytes(config: EngineConfig, device: Device, weight_bytes: int, memory_bytes: int | None) -> int:
    """Returns the bytes left for the KV cache on all ranks; on GPUs those of weights and adapters are subtracted."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes * config.num_ranks
    share = config.gpu_memory_utilization
    if memory_bytes is not None:
        return int(memory_bytes * share) * config.num_ranks - weight_bytes
    if device.is_cpu:
        return device.free_memory_bytes(share)
    return device.free_memory_bytes(share) * config.num_ranks - weight_bytes


def _capacity(
    config: EngineConfig,
    device: Device,
    max_positions: int,
    sizes: tuple[int, int, int],
    caches: tuple[LayerCache, ...],
) -> tuple[Capacity, str | None]:
    """Returns the limits, with 0 blocks for an engine that would not start, and why it would not (None if it would).

    The sizes are the bytes for the KV cache and the states, of a block, and of the states of a sequence.
    """
    cache_bytes, block_bytes, row_bytes = sizes
    nothing = Capacity(choose_max_model_len(config, max_positions), 0, most_num_seqs(config, device))
    if cache_bytes < 1:
        missing = f"{-cache_bytes / 2**20:,.0f} MiB more than there is memory for them"
        if config.enable_lora:
            return nothing, f"the weights and the adapter slots take {missing}; lower max_loras or max_lora_rank"
        return nothing, f"the weights take {missing}"
    try:
        room = replace(config, kv_cache_memory_bytes=cache_bytes)
        return plan_capacity(room, device, max_positions, block_bytes, Reserve(row_bytes=row_bytes), caches), None
    except ConfigError as error:
        return nothing, str(error)

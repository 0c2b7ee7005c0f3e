"""How much an engine can hold: the length limit, the KV cache blocks, the token budget of a step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .config import EngineConfig
from .device import Device
from .errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limits of one engine.

    Attributes:
        max_model_len: Most tokens of prompt and output together.
        num_blocks: KV cache blocks.
        max_num_batched_tokens: Most tokens of one step.
    """

    max_model_len: int
    num_blocks: int
    max_num_batched_tokens: int


def plan_capacity(config: EngineConfig, device: Device, max_positions: int, block_bytes: int) -> Capacity:
    """Settles the limits that depend on the model and on the memory.

    Args:
        config: What was asked for.
        device: Where the cache will be.
        max_positions: Longest sequence the model was made for.
        block_bytes: Bytes of one KV cache block.

    Returns:
        The limits.

    Raises:
        ConfigError: max_model_len is more than the model or the cache can hold.
    """
    max_model_len = config.max_model_len or max_positions
    if max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the {max_positions} positions the model was made for; "
            f"use at most {max_positions}"
        )
    num_blocks = _num_blocks(config, device, max_model_len, block_bytes)
    num_cache_tokens = num_blocks * config.block_size
    if num_cache_tokens < max_model_len:
        if config.max_model_len is not None:
            raise ConfigError(
                f"max_model_len={max_model_len} does not fit the KV cache, which holds {num_cache_tokens} tokens "
                f"({num_blocks} blocks of {config.block_size}); lower max_model_len or give the cache more memory"
            )
        logger.warning(
            "max_model_len is lowered from %d to %d, which the KV cache holds", max_model_len, num_cache_tokens
        )
        max_model_len = num_cache_tokens
    return Capacity(max_model_len, num_blocks, config.max_num_batched_tokens or device.max_num_batched_tokens)


def _num_blocks(config: EngineConfig, device: Device, max_model_len: int, block_bytes: int) -> int:
    """Takes the number asked for, else what memory allows, but no more than can ever be in use."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    most_useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        memory_bytes = config.kv_cache_memory_bytes
    else:
        memory_bytes = device.free_memory_bytes(config.gpu_memory_utilization)
    num_blocks = min(most_useful, memory_bytes // block_bytes)
    if num_blocks < 1:
        raise ConfigError(
            f"there is no room for a KV cache: {memory_bytes} bytes are left and one block takes {block_bytes}; "
            "raise kv_cache_memory_bytes or gpu_memory_utilization, or use a smaller model"
        )
    return num_blocks

"""`plan_capacity`: chooses the length limit and the number of KV cache blocks of an engine."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import DEFAULT_MAX_NUM_SEQS, LARGE_MAX_NUM_SEQS, EngineConfig
from ..device import Device
from ..errors import ConfigError
from ..kv_cache.groups import LayerCache, max_held_blocks
from ..models.spec import DecoderSpec

logger = logging.getLogger(__name__)

GRAPH_BYTES = 32 << 20
"""Assumed bytes of one recorded decode step: memory of the driver, and its share of the common memory pool."""

SIZES = (DEFAULT_MAX_NUM_SEQS, 384, 512, 768, LARGE_MAX_NUM_SEQS)
"""Values of `max_num_seqs` that are chosen where it is not set."""

USUAL_LENGTH = 1024
"""Number of tokens of a sequence of usual length. With more running sequences than the KV cache holds of it, sequences
would be preempted; with fewer, memory would stay empty."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limits of one engine that depend on the model and on the memory.

    Attributes:
        max_model_len: Most tokens of prompt and output together.
        num_blocks: Number of KV cache blocks.
        max_num_seqs: Most sequences running at once.
    """

    max_model_len: int
    num_blocks: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """GPU memory that is not in use yet, but must not be given to the KV cache.

    Attributes:
        step_bytes: Largest temporary memory of a step.
        graph_bytes: Memory of all recorded decode steps.
        row_bytes: Memory of the states of one running sequence, in models whose layers keep any.
    """

    step_bytes: int = 0
    graph_bytes: int = 0
    row_bytes: int = 0


NOTHING = Reserve()

ENCODER_TOKENS = 4096
"""Least default of the most tokens in a step of an encoder: larger steps were not faster for each token on a CPU."""

NO_CACHE = 1
"""Number of KV cache blocks of an encoder. No layer writes to the block, and no sequence holds it."""


def fit_to_model(config: EngineConfig, device: Device, spec: DecoderSpec) -> EngineConfig:
    """Returns the settings of an engine with what its model cannot do turned off or raised.

    States are of whole sequences, so models with states cache no prefixes. An encoder computes a text in one step, so
    its steps have room for the longest text.
    """
    if config.enable_prefix_caching and spec.state is not None:
        logger.warning("prefix caching is off: layers of this model keep states, and only of whole sequences")
        return replace(config, enable_prefix_caching=False)
    if not spec.is_encoder:
        return config
    max_model_len = choose_max_model_len(config, spec.max_position_embeddings)
    num_tokens = config.max_num_batched_tokens or max(device.max_num_batched_tokens, ENCODER_TOKENS)
    if num_tokens < max_model_len and config.max_num_batched_tokens is not None:
        logger.warning(
            "max_num_batched_tokens is raised from %d to %d: an encoder computes a text in one step, and max_model_len "
            "allows texts of that length",
            num_tokens,
            max_model_len,
        )
    return replace(config, enable_prefix_caching=False, max_num_batched_tokens=max(num_tokens, max_model_len))


def plan_capacity(
    config: EngineConfig,
    device: Device,
    max_positions: int,
    block_bytes: int,
    reserve: Reserve = NOTHING,
    caches: Sequence[LayerCache] = (LayerCache(),),
) -> Capacity:
    """Chooses the limits that depend on the model and on the memory.

    If `max_model_len` is not set, it is lowered to the longest sequence that the cache can hold.

    Args:
        config: Settings of the engine.
        device: Device of the KV cache.
        max_positions: Number of positions for which the model was made.
        block_bytes: Bytes of one KV cache block.
        reserve: Memory that must not be given to the KV cache.
        caches: The `LayerCache` of each group of layers; none for an encoder, which needs no KV cache.

    Returns:
        The limits.

    Raises:
        ConfigError: `max_model_len` is more than the model or the cache can hold, or there is no room for a cache.
    """
    max_model_len = choose_max_model_len(config, max_positions)
    if not caches:
        return Capacity(max_model_len, NO_CACHE, most_num_seqs(config, device))
    num_rows = _num_rows(config, device, max_model_len, block_bytes, reserve, caches)
    num_blocks = _num_blocks(config, device, max_model_len, block_bytes, reserve, len(caches), num_rows)
    num_cache_tokens = _longest(config, device, max_model_len, num_blocks, caches)
    if num_cache_tokens < max_model_len:
        if config.max_model_len is not None:
            raise ConfigError(
                f"max_model_len={max_model_len} does not fit the KV cache, which holds {num_cache_tokens} tokens of a "
                f"sequence ({num_blocks} blocks of {config.block_size}{_shared_by(caches)}); lower max_model_len or "
                "give the cache more memory"
            )
        logger.warning(
            "max_model_len is lowered from %d to %d, which the KV cache holds", max_model_len, num_cache_tokens
        )
        max_model_len = num_cache_tokens
    max_num_seqs = _max_num_seqs(config, device, max_model_len, num_blocks, caches)
    return Capacity(max_model_len, num_blocks, min(num_rows, max_num_seqs))


def most_num_seqs(config: EngineConfig, device: Device) -> int:
    """Returns `max_num_seqs` if it is set, else the most that can be chosen once the size of the KV cache is known."""
    return config.max_num_seqs or (LARGE_MAX_NUM_SEQS if device.is_large else DEFAULT_MAX_NUM_SEQS)


def _num_rows(
    config: EngineConfig,
    device: Device,
    max_model_len: int,
    block_bytes: int,
    reserve: Reserve,
    caches: Sequence[LayerCache],
) -> int:
    """Returns the most running sequences: those whose states fit beside their blocks at a usual length, if not set."""
    most = most_num_seqs(config, device)
    if config.max_num_seqs is not None or not reserve.row_bytes:
        return most
    max_step_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    length = min(max_model_len, USUAL_LENGTH)
    num_held = max_held_blocks(caches, length, config.block_size, max_step_tokens)
    num_fitting = _cache_memory(config, device, reserve)[0] // (reserve.row_bytes + num_held * block_bytes)
    return max(1, min(most, num_fitting))


def _max_num_seqs(
    config: EngineConfig, device: Device, max_model_len: int, num_blocks: int, caches: Sequence[LayerCache]
) -> int:
    """Returns `max_num_seqs` if it is set, else the most that the device suits and the pool holds at a usual length."""
    if config.max_num_seqs is not None:
        return config.max_num_seqs
    max_step_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    length = min(max_model_len, USUAL_LENGTH)
    num_held = num_blocks // max_held_blocks(caches, length, config.block_size, max_step_tokens)
    limit = min(most_num_seqs(config, device), num_held, max_step_tokens)
    chosen = max((size for size in SIZES if size <= limit), default=SIZES[0])
    logger.info("max_num_seqs is %d: the KV cache holds %d sequences of %d tokens", chosen, num_held, length)
    return chosen


def _longest(
    config: EngineConfig, device: Device, max_model_len: int, num_blocks: int, caches: Sequence[LayerCache]
) -> int:
    """Returns the length of the longest sequence, up to `max_model_len`, that fits into the pool alone."""
    max_step_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    lengths = range(max_model_len + 1)
    return (
        bisect_right(
            lengths, num_blocks, key=lambda length: max_held_blocks(caches, length, config.block_size, max_step_tokens)
        )
        - 1
    )


def _shared_by(caches: Sequence[LayerCache]) -> str:
    return "" if len(caches) == 1 else f", shared by {len(caches)} groups of layers"


def choose_max_model_len(config: EngineConfig, max_positions: int) -> int:
    """Returns the `max_model_len` of the settings, or the model's number of positions if it is not set.

    Raises:
        ConfigError: `max_model_len` is more than the model's number of positions.
    """
    max_model_len = config.max_model_len or max_positions
    if max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the {max_positions} positions the model was made for; "
            f"use at most {max_positions}"
        )
    return max_model_len


def _num_blocks(
    config: EngineConfig,
    device: Device,
    max_model_len: int,
    block_bytes: int,
    reserve: Reserve,
    num_groups: int,
    num_rows: int,
) -> int:
    """Returns `num_gpu_blocks_override` if it is set, else as many blocks as fit and the sequences can use."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    # Blocks that a window has passed count as well: other sequences can find their content.
    most_useful = most_num_seqs(config, device) * num_groups * -(-max_model_len // config.block_size)
    memory_bytes, account = _cache_memory(config, device, reserve)
    state_bytes = num_rows * reserve.row_bytes
    if state_bytes:
        account += f"; the states of {num_rows} sequences take {_mib(state_bytes)} of it (max_num_seqs says how many)"
    num_blocks = min(most_useful, (memory_bytes - state_bytes) // block_bytes)
    if num_blocks < num_groups:
        raise ConfigError(
            f"there is no room for a KV cache, of which a token needs {block_bytes * num_groups} bytes "
            f"({num_groups} blocks): {account}; raise "
            "kv_cache_memory_bytes or gpu_memory_utilization, lower max_num_batched_tokens, or use a smaller model"
        )
    logger.info("the KV cache has %d blocks of %d tokens; %s", num_blocks, config.block_size, account)
    return num_blocks


def _cache_memory(config: EngineConfig, device: Device, reserve: Reserve) -> tuple[int, str]:
    """Returns the bytes that the KV cache may take, and a text for messages that explains this number."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, f"kv_cache_memory_bytes is {config.kv_cache_memory_bytes}"
    memory_bytes = device.free_memory_bytes(config.gpu_memory_utilization) - reserve.step_bytes - reserve.graph_bytes
    if device.is_cpu:
        return memory_bytes, f"{_mib(memory_bytes)} of the host's memory are for it"
    return memory_bytes, (
        f"{_mib(memory_bytes)} are left at gpu_memory_utilization={config.gpu_memory_utilization}, with "
        f"{_mib(device.used_memory_bytes())} in use (weights and whatever else is there), "
        f"{_mib(reserve.step_bytes)} for a step and {_mib(reserve.graph_bytes)} for recorded steps"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"

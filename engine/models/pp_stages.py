"""How a model is cut for several ranks: `stage_layers` of each pp stage, their caches, and the check of sizes."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import ConfigError
from ..kv_cache.groups import LayerCache, LayerGroup, cut_into_groups
from ..parallel.context import ParallelContext
from .spec import DecoderSpec

__all__ = ["cache_groups", "cache_pairs", "check_parallel", "kv_cache_sizes", "stage_layers"]


def stage_layers(spec: DecoderSpec, pp_size: int) -> list[range]:
    """Divides a model's layers among pp stages that take about the same time.

    The time of a layer is taken to be its number of weights, which a decode step reads and a prefill multiplies by. The
    last pp stage also has the head. All layers cost the same. Each pp stage starts with one layer, and every further
    layer goes to the pp stage with the lowest cost so far.

    Args:
        spec: The model.
        pp_size: Number of pp stages, at most the number of layers.

    Returns:
        The layers of each pp stage, at least one, in consecutive ranges.
    """
    if pp_size == 1:
        return [range(spec.num_layers)]
    costs = [0] * pp_size
    costs[-1] = spec.vocab_size * spec.embedding_size
    counts = [1] * pp_size
    layer_cost = _layer_cost(spec)
    for _ in range(spec.num_layers - pp_size):
        cheapest = min(range(pp_size), key=lambda stage: costs[stage] + counts[stage] * layer_cost)
        counts[cheapest] += 1
    ends = [sum(counts[: stage + 1]) for stage in range(pp_size)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def cache_groups(spec: DecoderSpec) -> tuple[LayerGroup, ...]:
    """Returns the groups of layers that share a block table, for the whole model and not only for one pp stage."""
    return cut_into_groups([LayerCache(window) for window in spec.windows])


def cache_pairs(spec: DecoderSpec, layers: Collection[int]) -> dict[int, int]:
    """Returns the index of the pair of cache tensors that each layer of a pp stage uses, by number of the layer.

    Args:
        spec: The model.
        layers: Numbers of the layers of the pp stage. In each group, the j-th of these layers uses pair j.
    """
    pairs: dict[int, int] = {}
    for group in cache_groups(spec):
        pairs.update((layer, pair) for pair, layer in enumerate(i for i in group.layers if i in layers))
    return dict(sorted(pairs.items()))


def kv_cache_sizes(spec: DecoderSpec, parallel: ParallelContext) -> tuple[int, int, int]:
    """Returns a rank's number of pairs of cache tensors, its number of key and value heads, and the size of a head."""
    pairs = cache_pairs(spec, stage_layers(spec, parallel.pp_size)[parallel.pp_rank])
    return max(pairs.values()) + 1, parallel.kv_shard(spec.num_kv_heads).length, spec.head_dim


def _layer_cost(spec: DecoderSpec) -> int:
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return spec.hidden_size * (attention + (3 if spec.gated_mlp else 2) * spec.intermediate_size)


def check_parallel(spec: DecoderSpec, tp_size: int, pp_size: int) -> None:
    """Checks that a model can be divided among `tp_size * pp_size` ranks.

    Raises:
        ConfigError: One of the two sizes does not fit the model; the message names the setting and the possible values.
    """
    kv = spec.num_kv_heads
    possible = [
        size
        for size in range(1, spec.num_heads + 1)
        if spec.num_heads % size == spec.intermediate_size % size == 0 and (kv % size == 0 or size % kv == 0)
    ]
    if tp_size not in possible:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} cannot share out this model: it must divide num_attention_heads="
            f"{spec.num_heads} and intermediate_size={spec.intermediate_size}, and divide or be a multiple of "
            f"num_key_value_heads={kv}; use one of {', '.join(map(str, possible))}"
        )
    if pp_size > spec.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={pp_size} is more than the model's {spec.num_layers} layers, of which every stage "
            f"needs one; use at most {spec.num_layers}"
        )

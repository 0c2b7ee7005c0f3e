"""How a model is cut for several ranks: `stage_layers` of each pp stage, their caches, and the check of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from ..errors import ConfigError
from ..kv_cache.groups import LayerCache, LayerGroup, cut_into_groups
from ..kv_cache.layout import CacheShape
from ..parallel.context import ParallelContext
from .spec import DecoderSpec

__all__ = ["cache_groups", "cache_pairs", "cache_shape", "check_parallel", "stage_layers"]


def stage_layers(spec: DecoderSpec, pp_size: int) -> list[range]:
    """Divides a model's layers among pp stages that take about the same time and memory.

    The cost of a layer is its number of weights. A prefill multiplies by them, and a decode step reads them: those of
    all experts too, because the tokens of a large batch go to most of them. The last pp stage also has the head. Of
    all divisions, the chosen one has the smallest sum of the squares of the costs.

    Args:
        spec: The model.
        pp_size: Number of pp stages, at most the number of layers.

    Returns:
        The layers of each pp stage, at least one, in consecutive ranges.
    """
    num_layers = spec.num_layers
    before = [0, *itertools.accumulate(_layer_cost(spec, layer) for layer in range(num_layers))]
    # For each number of first layers: the least sum of squares for the pp stages so far, and the ends of these.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(pp_size):
        left = pp_size - 1 - stage
        head = 0 if left else spec.vocab_size * spec.embedding_size
        best = {
            end: min(
                (total + (before[end] - before[start] + head) ** 2, (*ends, -end))
                for start, (total, ends) in best.items()
                if start < end
            )
            for end in ([num_layers] if left == 0 else range(stage + 1, num_layers - left + 1))
        }
    ends = [0, *(-end for end in best[num_layers][1])]  # They are negative so that `min` prefers long first stages.
    return [range(start, end) for start, end in itertools.pairwise(ends)]


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


def cache_shape(spec: DecoderSpec, parallel: ParallelContext) -> CacheShape:
    """Returns what a rank stores of each token, in its layers and for its heads."""
    pairs = cache_pairs(spec, stage_layers(spec, parallel.pp_size)[parallel.pp_rank])
    num_pairs, latent = max(pairs.values()) + 1, spec.latent
    if latent is not None:
        return CacheShape(num_pairs, 1, latent.rank + latent.rope_dim, latent.rank)
    return CacheShape(num_pairs, parallel.kv_shard(spec.num_kv_heads).length, spec.head_dim)


def _layer_cost(spec: DecoderSpec, layer: int) -> int:
    attention = spec.hidden_size * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if spec.latent is not None:
        attention = spec.latent.num_weights(spec.hidden_size, spec.num_heads)
    inner = spec.intermediate_size
    if spec.experts is not None and layer in spec.experts.layers:
        inner = spec.experts.router.num_experts * spec.experts.intermediate_size + spec.experts.shared_size
    return attention + spec.hidden_size * (3 if spec.gated_mlp else 2) * inner


def check_parallel(spec: DecoderSpec, tp_size: int, pp_size: int, *, expert_parallel: bool = False) -> None:
    """Checks that a model can be divided among `tp_size * pp_size` ranks.

    Raises:
        ConfigError: One of the settings does not fit the model; the message names it and the possible values.
    """
    if expert_parallel and spec.experts is None:
        raise ConfigError("enable_expert_parallel=True is for models with experts, and this model has none; drop it")
    kv, sizes = spec.num_kv_heads, _divided_sizes(spec, expert_parallel=expert_parallel)
    possible = [
        size
        for size in range(1, spec.num_heads + 1)
        if not any(length % size for length in sizes.values()) and (kv % size == 0 or size % kv == 0)
    ]
    if tp_size not in possible:
        *most, last = (f"{name}={length}" for name, length in sizes.items())
        raise ConfigError(
            f"tensor_parallel_size={tp_size} cannot share out this model: it must divide {', '.join(most)} and {last}, "
            f"and divide or be a multiple of num_key_value_heads={kv}; use one of {', '.join(map(str, possible))}"
        )
    if pp_size > spec.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={pp_size} is more than the model's {spec.num_layers} layers, of which every stage "
            f"needs one; use at most {spec.num_layers}"
        )


def _divided_sizes(spec: DecoderSpec, *, expert_parallel: bool) -> dict[str, int]:
    """Returns the sizes that the ranks of a pp stage divide evenly, by the usual names of their config fields."""
    sizes, experts = {"num_attention_heads": spec.num_heads}, spec.experts
    if experts is None or len(experts.layers) < spec.num_layers:
        sizes["intermediate_size"] = spec.intermediate_size
    if experts is not None:
        whole = {"num_experts": experts.router.num_experts}
        sizes |= whole if expert_parallel else {"moe_intermediate_size": experts.intermediate_size}
        sizes |= {"shared_expert_intermediate_size": experts.shared_size} if experts.shared_size else {}
    return sizes

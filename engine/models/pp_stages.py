"""How a model is cut for several ranks: `stage_layers` of each pp stage, their caches, and the check of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

from ..errors import ConfigError
from ..kv_cache.groups import LayerCache, LayerGroup, cut_into_groups
from ..kv_cache.layout import CacheShape
from ..kv_cache.states import StateShape
from ..parallel.context import ParallelContext
from .spec import DecoderSpec

__all__ = ["cache_groups", "cache_pairs", "cache_shape", "check_parallel", "stage_layers", "state_shape"]


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
    """Returns the groups of layers that share a block table, for the whole model and not only for one pp stage.

    An encoder has no groups: its layers keep nothing.
    """
    if spec.is_encoder:
        return ()
    layers = spec.attention_layers
    groups = cut_into_groups([LayerCache(spec.windows[layer]) for layer in layers])
    return tuple(replace(group, layers=tuple(layers[i] for i in group.layers)) for group in groups)


def cache_pairs(spec: DecoderSpec, layers: Collection[int]) -> dict[int, int]:
    """Returns the index of the pair of cache tensors that each layer of a pp stage uses, by number of the layer.

    Args:
        spec: The model.
        layers: Numbers of the layers of the pp stage. In each group, the j-th of these layers uses pair j. The pairs of
            states, one for each layer that keeps any, follow those of keys and values. A layer that keeps nothing is
            handed the first pair, which it does not read.
    """
    pairs = {layer: 0 for layer in layers if spec.is_encoder or not spec.has_mixer(layer)}
    for group in cache_groups(spec):
        pairs.update((layer, pair) for pair, layer in enumerate(i for i in group.layers if i in layers))
    first = _num_pairs(spec, layers)
    pairs.update((layer, first + i) for i, layer in enumerate(_state_layers(spec, layers)))
    return dict(sorted(pairs.items()))


def cache_shape(spec: DecoderSpec, parallel: ParallelContext) -> CacheShape:
    """Returns what a rank stores of each token, in its layers and for its heads."""
    num_pairs, latent = _num_pairs(spec, stage_layers(spec, parallel.pp_size)[parallel.pp_rank]), spec.latent
    if latent is not None:
        return CacheShape(num_pairs, 1, latent.rank + latent.rope_dim, latent.rank)
    return CacheShape(num_pairs, parallel.kv_shard(spec.num_kv_heads).length, spec.head_dim)


def state_shape(spec: DecoderSpec, parallel: ParallelContext) -> StateShape:
    """Returns the states that a rank keeps of each running sequence, in its layers and for its heads."""
    state = spec.state
    if state is None:
        return StateShape()
    heads, groups = parallel.shard(state.num_heads).length, parallel.kv_shard(state.num_groups).length
    return StateShape(
        len(_state_layers(spec, stage_layers(spec, parallel.pp_size)[parallel.pp_rank])),
        (state.conv_width - 1, heads * state.head_dim + 2 * groups * state.state_size),
        (heads, state.head_dim, state.state_size),
    )


def _num_pairs(spec: DecoderSpec, layers: Collection[int]) -> int:
    """Returns the number of pairs of keys and values in a pp stage: one at least, so that a block has a size."""
    return max([1, *(sum(layer in layers for layer in group.layers) for group in cache_groups(spec))])


def _state_layers(spec: DecoderSpec, layers: Collection[int]) -> list[int]:
    return [] if spec.state is None else [layer for layer in sorted(layers) if layer in spec.state.layers]


def _layer_cost(spec: DecoderSpec, layer: int) -> int:
    mixer = _mixer_cost(spec, layer) if spec.has_mixer(layer) else 0
    return mixer + (_mlp_cost(spec, layer) if spec.has_mlp(layer) else 0)


def _mixer_cost(spec: DecoderSpec, layer: int) -> int:
    mixer = spec.hidden_size * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if spec.latent is not None:
        mixer = spec.latent.num_weights(spec.hidden_size, spec.num_heads)
    if spec.state is not None and layer in spec.state.layers:
        widths = 3 * spec.state.num_heads * spec.state.head_dim + 2 * spec.state.num_groups * spec.state.state_size
        mixer = spec.hidden_size * widths
    return mixer


def _mlp_cost(spec: DecoderSpec, layer: int) -> int:
    inner = spec.intermediate_size
    if spec.experts is not None and layer in spec.experts.layers:
        inner = spec.experts.router.num_experts * spec.experts.intermediate_size + spec.experts.shared_size
    return spec.hidden_size * (3 if spec.gated_mlp else 2) * inner


def check_parallel(spec: DecoderSpec, tp_size: int, pp_size: int, *, expert_parallel: bool = False) -> None:
    """Checks that a model can be divided among `tp_size * pp_size` ranks.

    Raises:
        ConfigError: One of the settings does not fit the model; the message names it and the possible values.
    """
    if expert_parallel and spec.experts is None:
        raise ConfigError("enable_expert_parallel=True is for models with experts, and this model has none; drop it")
    sizes, shared = _divided_sizes(spec, expert_parallel=expert_parallel), {"num_key_value_heads": spec.num_kv_heads}
    if spec.state is not None:
        shared["the number of groups"] = spec.state.num_groups
    possible = [
        size
        for size in range(1, spec.num_heads + 1)
        if not any(length % size for length in sizes.values())
        and all(count % size == 0 or size % count == 0 for count in shared.values())
    ]
    if tp_size not in possible:
        *most, last = (f"{name}={length}" for name, length in sizes.items())
        raise ConfigError(
            f"tensor_parallel_size={tp_size} cannot share out this model: it must divide {', '.join(most)} and {last}, "
            f"and divide or be a multiple of {' and '.join(f'{name}={count}' for name, count in shared.items())}; use "
            f"one of {', '.join(map(str, possible))}"
        )
    if pp_size > spec.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={pp_size} is more than the model's {spec.num_layers} layers, of which every stage "
            f"needs one; use at most {spec.num_layers}"
        )


def _divided_sizes(spec: DecoderSpec, *, expert_parallel: bool) -> dict[str, int]:
    """Returns the sizes that the ranks of a pp stage divide evenly, by the usual names of their config fields."""
    sizes, experts = {"num_attention_heads": spec.num_heads}, spec.experts
    if spec.dense_layers:
        sizes["intermediate_size"] = spec.intermediate_size
    if spec.state is not None:
        sizes["the number of heads with states"] = spec.state.num_heads
    if experts is not None:
        whole = {"num_experts": experts.router.num_experts}
        sizes |= whole if expert_parallel else {"moe_intermediate_size": experts.intermediate_size}
        sizes |= {"shared_expert_intermediate_size": experts.shared_size} if experts.shared_size else {}
    return sizes

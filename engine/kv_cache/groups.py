"""`LayerGroup`: the layers that keep the same keys and values of a sequence (`LayerCache`) and share a block table.

Layer j of every group uses pair j of the cache tensors. A block is therefore memory for the layers of one group, and
all groups take their blocks from one pool. Six layers with full attention (F) or a window (W) make three groups:

    layer    0 F    1 W    2 W    3 F    4 W    5 W
    group    0      1      2      0      1      2
    pair     0      0      0      1      1      1
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_GROUPS = 8
"""Most groups into which a model is cut to save memory. Each group costs time on the host and the device in a step."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The tokens of a sequence whose keys and values a layer keeps: all tokens, or the latest ones (a window).

    Attributes:
        window: Number of latest tokens whose keys and values a token reads, its own included; 0 for all tokens.
    """

    window: int = 0

    def first_block(self, position: int, block_size: int) -> int:
        """Returns the index of the first block that the token at `position` or any later token reads."""
        return max(0, position - self.window + 1) // block_size if self.window else 0

    def max_blocks(self, num_tokens: int, block_size: int, max_step_tokens: int) -> int:
        """Returns the most blocks that a sequence holds at once in a group of layers with this window.

        Args:
            num_tokens: Length of the sequence.
            block_size: Tokens per block.
            max_step_tokens: Most tokens that a step computes.
        """
        num_blocks = -(-num_tokens // block_size)
        if not self.window:
            return num_blocks
        num_in_use = self.window - 1 + max_step_tokens  # The first of these tokens can be the last token of a block.
        return min(num_blocks, -(-(num_in_use - 1) // block_size) + 1)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the keys and values of the same tokens of a sequence.

    Attributes:
        cache: The `LayerCache` of each of these layers.
        layers: Numbers of the layers in the model, ascending.
    """

    cache: LayerCache
    layers: tuple[int, ...]


def cut_into_groups(caches: Sequence[LayerCache]) -> tuple[LayerGroup, ...]:
    """Cuts the layers of a model into groups that have the same `LayerCache` and nearly the same number of layers.

    A group with fewer layers than the largest one leaves memory of its blocks unused. Among the group sizes that make
    at most `MAX_GROUPS` groups (more if the model has more kinds of `LayerCache`), the function takes the one that
    leaves the least memory unused; of several equally good sizes, it takes the largest. Layers with the same
    `LayerCache` are dealt to their groups in turn, so that every pp stage has a share of each group.

    Args:
        caches: The `LayerCache` of each layer of the model.

    Returns:
        The groups; every layer is in one of them.
    """
    layers_of: dict[LayerCache, list[int]] = {}
    for layer, cache in enumerate(caches):
        layers_of.setdefault(cache, []).append(layer)
    size = _group_size([len(layers) for layers in layers_of.values()])
    groups: list[LayerGroup] = []
    for cache, layers in layers_of.items():
        num_groups = -(-len(layers) // size)
        groups += [LayerGroup(cache, tuple(layers[first::num_groups])) for first in range(num_groups)]
    return tuple(groups)


def max_held_blocks(caches: Iterable[LayerCache], num_tokens: int, block_size: int, max_step_tokens: int) -> int:
    """Returns the most blocks that a sequence holds at once in all groups.

    Args:
        caches: The `LayerCache` of each group.
        num_tokens: Length of the sequence.
        block_size: Tokens per block.
        max_step_tokens: Most tokens that a step computes.
    """
    return sum(cache.max_blocks(num_tokens, block_size, max_step_tokens) for cache in caches)


def _group_size(counts: Sequence[int]) -> int:
    """Returns the number of layers per group, given the number of layers that each distinct `LayerCache` has."""

    def num_groups(size: int) -> int:
        return sum(-(-count // size) for count in counts)

    max_groups = max(MAX_GROUPS, len(counts))
    sizes = [size for size in range(1, max(counts) + 1) if num_groups(size) <= max_groups]
    return min(sizes, key=lambda size: (num_groups(size) * size, -size))

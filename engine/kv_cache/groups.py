"""What a layer keeps of a sequence, and the groups of layers that keep the same.

The layers of a group share a block table. Layer j of every group uses pair j of the cache tensors, so a block id names
the memory of one group's layers, and all groups take their ids from one pool. Of six layers with full attention (F) or
a window (W):

    layer    0 F    1 W    2 W    3 F    4 W    5 W
    group    0      1      2      0      1      2
    pair     0      0      0      1      1      1
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_GROUPS = 8
"""Most groups that a model is cut into to save memory: every group costs the host and the device time in each step."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What a layer keeps of a sequence: keys and values of its tokens.

    Attributes:
        window: Number of latest tokens whose keys and values a token reads, its own included; 0 for all tokens.
    """

    window: int = 0

    def first_block(self, position: int, block_size: int) -> int:
        """Returns the index of the first block that a token at `position`, or after it, reads."""
        return max(0, position - self.window + 1) // block_size if self.window else 0

    def max_blocks(self, num_tokens: int, block_size: int, max_step_tokens: int) -> int:
        """Returns the most blocks that a sequence holds at once.

        Args:
            num_tokens: Length of the sequence.
            block_size: Tokens per block.
            max_step_tokens: Most tokens that a step computes.
        """
        num_blocks = -(-num_tokens // block_size)
        if not self.window:
            return num_blocks
        num_in_use = self.window - 1 + max_step_tokens  # The first token of these can be the last one of a block.
        return min(num_blocks, -(-(num_in_use - 1) // block_size) + 1)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the same of a sequence.

    Attributes:
        cache: What each of them keeps.
        layers: Their numbers in the model, ascending.
    """

    cache: LayerCache
    layers: tuple[int, ...]


def cut_into_groups(caches: Sequence[LayerCache]) -> tuple[LayerGroup, ...]:
    """Cuts the layers of a model into groups of nearly the same size.

    A group with fewer layers than the largest one leaves memory of its blocks unused. The size is the one that leaves
    the least unused, among sizes that make at most `MAX_GROUPS` groups; of several such sizes it is the largest. The
    layers of a kind are dealt to its groups in turn, so that every pipeline stage has its share of each group.

    Args:
        caches: What each layer keeps.
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
        caches: What the layers of each group keep.
        num_tokens: Length of the sequence.
        block_size: Tokens per block.
        max_step_tokens: Most tokens that a step computes.
    """
    return sum(cache.max_blocks(num_tokens, block_size, max_step_tokens) for cache in caches)


def _group_size(counts: Sequence[int]) -> int:
    """Chooses the layers of a group, given the number of layers of each kind."""

    def num_groups(size: int) -> int:
        return sum(-(-count // size) for count in counts)

    max_groups = max(MAX_GROUPS, len(counts))
    sizes = [size for size in range(1, max(counts) + 1) if num_groups(size) <= max_groups]
    return min(sizes, key=lambda size: (num_groups(size) * size, -size))

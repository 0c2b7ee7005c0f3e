"""Finds the blocks that all decoding sequences of a step have in common, so that attention can read them once.

Rows of a dataset often begin with the same instructions. The prefix cache lets such sequences hold the same blocks, and
then it is enough to look at block ids.
"""

from __future__ import annotations

from collections import abc
from itertools import takewhile

from ..sequence import Sequence

MIN_READS_SAVED = 16_384
"""Keys that must not be read again for a shared pass to pay: shared tokens x (sequences - 1).

A token takes 4 KiB a layer (8 heads of 128, bfloat16), so these take 16 µs at 4.3e12 B/s: about what two more kernels
cost.
"""


class SharedPrefix:
    """Remembers what the last step's sequences had in common: the next step's are nearly always the same.

    Args:
        block_size: Tokens per block.
        group: The group of layers whose blocks are compared, the only one with full attention; None where there is no
            such group: windows pass a prefix, and several groups may have different blocks in common.
    """

    def __init__(self, block_size: int, group: int | None = 0) -> None:
        self.block_size = block_size
        self._group = group
        self._requests: abc.Sequence[Sequence] = ()
        self._num_blocks = 0

    def find(self, sequences: abc.Sequence[Sequence], has_new: bool) -> int:
        """Returns how many leading blocks all sequences hold in common, before the token that each computes.

        Args:
            sequences: Those that compute one token in this step.
            has_new: Whether a sequence got its blocks in this step.

        Returns:
            The number of blocks; 0 if so few are shared that reading them once does not pay.
        """
        if self._group is None:
            return 0
        if has_new or sequences != self._requests:
            self._requests, self._num_blocks = sequences, _num_common([r.block_ids[self._group] for r in sequences])
        saved = self._num_blocks * self.block_size * (len(sequences) - 1)
        return self._num_blocks if saved >= MIN_READS_SAVED else 0


def _num_common(tables: abc.Sequence[list[int]]) -> int:
    """Counts the leading blocks that all block tables hold; the last block of each is being filled and is its own."""
    common = tables[0][:-1] if tables else []
    for table in tables:
        if table[: len(common)] != common:
            common = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], zip(common, table, strict=False))]
        if not common:
            break
    return len(common)

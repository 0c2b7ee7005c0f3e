"""`SharedPrefix`: counts the blocks that all decoding sequences of a step share, so that attention reads them once.

Rows of a dataset often begin with the same instructions. The prefix cache gives their sequences the same blocks, so
shared blocks are found by comparing block ids.
"""

from __future__ import annotations

from collections import abc
from itertools import takewhile

from ..sequence import Sequence

MIN_READS_SAVED = 32_768
"""Fewest reads of keys that a shared pass must save: shared tokens x (sequences - 1).

A token takes 4 KiB in a layer (8 heads of size 128, bfloat16), so this many reads take 31 µs at 4.3e12 B/s. A shared
pass of 256 sequences of 16 heads writes and reads 4 MiB for each of about five partial results, which takes 5 µs, and
its two additional kernels take about as long. This is an estimate, which no measurement on a GPU has confirmed yet.
"""


class SharedPrefix:
    """Counts the leading blocks that all decoding sequences of a step share.

    Block tables are compared only if the sequences differ from those of the step before, or one was just admitted.

    Args:
        block_size: Tokens per block.
        group: Index of the group of layers whose block tables are compared: the only group with full attention. None if
            the model has no such group or several, and then the count is always 0: layers with windows soon stop
            reading the first blocks, and several groups may share different numbers of blocks.
    """

    def __init__(self, block_size: int, group: int | None = 0) -> None:
        self.block_size = block_size
        self._group = group
        self._sequences: abc.Sequence[Sequence] = ()
        self._num_blocks = 0

    def find(self, sequences: abc.Sequence[Sequence], has_new: bool) -> int:
        """Returns the number of leading blocks that all sequences share, so that attention reads them once.

        Args:
            sequences: The sequences that compute one token in this step.
            has_new: Whether a sequence was admitted in this step, so that its blocks are new.

        Returns:
            The number of blocks; 0 if the shared blocks are so few that one common pass over them saves no time.
        """
        if self._group is None:
            return 0
        if has_new or sequences != self._sequences:
            self._sequences, self._num_blocks = sequences, _num_common([r.block_ids[self._group] for r in sequences])
        saved = self._num_blocks * self.block_size * (len(sequences) - 1)
        return self._num_blocks if saved >= MIN_READS_SAVED else 0


def _num_common(tables: abc.Sequence[list[int]]) -> int:
    """Counts the leading blocks that all block tables share; a table's last block is still filled and never shared."""
    common = tables[0][:-1] if tables else []
    for table in tables:
        if table[: len(common)] != common:
            common = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], zip(common, table, strict=False))]
        if not common:
            break
    return len(common)

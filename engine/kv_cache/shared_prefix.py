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
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
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
        if has_new or sequences != self._requests:
            self._requests, self._num_blocks = sequences, _num_common(sequences)
        saved = self._num_blocks * self.block_size * (len(sequences) - 1)
        return self._num_blocks if saved >= MIN_READS_SAVED else 0


def _num_common(sequences: abc.Sequence[Sequence]) -> int:
    """Counts the leading blocks that all sequences hold; the last block of each, which it fills, is its own."""
    common = sequences[0].block_ids[:-1] if sequences else []
    for sequence in sequences:
        if sequence.block_ids[: len(common)] != common:
            pairs = zip(common, sequence.block_ids, strict=False)
            common = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if not common:
            break
    return len(common)

"""Gives sequences their KV cache blocks, and finds prefixes that were computed before.

The content of a full block is named by the hash of its tokens and of all blocks before it, so equal names mean equal
prefixes. The chain of hashes of a sequence begins with its salt, so sequences of different salts share no block. Of a
sequence with `block_size` 4, 11 known tokens and 9 of them computed:

    tokens    [0, 4)       [4, 8)       [8, 9)                 [9, 11)
    block     0            1            2                      2
    content   published    published    not full: private      not computed
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from ..sequence import Sequence
from .blocks import BlockPool


class KVCacheManager:
    """Owns the block pool on behalf of sequences.

    Args:
        num_blocks: Blocks of the pool.
        block_size: Tokens per block.
        enable_prefix_caching: Whether equal prefixes share blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return self.pool.num_used / self.pool.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Returns the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def try_admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the blocks of its cached prefix, if all of its known tokens would fit.

        Asking for room for the whole sequence, not only for its first chunk, keeps a sequence from entering only to be
        preempted a step later.

        Args:
            sequence: A sequence without blocks. On success `block_ids` and `num_computed_tokens` cover the prefix
                that was found.

        Returns:
            Whether it was admitted; if not, nothing has changed.
        """
        prefix = self._find_prefix(sequence)
        num_missing = self.num_blocks_for(sequence.num_tokens) - len(prefix)
        num_free_in_prefix = sum(self.pool.is_free(block) for block in prefix)
        if num_missing > self.pool.num_free - num_free_in_prefix:
            return False
        self.pool.share(prefix)
        sequence.block_ids = prefix
        sequence.num_computed_tokens = len(prefix) * self.block_size
        return True

    def try_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes sure that a sequence has blocks for its first `num_tokens` tokens.

        Returns:
            Whether it has; if not, nothing has changed.
        """
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_ids)
        if num_missing > self.pool.num_free:
            return False
        if num_missing > 0:
            sequence.block_ids += self.pool.allocate(num_missing)
        return True

    def publish(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Lets others find the full blocks among the first `num_tokens` tokens.

        This is done when the blocks are scheduled, before they are computed: a sequence of the same step that shares
        them reads them after all keys and values of the step are stored. If the step fails, what it published must be
        forgotten.

        Returns:
            The blocks that were not published before.
        """
        first = sequence.num_published_blocks
        num_full = min(num_tokens, len(sequence.token_ids)) // self.block_size
        if not self.enable_prefix_caching or num_full <= first:
            return []
        hashes = self._hashes(sequence, num_full)
        blocks = sequence.block_ids[first:num_full]
        for block, block_hash in zip(blocks, hashes[first:], strict=True):
            self.pool.publish(block, block_hash)
        sequence.num_published_blocks = num_full
        return blocks

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks back; their content stays findable until they are needed."""
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0

    def reset(self) -> None:
        """Takes all blocks back from whoever holds them and forgets their content."""
        self.pool = BlockPool(self.pool.num_blocks)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Finds the longest run of cached blocks; never the whole sequence, whose last token must be computed."""
        if not self.enable_prefix_caching or not sequence.reads_prefix_cache:
            return []
        prefix: list[int] = []
        for block_hash in self._hashes(sequence, (sequence.num_tokens - 1) // self.block_size):
            block = self.pool.find(block_hash)
            if block is None:
                break
            prefix.append(block)
        return prefix

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Returns the content hashes of the first blocks; each is computed once in a sequence's life."""
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            tokens = sequence.token_ids[index * self.block_size : (index + 1) * self.block_size]
            parent = hashes[-1] if hashes else sequence.cache_salt
            hashes.append(blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest())
        return hashes[:num_blocks]

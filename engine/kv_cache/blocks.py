"""The pool of KV cache blocks: reference counts, the free list, and the index of blocks with known content.

A block is an integer. It is in exactly one of these states:

    state    references  on the free list  has a hash
    used     >= 1        no                perhaps (its content is known and can be shared)
    cached   0           yes               yes     (content kept until the block is needed)
    empty    0           yes               no

The pool knows nothing of requests, tokens or tensors.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out blocks, least recently used content first.

    Args:
        num_blocks: Number of blocks there are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Oldest first: an OrderedDict is a linked list with lookup, so a cached block leaves its middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, those with cached content included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks from the free list; what they had cached is forgotten.

        Args:
            num_blocks: How many; at most `num_free`.

        Returns:
            Their ids, each with one reference.
        """
        assert num_blocks <= len(self._free), "allocate() without room; check num_free first"
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self._forget(block)
            self._ref_counts[block] = 1
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """Returns the block whose content has this hash, if there is one."""
        return self._block_of.get(block_hash)

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block, taking it off the free list if it was there."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference to each block of a sequence.

        Args:
            blocks: The sequence's blocks in order. They are released from the end, so that of one sequence the tail is
                reused before the head: a shorter prefix is worth more than its continuation.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} was released more often than taken"
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes a full block findable by its content; the first block of equal content stays the findable one."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def is_free(self, block: int) -> bool:
        """Returns whether nobody holds the block."""
        return self._ref_counts[block] == 0

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes blocks unfindable: their content is not what their hash says."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """Makes every block unfindable."""
        self.forget(range(self.num_blocks))

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Checks that no block is lost, doubled or miscounted.

        Args:
            held: The blocks of each holder.

        Raises:
            AssertionError: Reference counts differ from what the holders hold, a block is both free and used or
                neither, or the index of contents points to a block that does not know of it.
        """
        counts = Counter(block for blocks in held for block in blocks)
        for block, count in enumerate(self._ref_counts):
            assert counts[block] == count, f"block {block} has {count} references, {counts[block]} holders"
            assert (block in self._free) == (count == 0), f"block {block} with {count} references: free list is wrong"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, f"block {block} is indexed under a hash that is not its own"
        num_hashed = sum(block_hash is not None for block_hash in self._hash_of)
        assert num_hashed == len(self._block_of), "a block has a hash that the index does not know"

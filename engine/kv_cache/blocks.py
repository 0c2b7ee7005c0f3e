"""`BlockPool`: the KV cache blocks with their reference counts, the free list, and the index of blocks by content.

A block is an integer. Every block is in exactly one of these states:

    state    references  on the free list  has a hash
    used     >= 1        no                perhaps (with a hash, other sequences can share the block)
    cached   0           yes               yes     (its content is kept until the block is allocated)
    empty    0           yes               no

The pool does not know about sequences, tokens or tensors.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Allocates blocks: empty blocks first, then the cached block whose content was not used for the longest time.

    Args:
        num_blocks: Number of blocks of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # The oldest block comes first. An OrderedDict is a linked list with lookup, so a cached block in the middle can
        # be removed in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, cached blocks included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks with at least one reference."""
        return self.num_blocks - len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks from the free list and removes their cached content from the index.

        Args:
            num_blocks: Number of blocks; at most `num_free`.

        Returns:
            The ids of the blocks, each of which now has one reference.
        """
        assert num_blocks <= len(self._free), "allocate() without room; check num_free first"
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self._forget(block)
            self._ref_counts[block] = 1
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """Returns the id of the published block whose content has this hash; None if there is no such block."""
        return self._block_of.get(block_hash)

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block, and takes cached blocks off the free list."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Removes one reference from each block of a sequence; a block without references goes to the free list.

        Args:
            blocks: The blocks of the sequence, in order. The last one is released first, so that the end of a sequence
                is reused before its beginning: more sequences begin with a short prefix than with its continuation.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} was released more often than taken"
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Enters a full block into the index, so that `find` returns it; does nothing if the hash is there already."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def is_free(self, block: int) -> bool:
        """Returns whether the block has no references."""
        return self._ref_counts[block] == 0

    def forget(self, blocks: Iterable[int]) -> None:
        """Removes blocks from the index, so that no sequence shares them: the step that should fill them has failed."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """Removes every block from the index, so that `find` returns none of them until it is published again."""
        self.forget(range(self.num_blocks))

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Checks the reference counts, the free list and the index of contents.

        Args:
            held: For each sequence that holds references, the ids of its blocks.

        Raises:
            AssertionError: A reference count differs from the number of sequences that hold the block, a block is both
                free and used or neither, or a block and the index of contents disagree about its hash.
        """
        counts = Counter(block for blocks in held for block in blocks)
        for block, count in enumerate(self._ref_counts):
            assert counts[block] == count, f"block {block} has {count} references, {counts[block]} holders"
            assert (block in self._free) == (count == 0), f"block {block} with {count} references: free list is wrong"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, f"block {block} is indexed under a hash that is not its own"
        num_hashed = sum(block_hash is not None for block_hash in self._hash_of)
        assert num_hashed == len(self._block_of), "a block has a hash that the index does not know"

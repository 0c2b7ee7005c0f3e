"""`KVCacheManager`: allocates the KV cache blocks of sequences, frees them, and finds prefixes computed before.

A sequence has a block table for each group of layers. All its tables have the same length. In a group with a window,
the first `num_freed_blocks` blocks are freed, because the window has passed them, and their entries are never read.

A full block is identified by a hash of its tokens (or the embeddings in their place) and of all blocks before it, so
equal hashes mean equal prefixes. The chain of hashes of a sequence begins with its salt, so sequences of different
salts share no block. To publish a block is to let other sequences find it by its hash; each group has keys of its own.
The table shows the blocks of a sequence with `block_size` 4, 11 known tokens and 9 of them computed, in a group with
full attention and in a group with a window of 3, when token 9 is planned:

    tokens               [0, 4)                   [4, 8)       [8, 9)                 [9, 11)
    block                0                        1            2                      2
    full attention       published                published    not full: private      not computed
    window of 3          freed, can be found      published    not full: private      not computed

A prefix of n blocks is found if every group has the blocks that the token after the prefix reads. With full attention
these are all n blocks, and with a window the blocks of the last `window - 1` tokens of the prefix.
"""

from __future__ import annotations

from array import array
from collections import abc
from hashlib import blake2b

from ..sequence import Sequence
from .blocks import BlockPool
from .groups import LayerCache

FULL_ATTENTION = (LayerCache(),)

UNREAD = 0
"""Entry of a block table for a block that a window has passed. It is never read, so any block id will do."""


class KVCacheManager:
    """Allocates and frees the blocks of sequences, and shares the blocks of equal prefixes.

    Args:
        num_blocks: Number of blocks of the pool.
        block_size: Tokens per block.
        enable_prefix_caching: Whether equal prefixes share blocks.
        caches: The `LayerCache` of each group of layers; none for an encoder, whose sequences need no blocks.

    Attributes:
        keeps_nothing: Whether nothing of a sequence is kept between steps, so that a step must compute it whole.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        caches: abc.Sequence[LayerCache] = FULL_ATTENTION,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.caches = caches
        self.keeps_nothing = not caches
        self._full = [group for group, cache in enumerate(caches) if not cache.window]
        self._windowed = [(group, cache) for group, cache in enumerate(caches) if cache.window]

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return self.pool.num_used / self.pool.num_blocks

    @property
    def only_full_group(self) -> int | None:
        """Index of the group with full attention; None if there is no such group, or several."""
        return self._full[0] if len(self._full) == 1 else None

    def num_blocks_for(self, num_tokens: int) -> int:
        """Returns the number of blocks that `num_tokens` tokens need in one group."""
        return -(-num_tokens // self.block_size)

    def held_blocks(self, sequence: Sequence) -> list[list[int]]:
        """Returns the ids of the blocks that a sequence holds in each group; blocks freed earlier are left out."""
        tables = zip(sequence.block_ids, sequence.num_freed_blocks, strict=True)
        return [block_ids[num_freed:] for block_ids, num_freed in tables]

    def try_admit(self, sequence: Sequence, max_step_tokens: int) -> bool:
        """Gives a waiting sequence the blocks of its cached prefix, if enough blocks are free for all its known tokens.

        The condition counts all blocks that the known tokens will hold at once, and not only those of the first chunk.
        Otherwise a sequence could be admitted and preempted one step later.

        Args:
            sequence: A sequence without blocks. On success its `block_ids` and `num_computed_tokens` cover the prefix
                that was found.
            max_step_tokens: Most tokens that a step computes.

        Returns:
            Whether the sequence was admitted. If it was not, nothing has changed.
        """
        prefix = self._find_prefix(sequence)
        num_cached_tokens, num_blocks = len(prefix) * self.block_size, self.num_blocks_for(sequence.num_tokens)
        firsts = [cache.first_block(num_cached_tokens, self.block_size) for cache in self.caches]
        found = [self._leading_blocks(group, prefix[first:]) for group, first in enumerate(firsts)]
        num_missing = num_free_in_prefix = 0
        for cache, first, blocks in zip(self.caches, firsts, found, strict=True):
            most = cache.max_blocks(sequence.num_tokens, self.block_size, max_step_tokens)
            num_missing += min(num_blocks - first, most) - len(blocks)
            num_free_in_prefix += sum(self.pool.is_free(block) for block in blocks)
        if num_missing > self.pool.num_free - num_free_in_prefix:
            return False
        for blocks in found:
            self.pool.share(blocks)
        sequence.block_ids = [[UNREAD] * first + blocks for first, blocks in zip(firsts, found, strict=True)]
        sequence.num_freed_blocks = firsts
        sequence.num_computed_tokens = num_cached_tokens
        return True

    def try_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates the blocks that a running sequence lacks for its first `num_tokens` tokens.

        Blocks that windows have passed are freed first. Steps in flight may still read these blocks, which is safe: the
        device runs the steps in order, so the blocks are read before a later step overwrites them.

        Returns:
            Whether the sequence has all blocks now. If too few blocks are free, none is allocated.
        """
        if self._windowed:
            self._free_passed_blocks(sequence)
        if self.keeps_nothing:
            return True
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_ids[0])
        if num_missing <= 0:
            return True
        if num_missing * len(self.caches) > self.pool.num_free:
            return False
        for table in sequence.block_ids:
            table.extend(self.pool.allocate(num_missing))
        return True

    def publish(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Publishes the full blocks of the first `num_tokens` tokens, so that other sequences find and share them.

        The blocks are published when they are scheduled, before they are computed. A sequence of the same step that
        shares them reads them after all keys and values of the step are stored. If the step fails, the caller
        must remove the published blocks from the index (`BlockPool.forget`).

        Returns:
            The ids of the blocks that this call has published.
        """
        first = sequence.num_published_blocks
        num_full = min(num_tokens, len(sequence.token_ids)) // self.block_size
        if not self.enable_prefix_caching or num_full <= first:
            return []
        names = self._hashes(sequence, num_full)
        published: list[int] = []
        for group, num_freed in enumerate(sequence.num_freed_blocks):
            begin = max(first, num_freed)
            blocks = sequence.block_ids[group][begin:num_full]
            for block, name in zip(blocks, names[begin:], strict=True):
                self.pool.publish(block, self._key(group, name))
            published += blocks
        sequence.num_published_blocks = num_full
        return published

    def release(self, sequence: Sequence) -> None:
        """Releases all blocks of a sequence; published blocks can be found until they are allocated again."""
        for blocks in self.held_blocks(sequence):
            self.pool.release(blocks)
        sequence.block_ids, sequence.num_freed_blocks = [], []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0

    def reset(self) -> None:
        """Replaces the pool by a new one in which all blocks are free and empty; all sequences lose their blocks."""
        self.pool = BlockPool(self.pool.num_blocks)

    def _free_passed_blocks(self, sequence: Sequence) -> None:
        """Frees the blocks whose tokens all lie before the window of the next token to compute."""
        for group, cache in self._windowed:
            num_freed = sequence.num_freed_blocks[group]
            first = cache.first_block(sequence.num_computed_tokens, self.block_size)
            if first > num_freed:
                self.pool.release(sequence.block_ids[group][num_freed:first])
                sequence.num_freed_blocks[group] = first

    def _find_prefix(self, sequence: Sequence) -> list[bytes]:
        """Returns the hashes of the blocks of the longest cached prefix, which never includes the last token."""
        if not self.enable_prefix_caching or not sequence.reads_prefix_cache:
            return []
        prefix = self._hashes(sequence, (sequence.num_tokens - 1) // self.block_size)
        for group in self._full:
            prefix = prefix[: len(self._leading_blocks(group, prefix))]
        num_blocks = -1
        while num_blocks != len(prefix):  # A shorter prefix needs other blocks, so every group is checked again.
            num_blocks = len(prefix)
            for group, cache in self._windowed:
                prefix = prefix[: self._num_found(group, cache, prefix)]
        return prefix

    def _num_found(self, group: int, cache: LayerCache, prefix: list[bytes]) -> int:
        """Returns the largest usable length of `prefix` in blocks: the group has all blocks of the window after it."""
        end = index = len(prefix)
        while index > cache.first_block(end * self.block_size, self.block_size):
            index -= 1
            if self._find(group, prefix[index]) is None:
                end = index
        return end

    def _leading_blocks(self, group: int, hashes: list[bytes]) -> list[int]:
        """Returns the blocks of a group with the given hashes, up to the first hash that is not found."""
        blocks: list[int] = []
        for name in hashes:
            block = self._find(group, name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _find(self, group: int, block_hash: bytes) -> int | None:
        return self.pool.find(self._key(group, block_hash))

    def _key(self, group: int, block_hash: bytes) -> bytes:
        """Returns the key of a block in the pool's index: groups share the pool, so the key contains the group."""
        return block_hash + bytes((group,))

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Returns the hashes of the first blocks of a sequence; new hashes are appended to `sequence.block_hashes`."""
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            start, end = index * self.block_size, (index + 1) * self.block_size
            content = array("i", sequence.token_ids[start:end]).tobytes()
            content += b"".join([span.name_content(start, end) for span in sequence.spans])
            parent = hashes[-1] if hashes else sequence.cache_salt
            hashes.append(blake2b(parent + content, digest_size=16).digest())
        return hashes[:num_blocks]

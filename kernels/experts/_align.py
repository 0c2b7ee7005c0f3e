"""Sorting the choices of tokens by expert on the GPU, in Triton.

A pair is a token with one of its choices, number `token * num_choices + choice`. Each expert gets blocks of ROWS pairs,
in the order of their numbers, and the last one is filled up with -1. So every block has one expert, and holds the rows
of a matrix product.

`count_kernel`, grid (experts), counts the pairs of each expert. `place_kernel`, grid (experts), writes the blocks of an
expert after those of the experts before it. Each program reads all ids, which stay in the L2 cache. There are no
atomics, so the order is the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 1024
MAX_EXPERTS = 1024
"""Most experts of a layer; a program reads the counts of all of them at once."""


def max_blocks(num_pairs: int, num_experts: int, rows: int) -> int:
    """Returns the most blocks that pairs may need: every expert may have one that is not full."""
    return min(num_pairs, num_pairs // rows + num_experts)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    counts_ptr,
    num_pairs,
    TILE: tl.constexpr,  # noqa: N803
):
    """Counts the pairs of one expert."""
    expert, lanes = tl.program_id(0), tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, num_pairs, TILE):
        ids = tl.load(ids_ptr + start + lanes, mask=start + lanes < num_pairs, other=-1)
        count += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def place_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    counts_ptr,
    order_ptr,
    block_experts_ptr,
    num_pairs,
    num_blocks,
    ROWS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    MAX_EXPERTS: tl.constexpr,  # noqa: N803
):
    """Writes the pairs of one expert, and its number for each of its blocks; -1 for the blocks that no expert needs."""
    expert, lanes, others = tl.program_id(0), tl.arange(0, TILE), tl.arange(0, MAX_EXPERTS)
    counts = tl.load(counts_ptr + others, mask=others <= expert, other=0)
    needed = (counts + ROWS - 1) // ROWS
    end = tl.sum(needed)
    count = tl.sum(tl.where(others == expert, counts, 0))
    first = end - (count + ROWS - 1) // ROWS
    num_placed = 0
    for start in range(0, num_pairs, TILE):
        pairs = start + lanes
        mine = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
        places = num_placed + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + first * ROWS + places, pairs, mask=mine)
        num_placed += tl.sum(mine.to(tl.int32))
    rest = first * ROWS + count + tl.arange(0, ROWS)
    tl.store(order_ptr + rest, -1, mask=rest < end * ROWS)
    for start in range(first, end, TILE):
        tl.store(block_experts_ptr + start + lanes, expert, mask=start + lanes < end)
    if expert == tl.num_programs(0) - 1:
        for start in range(end, num_blocks, TILE):
            tl.store(block_experts_ptr + start + lanes, -1, mask=start + lanes < num_blocks)

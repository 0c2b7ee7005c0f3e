"""Inputs for `paged_attention`: a cache in which everything that must not be read is NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .._op import Draw, Sample


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of one call.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: The size of a head.
        block_size: Tokens per block.
        window: 0 for full attention.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int = 0


def make_sample(name: str, draw: Draw, geometry: Geometry, lengths: Sequence[tuple[int, int]]) -> Sample:
    """Builds a call whose sequences lie in scattered blocks.

    Slots that no query may see hold NaN, and entries of the block tables past the end of a sequence, or before every
    window, point outside the cache.

    Args:
        name: The name of the sample.
        draw: The source of the numbers.
        geometry: The sizes.
        lengths: `(seq_len, num_queries)` of each sequence.
    """
    shape, num_tokens = geometry, sum(queries for _, queries in lengths)
    needed = [-(-seq_len // shape.block_size) for seq_len, _ in lengths]
    num_blocks = sum(needed) + 2
    caches = [draw.normal(num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim) for _ in range(2)]
    readable = torch.zeros(num_blocks, shape.block_size, dtype=torch.bool)
    tables = torch.full((len(lengths), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    free = draw.permutation(num_blocks).tolist()
    for seq, (seq_len, queries) in enumerate(lengths):
        first = max(0, seq_len - queries - shape.window + 1) if shape.window else 0
        for position in range(first, seq_len):
            block = position // shape.block_size
            if tables[seq, block] == 2**30:
                tables[seq, block] = free.pop()
            readable[tables[seq, block], position % shape.block_size] = True
    for cache in caches:
        cache.masked_fill_(~readable[:, None, :, None].to(cache.device), torch.nan)
    starts = [0]
    for _, queries in lengths:
        starts.append(starts[-1] + queries)
    fused = draw.normal(num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    return Sample(
        name,
        (
            fused[:, : shape.num_heads],
            caches[0],
            caches[1],
            tables.to(draw.device),
            draw.tensor([seq_len for seq_len, _ in lengths], torch.int32),
            draw.tensor(starts, torch.int32),
            shape.head_dim**-0.5,
            shape.window,
        ),
    )


def samples(draw: Draw) -> Iterator[Sample]:
    """Yields decode, prefill, chunks and mixtures of them, in odd sizes."""
    grouped = Geometry(num_heads=6, num_kv_heads=2, head_dim=32, block_size=16)
    yield make_sample("one token", draw, Geometry(1, 1, 8, 1), [(1, 1)])
    yield make_sample("decode", draw, grouped, [(1, 1), (63, 1), (123, 1), (16, 1), (17, 1)])
    yield make_sample("decode odd head", draw, Geometry(3, 3, 31, 16), [(40, 1), (5, 1)])
    yield make_sample("decode one kv head", draw, Geometry(9, 1, 64, 64), [(200, 1), (64, 1)])
    yield make_sample("short prompts", draw, grouped, [(40, 40), (1, 1), (63, 63), (7, 7)])
    yield make_sample("long prompt", draw, Geometry(4, 2, 64, 16), [(400, 400)])
    yield make_sample("long chunk", draw, Geometry(4, 4, 40, 16), [(333, 150), (300, 128)])
    yield make_sample("prefill and decode", draw, grouped, [(63, 1), (123, 123), (90, 17), (200, 1), (301, 140)])
    yield make_sample("decode window", draw, Geometry(4, 2, 32, 16, window=33), [(123, 1), (20, 1), (33, 1), (34, 1)])
    yield make_sample("window of one", draw, Geometry(2, 1, 16, 8, window=1), [(30, 5), (9, 1)])
    yield make_sample("chunk window", draw, Geometry(6, 3, 32, 16, window=50), [(123, 60), (170, 1), (400, 260)])
    yield make_sample("a sequence without queries", draw, grouped, [(5, 1), (12, 0), (20, 4)])
    yield make_sample("no sequences", draw, grouped, [])

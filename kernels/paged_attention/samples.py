"""Inputs for `paged_attention`, with NaN in every slot of the cache that must not be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        num_shared: Leading blocks that all sequences have in common.
        cache_dtype: The dtype of the cache; None for that of the query.
        scale: The factor of the products of queries and keys; None for `head_dim ** -0.5`.
        scaled: Whether the cache has scales of keys and values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int = 0
    num_shared: int = 0
    cache_dtype: torch.dtype | None = None
    scale: float | None = None
    scaled: bool = False


def make_sample(
    name: str, draw: Draw, geometry: Geometry, lengths: Sequence[tuple[int, int]], **options: Any
) -> Sample:
    """Builds a call whose sequences are in scattered blocks.

    Slots that no query may see hold NaN. Entries of the block tables after the end of a sequence, or before every
    window, point outside the cache.

    Args:
        name: The name of the sample.
        draw: The source of the numbers.
        geometry: The sizes.
        lengths: `(seq_len, num_queries)` of each sequence; a length of 0 is padding.
        options: Keyword arguments of the call.
    """
    shape, num_tokens = geometry, sum(queries for _, queries in lengths)
    needed = [-(-seq_len // shape.block_size) for seq_len, _ in lengths]
    num_blocks = sum(needed) + shape.num_shared + 2
    caches = [draw.normal(num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim) for _ in range(2)]
    readable = torch.zeros(num_blocks, shape.block_size, dtype=torch.bool)
    tables = torch.full((len(lengths), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    free = draw.permutation(num_blocks).tolist()
    shared = [free.pop() for _ in range(shape.num_shared)]
    for seq, (seq_len, queries) in enumerate(lengths):
        if shared and seq_len:
            tables[seq, : len(shared)] = torch.tensor(shared, dtype=torch.int32)
        first = max(0, seq_len - queries - shape.window + 1) if shape.window else 0
        for position in range(first, seq_len):
            block = position // shape.block_size
            if tables[seq, block] == 2**30:
                tables[seq, block] = free.pop()
            readable[tables[seq, block], position % shape.block_size] = True
    for i, cache in enumerate(caches):
        poisoned = cache.masked_fill(~readable[:, None, :, None].to(cache.device), torch.nan)
        caches[i] = poisoned.to(shape.cache_dtype or draw.dtype)
    if shape.num_shared:
        options["num_shared"] = draw.tensor([shape.num_shared], torch.int32)
    if shape.scaled:
        options["kv_scales"] = draw.scales(shape.num_kv_heads)
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
            shape.head_dim**-0.5 if shape.scale is None else shape.scale,
            shape.window,
        ),
        options,
    )


def samples(draw: Draw) -> Iterator[Sample]:
    """Yields samples of `paged_attention`: decodes, prefills, chunks and mixtures of them, in odd sizes.

    A name begins with "long" if a sequence has so many queries that the CPU multiplies matrices.
    """
    grouped = Geometry(num_heads=6, num_kv_heads=2, head_dim=32, block_size=16)
    yield make_sample("one token", draw, Geometry(1, 1, 8, 1), [(1, 1)])
    yield make_sample("decode", draw, grouped, [(1, 1), (63, 1), (90, 1), (16, 1), (17, 1)])
    yield make_sample("decode odd head", draw, Geometry(3, 3, 31, 16), [(40, 1), (5, 1)])
    yield make_sample("decode one kv head", draw, Geometry(9, 1, 64, 64), [(130, 1), (64, 1)])
    yield make_sample("short prompts", draw, grouped, [(20, 20), (1, 1), (33, 33), (7, 7)])
    yield make_sample("long prompt", draw, Geometry(4, 2, 64, 16), [(150, 150)])
    yield make_sample("long chunk", draw, Geometry(4, 4, 40, 16), [(170, 140), (150, 128)])
    yield make_sample("long chunk among others", draw, grouped, [(63, 1), (33, 33), (50, 17), (90, 1), (160, 130)])
    yield make_sample("decode window", draw, Geometry(4, 2, 32, 16, window=33), [(70, 1), (20, 1), (33, 1), (34, 1)])
    yield make_sample("window of one", draw, Geometry(2, 1, 16, 8, window=1), [(30, 5), (9, 1)])
    yield make_sample("long chunk, window", draw, Geometry(6, 3, 32, 16, window=50), [(90, 30), (70, 1), (170, 140)])
    yield make_sample("a sequence without queries", draw, grouped, [(5, 1), (12, 0), (20, 4)])
    yield make_sample("no sequences", draw, grouped, [])
    yield make_sample("large heads", draw, Geometry(2, 1, 256, 16), [(40, 1), (36, 19)], num_decodes=1)
    yield make_sample("another scale", draw, replace(grouped, scale=0.3), [(40, 1), (35, 20)], num_decodes=1)
    yield from _samples_with_options(draw, grouped)
    yield from _samples_without_a_direction(draw, grouped)


def _samples_with_options(draw: Draw, grouped: Geometry) -> Iterator[Sample]:
    """Yields calls with padding, hints, an 8-bit cache, and the options that some families apply to scores."""
    mixed = [(60, 1), (20, 1), (45, 17)]
    long = [(60, 1), (135, 129)]
    decodes = [(1, 1), (0, 1), (150, 1), (16, 1), (80, 1), (0, 1)]
    shared = replace(grouped, num_shared=4)
    small = replace(grouped, cache_dtype=torch.float8_e4m3fn)
    slopes, sinks = (draw.normal(6, dtype=torch.float32) for _ in range(2))
    yield make_sample("decodes and padding", draw, grouped, decodes, num_decodes=6)
    yield make_sample("decodes first", draw, grouped, mixed, num_decodes=2)
    yield make_sample("softcap", draw, grouped, mixed, num_decodes=2, softcap=0.7)
    yield make_sample("sinks", draw, grouped, mixed, num_decodes=2, sinks=sinks)
    yield make_sample("alibi", draw, grouped, mixed, num_decodes=2, alibi_slopes=slopes.abs() / 8)
    options: dict[str, Any] = {"sinks": sinks, "softcap": 3.0, "alibi_slopes": slopes.abs() / 8}
    yield make_sample("long, options", draw, grouped, long, num_decodes=1, **options)
    windowed = replace(grouped, window=20)
    yield make_sample("long, sinks and window", draw, windowed, long, num_decodes=1, sinks=sinks)
    yield make_sample("8-bit cache", draw, small, mixed, num_decodes=2)
    yield make_sample("long, 8-bit cache", draw, small, long, num_decodes=1)
    yield make_sample("long, 8-bit cache, one block", draw, replace(small, block_size=128), [(100, 1), (128, 128)])
    scaled = replace(small, scaled=True)
    yield make_sample("8-bit cache, scales", draw, scaled, mixed, num_decodes=2)
    yield make_sample("long, 8-bit cache, scales, options", draw, scaled, long, num_decodes=1, **options)
    in_window, single = replace(scaled, window=20), replace(scaled, num_kv_heads=6)
    yield make_sample("8-bit cache, scales, window", draw, in_window, [*decodes, (45, 17)], num_decodes=6)
    yield make_sample("8-bit cache, scales, one query head each", draw, single, mixed, num_decodes=2)
    yield make_sample("shared prefix", draw, shared, [(65, 1), (80, 1), (0, 1), (130, 1)], num_decodes=4)
    yield make_sample("shared prefix and a prompt", draw, shared, [(70, 1), (99, 1), (100, 30)], num_decodes=2)
    yield make_sample(
        "shared prefix, 8-bit cache, scales, options",
        draw,
        replace(shared, cache_dtype=torch.float8_e4m3fn, scaled=True),
        [(65, 1), (80, 1), (130, 1)],
        num_decodes=3,
        **options,
    )
    yield make_sample("deterministic", draw, grouped, [*decodes, (60, 30)], num_decodes=6, deterministic=True)
    yield make_sample("deterministic, 8-bit cache", draw, scaled, mixed, num_decodes=2, deterministic=True)


def _samples_without_a_direction(draw: Draw, grouped: Geometry) -> Iterator[Sample]:
    """Yields calls in which a query sees the keys after it too."""
    prompts = [(1, 1), (0, 3), (130, 130)]
    mixed = [(50, 1), (0, 1), (45, 17), (61, 40)]
    windowed = replace(grouped, window=20)
    slopes, sinks = (draw.normal(6, dtype=torch.float32) for _ in range(2))
    options: dict[str, Any] = {"sinks": sinks, "softcap": 3.0, "alibi_slopes": slopes.abs() / 8}
    yield make_sample("not causal", draw, grouped, [(1, 1), (0, 3), (40, 40)], causal=False)
    yield make_sample("long, not causal, window", draw, windowed, prompts, causal=False)
    yield make_sample("not causal, ends of sequences", draw, windowed, mixed, num_decodes=2, causal=False)
    yield make_sample("long, not causal, options", draw, grouped, prompts, causal=False, **options)
    yield make_sample("not causal, deterministic", draw, windowed, mixed, causal=False, deterministic=True, **options)
    yield make_sample(
        "not causal, shared prefix",
        draw,
        replace(grouped, num_shared=3),
        [(65, 1), (100, 1), (70, 20)],
        num_decodes=2,
        causal=False,
        sinks=sinks,
    )

"""Inputs for `varlen_attention`: queries, keys and values are views of one tensor, as a fused projection gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
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
        window: 0 for full attention.
        max_distance: The largest distance that has an entry of its own in a bias; None for no bias.
        scale: The factor of the products of queries and keys; None for `head_dim ** -0.5`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    max_distance: int | None = None
    scale: float | None = None


def make_sample(name: str, draw: Draw, geometry: Geometry, lengths: Sequence[int], **options: Any) -> Sample:
    """Builds a call.

    Args:
        name: The name of the sample.
        draw: The source of the numbers.
        geometry: The sizes.
        lengths: The number of tokens of each text.
        options: Keyword arguments of the call.
    """
    shape, num_tokens = geometry, sum(lengths)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    fused = draw.normal(num_tokens, sum(heads), shape.head_dim)
    if shape.max_distance is not None:
        bias = draw.normal(shape.num_heads, 2 * shape.max_distance + 1, dtype=torch.float32)
        options["distance_bias"] = bias
    starts = draw.tensor([0, *accumulate(lengths)], torch.int32)
    scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale
    args = (*fused.split(heads, dim=1), starts, max(lengths, default=0), scale, shape.window)
    return Sample(name, args, options)


def samples(draw: Draw) -> Iterator[Sample]:
    """Yields samples of `varlen_attention` in odd sizes. A name begins with "long" where a text fills several tiles."""
    plain, grouped = Geometry(num_heads=4, num_kv_heads=4, head_dim=32), Geometry(6, 2, 32)
    mixed, long = [17, 1, 40, 64, 5], [150, 3, 131]
    yield make_sample("one token", draw, Geometry(1, 1, 8), [1])
    yield make_sample("texts", draw, plain, mixed)
    yield make_sample("long texts", draw, Geometry(2, 2, 64), long)
    yield make_sample("long, one of many texts", draw, Geometry(2, 1, 16), [150, *range(1, 8)])
    yield make_sample("shared KV heads", draw, grouped, mixed)
    yield make_sample("one KV head", draw, Geometry(9, 1, 16), [20, 33])
    yield make_sample("odd heads", draw, Geometry(3, 3, 31), [40, 5, 66])
    yield make_sample("long, heads of 96", draw, Geometry(2, 1, 96), [70, 129])
    yield make_sample("heads of 128", draw, Geometry(2, 2, 128), [35, 20])
    yield make_sample("large heads", draw, Geometry(2, 1, 256), [36, 9])
    yield make_sample("texts without tokens", draw, plain, [0, 5, 0, 0, 33, 0])
    yield make_sample("only texts without tokens", draw, plain, [0, 0])
    yield make_sample("no texts", draw, plain, [])
    yield make_sample("another scale", draw, replace(grouped, scale=1.0), [33, 20])
    yield make_sample("window", draw, replace(grouped, window=7), [40, 3, 25])
    yield make_sample("window of one", draw, replace(plain, window=1), [20, 9])
    yield make_sample("wide window", draw, replace(plain, window=40), mixed)
    yield make_sample("long, window", draw, replace(plain, window=21), long)
    yield make_sample("softcap", draw, grouped, mixed, softcap=0.7)
    yield make_sample("bias", draw, replace(grouped, max_distance=12), mixed)
    yield make_sample("bias of one number for each head", draw, replace(plain, max_distance=0), [20, 9])
    yield make_sample("bias of more distances than tokens", draw, replace(plain, max_distance=100), [20, 41])
    yield make_sample("long, options", draw, replace(grouped, max_distance=30, window=50), long, softcap=3.0)
    yield from _samples_of_other_layouts(draw, grouped)


def _samples_of_other_layouts(draw: Draw, grouped: Geometry) -> Iterator[Sample]:
    """Yields calls whose tensors are contiguous, or lie head by head, and one that overstates its longest text."""
    sample = make_sample("contiguous tensors", draw, grouped, [33, 20])
    yield replace(sample, args=(*(tensor.contiguous() for tensor in sample.args[:3]), *sample.args[3:]))
    sample = make_sample("heads of three parts", draw, Geometry(4, 4, 24), [33, 20])
    parts = draw.normal(53, 4, 3, 24).unbind(2)
    yield replace(sample, args=(*parts, *sample.args[3:]))
    sample = make_sample("a longest text that is not there", draw, grouped, [33, 20])
    yield replace(sample, args=(*sample.args[:4], 200, *sample.args[5:]))

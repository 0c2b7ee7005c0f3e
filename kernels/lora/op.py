"""The products of many LoRA adapters, added to the product of the matrix that they all change: the definition.

For each row t of slot s, and each part p of the rows of the matrix, with r = ranks[s, p]:

    out[t, p] += (x[t] · A[s, p, :r]ᵀ) · B[s, :r, p]

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; batches of several adapters as in Chen et al.,
"Punica: Multi-Tenant LoRA Serving", 2023. The scale of an adapter is part of its B.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .._op import Draw, Sample, op

MAX_SAMPLE_RANK = 16


def _sample(draw: Draw, name: str, slots: list[int], ranks: list[list[int]], size: int, parts: list[int]) -> Sample:
    """Makes a sample in which row t has slot `slots[t]`, or none if that is negative."""
    num_slots, num_parts, width = len(ranks), len(parts), sum(parts)
    order = sorted((t for t, slot in enumerate(slots) if slot >= 0), key=lambda t: slots[t])
    starts = [sum(0 <= slot < s for slot in slots) for s in range(num_slots + 1)]
    tokens = order + [-7] * (len(slots) - len(order) + 1)  # Numbers behind the last start must not be read.
    lora_a = draw.normal(num_slots, num_parts, MAX_SAMPLE_RANK, size) * size**-0.5
    lora_b = draw.normal(num_slots, MAX_SAMPLE_RANK, width)
    ends = [sum(parts[: p + 1]) for p in range(num_parts)]
    for s in range(num_slots):
        for p, end in enumerate(ends):
            lora_a[s, p, ranks[s][p] :] = torch.nan
            lora_b[s, ranks[s][p] :, end - parts[p] : end] = torch.nan
    x = draw.full(torch.nan, len(slots), size)
    x[order] = draw.normal(len(order), size)
    numbers = [draw.tensor(values, torch.int32) for values in (ranks, tokens, starts)]
    return Sample(name, (draw.normal(len(slots), width), x, lora_a, lora_b, *numbers, tuple(ends)))


def _samples(draw: Draw) -> Iterator[Sample]:
    yield _sample(draw, "one row", [0], [[4]], 16, [24])
    yield _sample(
        draw, "three parts, one of them left as it is", [1, -1, 0, 1], [[3, 0, 16], [8, 8, 1]], 63, [40, 8, 9]
    )
    mixed = [2, 0, -1, 2, 2, 1, 0, -1, 2, 3, 2, 2, 0, 2, 2, 2, 2]
    yield _sample(draw, "mixed ranks", mixed, [[16], [1], [5], [0]], 130, [123])
    yield _sample(draw, "two parts", [0] * 64 + [-1] * 5 + [1] * 30, [[16, 16], [8, 7]], 96, [64, 64])
    yield _sample(draw, "six parts of many rows", [0] * 67, [[3, 0, 16, 8, 1, 5]], 40, [5, 1, 8, 16, 24, 3])
    yield _sample(draw, "many inputs", [1, 0, -1, 1], [[9], [16]], 1100, [17])
    yield _sample(draw, "a slot without rows", [2, 2, -1], [[4], [4], [4]], 48, [33])
    yield _sample(draw, "no row has an adapter", [-1, -1], [[4]], 48, [32])
    yield _sample(draw, "no rows", [], [[4], [4]], 48, [32])
    out, x, *others = _sample(draw, "", [0, 1, 0], [[8], [2]], 40, [36]).args
    wide_out, wide_x = draw.full(torch.nan, 3, 60), draw.full(torch.nan, 3, 80)
    wide_out[:, 8:44], wide_x[:, 16:56] = out, x
    yield Sample("columns of wider matrices", (wide_out[:, 8:44], wide_x[:, 16:56], *others))
    yield Sample("sums in float32", (out.to(torch.promote_types(out.dtype, torch.float32)), x, *others))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)},
)
def lora(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Tensor,
    tokens: Tensor,
    starts: Tensor,
    part_ends: tuple[int, ...],
) -> None:
    """Adds the product of each row with the matrices of its adapter to the row's result, in place.

    Rows that have no adapter are neither read nor written. Sums are in float32, and are rounded once, to the dtype of
    `out`.

    Args:
        out: `[num_rows, out_features]`, changed in place: the dtype of x, or float32.
        x: `[num_rows, in_features]`.
        lora_a: `[num_slots, num_parts, max_rank, in_features]` in the dtype of x, of which only the first rows of each
            part are read, as many as its rank.
        lora_b: `[num_slots, max_rank, out_features]` in the dtype of x, of which only the first rows are read, for the
            columns of each part as many as its rank.
        ranks: `[num_slots, num_parts]` int32, the rank of each part; 0 leaves the part of the result as it is.
        tokens: `[num_routed]` int32, indices of the rows that have an adapter, sorted by slot. What is behind
            `starts[num_slots]` is not read.
        starts: `[num_slots + 1]` int32; the rows of slot s are `tokens[starts[s]:starts[s + 1]]`.
        part_ends: The end of each part among the columns of `out`, ascending; the last is `out_features`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    bounds = starts.tolist()
    for slot, (first_token, end_token) in enumerate(pairwise(bounds)):
        rows = tokens[first_token:end_token].long()
        for part, (first, end) in enumerate(zip((0, *part_ends), part_ends, strict=False)):
            rank = int(ranks[slot, part])
            if rank and len(rows):
                hidden = x[rows].to(wide) @ lora_a[slot, part, :rank].to(wide).t()
                product = hidden @ lora_b[slot, :rank, first:end].to(wide)
                out[rows, first:end] = (out[rows, first:end].to(wide) + product).to(out.dtype)

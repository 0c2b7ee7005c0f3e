"""The part of a draw on the GPU: the last kernel of `sample` that reads logits, over the columns of a rank.

Grid: (rows, chunks of the columns). torch merges the chunks, two numbers each. `max` takes the first of several equal
scores, which is that of the lowest token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._triton import Specialisation, Target, current_target, launch
from ..sample import triton as whole
from ..sample.op import log_min_p
from .op import only_possible, sample_shard


@sample_shard.register("cuda")
def sample_shard_triton(
    logits: Tensor,
    first_id: int,
    peaks: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs `sample_shard` in one kernel, and merges its chunks."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, num_columns = logits.shape
    num_chunks, chunk_size = whole.split(max(num_rows, 1), num_columns, current_target())
    by_chunk = (num_rows, num_chunks)
    # The kernel writes nothing for a row that is not drawn.
    scores = torch.full(by_chunk, -torch.inf, device=logits.device)
    token_ids = torch.full(by_chunk, -1, dtype=torch.int32, device=logits.device)
    if num_rows:
        limits = log_min_p(min_p).abs().view(torch.int32)
        shape = (logits, logits.stride(0), num_columns, num_chunks, chunk_size, 1, first_id)
        draws = (temperature, seeds, positions, peaks.contiguous(), limits, scores, token_ids)
        sizes: dict[str, Any] = {"MAX_CHUNKS": whole.MAX_CHUNKS, "TILE": whole.TILE, **whole.OPTIONS}
        launch(whole.draw_kernel, by_chunk, *shape, *draws, **sizes)
    best, chunks = scores.max(-1, keepdim=True)
    return only_possible(best[:, 0], token_ids.gather(1, chunks)[:, 0], best[:, 0] > -torch.inf)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the only specialisation of the kernel, which is that of `sample`."""
    yield from (form for form in whole.specialisations(target) if form.kernel is whole.draw_kernel)

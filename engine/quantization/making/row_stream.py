"""`RowStream`: rows that go through a model one layer at a time, and the perplexity at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ...batch import ForwardBatch, KVCache
from ...kv_cache.layout import allocate_kv_cache
from ...kv_cache.states import allocate_states
from ...models.decoder import Decoder
from ...models.pp_stages import cache_groups, cache_shape, state_shape
from ...parallel.context import SINGLE

__all__ = ["RowStream"]

BATCH_TOKENS = 4096
"""Most tokens that a layer computes at once, unless one row is longer."""

LOGIT_ROWS = 256
"""Tokens whose logits are in memory at once."""

BLOCK_SIZE = 16


class RowStream:
    """Rows between two layers of a model.

    A layer reads only keys and values that it wrote in the same pass, so all layers share one cache.

    Args:
        model: The model, whose embedding is loaded. Nothing else of it is read.
        rows: The token ids of each row.
    """

    def __init__(self, model: Decoder, rows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._batches = [_batch(model, part) for part in _parts(rows)]
        self._tokens = [[*part] for part in _parts(rows)]
        self._states: list[tuple[Tensor, Tensor | None]] = [(model.embed(batch), None) for batch in self._batches]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(len(batch.token_ids) for batch in self._batches)

    def run(self, layer: int, *, keeps: bool = True) -> None:
        """Runs a layer.

        Args:
            layer: Its index. Its weights are loaded.
            keeps: Whether the rows go on with its results; otherwise they stay where they are.
        """
        for index, (batch, state) in enumerate(zip(self._batches, self._states, strict=True)):
            pair = self._pair(layer, batch)
            # Some layers change their input in place.
            hidden, residual = (None if each is None else each.clone() for each in state)
            result = self._model.layers[layer](hidden, residual, batch, *pair)
            if keeps:
                self._states[index] = result

    def perplexity(self) -> float:
        """Returns the perplexity of the rows, which have gone through all layers: the exponential of the mean loss."""
        total, count = 0.0, 0
        for rows, batch, state in zip(self._tokens, self._batches, self._states, strict=True):
            hidden = self._model.project_out(
                self._model.norm(*(None if each is None else each.clone() for each in state))[0]
            )
            for row, (start, stop) in zip(rows, pairwise(batch.query_start_loc.tolist()), strict=True):
                for first in range(start, stop - 1, LOGIT_ROWS):
                    last = min(first + LOGIT_ROWS, stop - 1)
                    logits = self._model.compute_logits(hidden[first:last])
                    targets = torch.tensor(row[first - start + 1 : last - start + 1], device=logits.device)
                    total += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
                    count += last - first
        return math.exp(min(total / count, 700.0)) if math.isfinite(total) else math.inf

    def _pair(self, layer: int, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Returns an empty cache for a layer: of keys and values, or of states."""
        spec, device = self._model.spec, batch.token_ids.device
        if spec.state is not None and layer in spec.state.layers:
            shape = replace(state_shape(spec, SINGLE), num_layers=1)
            return allocate_states(shape, len(batch.seq_lens), dtype=self._model.dtype, device=device)[0]
        num_blocks = int(batch.block_tables[0].max()) + 1
        shape_of_pair = replace(cache_shape(spec, SINGLE), num_pairs=1)
        cache: KVCache = allocate_kv_cache(
            shape_of_pair, num_blocks, BLOCK_SIZE, dtype=self._model.dtype, device=device
        )
        return cache[0]


def _parts(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yields neighbouring rows of at most `BATCH_TOKENS` tokens together."""
    part: list[Sequence[int]] = []
    for row in rows:
        if part and sum(map(len, part)) + len(row) > BATCH_TOKENS:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _batch(model: Decoder, rows: Sequence[Sequence[int]]) -> ForwardBatch:
    """Returns the batch of whole rows, whose blocks follow each other."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(row) for row in rows])
    blocks = -(-lengths // BLOCK_SIZE)
    first_blocks = blocks.cumsum(0) - blocks
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    slots = positions + (first_blocks * BLOCK_SIZE).repeat_interleave(lengths)
    table = first_blocks[:, None] + torch.arange(int(blocks.max())).clamp(max=(blocks - 1)[:, None])
    groups = len(cache_groups(model.spec))
    return ForwardBatch(
        token_ids=torch.tensor([token for row in rows for token in row], device=device),
        positions=positions.to(device),
        slot_mappings=(slots.to(device),) * groups,
        query_start_loc=torch.cat((torch.zeros(1), lengths.cumsum(0))).int().to(device),
        seq_lens=lengths.int().to(device),
        block_tables=(table.int().to(device),) * groups,
        rows=torch.arange(len(rows), dtype=torch.int32, device=device),
        longest_prompt=int(lengths.max()),
    )

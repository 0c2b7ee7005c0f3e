"""`PagedSequences`: sequences in a paged cache, run by a model without an engine, in any schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from millrace.engine.batch import ForwardBatch, KVCache
from millrace.engine.kv_cache import allocate_kv_cache, allocate_states
from millrace.engine.models import Decoder
from millrace.engine.models.pp_stages import cache_groups, cache_shape, state_shape
from millrace.engine.parallel.context import SINGLE

__all__ = ["SCHEDULES", "PagedSequences", "random_sequences", "schedule_by", "schedule_mixed"]

BLOCK_SIZE = 4
SEQUENCE_LENGTHS = (13, 5, 22, 1, 9)


class PagedSequences:
    """Sequences in a paged cache, advanced by any number of tokens at a time.

    Args:
        model: The model.
        sequences: The tokens of each sequence.
        dtype: Element type of the cache.
        seed: Seed of the order in which blocks are given out.
    """

    def __init__(self, model: Decoder, sequences: list[list[int]], dtype: torch.dtype, seed: int = 0) -> None:
        self.model = model
        self.sequences = sequences
        self.num_computed_tokens = [0] * len(sequences)
        num_blocks = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        block_ids = list(range(sum(num_blocks) + 3))
        random.Random(seed).shuffle(block_ids)
        self.block_ids = [[block_ids.pop() for _ in range(count)] for count in num_blocks]
        # Group g of layers has its blocks behind those of the groups before it.
        self.num_groups, self.num_group_blocks = len(cache_groups(model.spec)), sum(num_blocks) + 3
        shape, num_all_blocks = cache_shape(model.spec, SINGLE), self.num_groups * self.num_group_blocks
        self.kv_cache: KVCache = allocate_kv_cache(
            shape, num_all_blocks, BLOCK_SIZE, dtype=dtype, device=torch.device("cpu")
        )
        states = state_shape(model.spec, SINGLE)
        self.kv_cache += allocate_states(states, len(sequences), dtype=model.dtype, device=torch.device("cpu"))
        # Memory that no sequence has written holds large numbers, so that reading it changes the logits.
        for cache in (cache for pair in self.kv_cache for cache in pair):
            cache.copy_(torch.full((), 400.0))

    def batch(self, num_scheduled_tokens: dict[int, int]) -> ForwardBatch:
        token_ids, positions, slots, lengths, starts = [], [], [], [], [0]
        for index, count in num_scheduled_tokens.items():
            start = self.num_computed_tokens[index]
            for position in range(start, start + count):
                token_ids.append(self.sequences[index][position])
                positions.append(position)
                block_id = self.block_ids[index][position // BLOCK_SIZE]
                slots.append(block_id * BLOCK_SIZE + position % BLOCK_SIZE)
            lengths.append(start + count)
            starts.append(starts[-1] + count)
        width = max(len(self.block_ids[index]) for index in num_scheduled_tokens)
        tables = [(self.block_ids[index] + [0] * width)[:width] for index in num_scheduled_tokens]
        firsts = [group * self.num_group_blocks for group in range(self.num_groups)]
        return ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mappings=tuple(torch.tensor(slots) + first * BLOCK_SIZE for first in firsts),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=tuple(torch.tensor(tables, dtype=torch.int32) + first for first in firsts),
            rows=torch.tensor(list(num_scheduled_tokens), dtype=torch.int32),
            longest_prompt=0 if any(positions[start] for start in starts[:-1]) else max(num_scheduled_tokens.values()),
        )

    def step(self, num_scheduled_tokens: dict[int, int]) -> dict[int, torch.Tensor]:
        """Advances the sequences; returns the logits of their new positions."""
        hidden = self.model(self.batch(num_scheduled_tokens), self.kv_cache)
        logits = self.model.compute_logits(hidden).split(list(num_scheduled_tokens.values()))
        for index, count in num_scheduled_tokens.items():
            self.num_computed_tokens[index] += count
        return dict(zip(num_scheduled_tokens, logits, strict=True))

    def run(self, schedule: Iterator[dict[int, int]]) -> list[torch.Tensor]:
        """Runs a schedule to the end of all sequences; returns each sequence's logits, `[num_tokens, vocab_size]`."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.sequences]
        for num_scheduled_tokens in schedule:
            for index, logits in self.step(num_scheduled_tokens).items():
                parts[index].append(logits)
        assert self.num_computed_tokens == [len(tokens) for tokens in self.sequences]
        return [torch.cat(part) for part in parts]


def schedule_by(count: int) -> Iterator[dict[int, int]]:
    """Advances every unfinished sequence by at most `count` tokens a step."""
    left = dict(enumerate(SEQUENCE_LENGTHS))
    while left:
        step = {index: min(count, remaining) for index, remaining in left.items()}
        yield step
        left = {index: left[index] - step[index] for index in left if left[index] > step[index]}


def schedule_mixed() -> Iterator[dict[int, int]]:
    """Yields steps that mix whole prompts, chunks and decoded tokens, in changing order."""
    yield {2: 15, 0: 7}
    yield {0: 3, 1: 5, 2: 1}
    yield {4: 8, 2: 1, 0: 1, 3: 1}
    yield {0: 1, 2: 4, 4: 1}
    yield {2: 1, 0: 1}


SCHEDULES = {
    "prefill": lambda: schedule_by(max(SEQUENCE_LENGTHS)),
    "chunks": lambda: schedule_by(6),
    "decode": lambda: schedule_by(1),
    "mixed": schedule_mixed,
}


def random_sequences() -> list[list[int]]:
    """Returns the tokens of sequences for the schedules."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 384, (length,), generator=generator).tolist() for length in SEQUENCE_LENGTHS]

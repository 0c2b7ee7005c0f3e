"""The tensors of one step, gathered from the tables of all running requests: the definition.

For token i of sequence b, which owns row r of the tables and starts this step at position s:

    position = s + i
    token_id = token_table[r, position]
    slot     = block_table[r, position // block_size] · block_size + position % block_size
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op

_OUTSIDE = 2**31 - 1
"""The value of the entries of the tables that no token of the step uses."""


def _samples(draw: Draw) -> Iterator[Sample]:
    def sample(name: str, sequences: list[tuple[int, int, int]], max_len: int, block_size: int) -> Sample:
        """Makes a sample from (row, start, count) of each sequence; a row of -1 is padding."""
        num_rows, num_blocks = 7, -(-max_len // block_size)
        tokens = draw.integers(0, 1000, num_rows, max_len, dtype=torch.int32)
        blocks = draw.permutation(num_rows * num_blocks, dtype=torch.int32).view(num_rows, num_blocks)
        plan = []
        offset = 0
        for row, start, count in sequences:
            plan.append((row, start, count, offset))
            offset += count
        for row in set(range(num_rows)) - {row for row, _, _ in sequences}:
            tokens[row], blocks[row] = _OUTSIDE, _OUTSIDE
        columns = draw.tensor(plan, torch.int32).T.contiguous()
        return Sample(name, (tokens, blocks, columns, offset, max(1, num_blocks - 1), block_size))

    yield sample("one token", [(0, 0, 1)], 8, 4)
    yield sample("decodes", [(3, 5, 1), (0, 17, 1), (6, 31, 1)], 48, 16)
    yield sample("a prompt, a chunk, a decode", [(2, 40, 1), (5, 9, 20), (1, 0, 33)], 63, 8)
    yield sample("longer than a tile", [(4, 3, 1100), (1, 600, 1)], 1200, 16)
    yield sample("more blocks than a tile", [(4, 599, 1)], 600, 1)
    yield sample("padding", [(5, 3, 1), (0, 8, 1), (-1, 0, 1), (-1, 0, 1)], 10, 3)
    yield sample("padding alone", [(-1, 0, 1)], 4, 2)


@op(samples=_samples, tolerance={torch.float32: (0.0, 0.0)})
def gather_batch(
    token_table: Tensor, block_table: Tensor, plan: Tensor, num_tokens: int, max_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gathers the tokens of a step, and the slots of the KV cache for their keys and values.

    Args:
        token_table: `[num_rows, max_model_len]` int32, the tokens of each running request.
        block_table: `[num_rows, max_model_len / block_size]` int32, the KV cache blocks of each running request.
        plan: `[4, num_seqs]` int32: the row of each sequence, its first position in this step, its number of tokens,
            and the number of tokens of all sequences before it. A row of -1 is padding: one token at position 0.
        num_tokens: The number of tokens of all sequences, padding included.
        max_blocks: The number of columns of the returned block tables.
        block_size: Tokens per KV cache block.

    Returns:
        token_ids, positions and slot_mapping, `[num_tokens]` int64; query_start_loc `[num_seqs + 1]` and seq_lens
        `[num_seqs]` int32; block_tables `[num_seqs, max_blocks]` int32. Padding has token 0, slot -1 and length 0.
    """
    # Padding reads the last row of the tables. Its results are replaced.
    rows, starts, counts, offsets = plan.unbind()
    row, start, _, offset = plan.long().repeat_interleave(counts, dim=1, output_size=num_tokens).unbind()
    positions = torch.arange(num_tokens, device=plan.device) + (start - offset)
    blocks = block_table[row, positions // block_size].long()
    slots = blocks * block_size + positions % block_size
    is_padding, is_padded = rows < 0, row < 0
    return (
        token_table[row, positions].long().masked_fill_(is_padded, 0),
        positions,
        slots.masked_fill_(is_padded, -1),
        torch.nn.functional.pad(offsets, (0, 1), value=num_tokens),
        (starts + counts).masked_fill_(is_padding, 0),
        block_table[:, :max_blocks][rows].masked_fill_(is_padding[:, None], 0),
    )

"""The causal convolution over the last few tokens of a sequence: the definition.

    out[t] = silu(bias + sum over j of weight[:, width - 1 - j] · x[t - j]),   j = 0 .. width - 1

Every channel has its own weights. Inputs from before the step are those in the state; from before the sequence they are
zeros. Afterwards the state holds the last `width - 1` inputs (Gu and Dao, 2023,
arXiv:2312.00752, section 3.4; Dao and Gu, 2024, arXiv:2405.21060, section 7).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from .._states import old_states, sample_states, store_states


def _samples(draw: Draw) -> Iterator[Sample]:
    def inputs(
        channels: int, width: int, counts: list[int], computed: list[int], *, has_bias: bool = True, extra: int = 0
    ) -> tuple[Tensor | None, ...]:
        num_tokens, *batch = sample_states(draw, counts, computed, (width - 1, channels), draw.dtype)
        x = draw.normal(num_tokens, channels + extra)[:, extra:]
        return x, draw.normal(channels, width), draw.normal(channels) if has_bias else None, *batch

    yield Sample("one token that starts", inputs(1, 2, [1], [0]))
    yield Sample("decodes", inputs(123, 4, [1, 1, 1, 1], [1, 9, 2, 0]))
    yield Sample("prompts and chunks", inputs(63, 4, [1, 2, 37, 3, 1], [5, 1, 0, 8, 0], has_bias=False))
    yield Sample("strided rows and padding", inputs(72, 3, [1, 19, 1, 1], [4, 3, -1, -1], extra=5))
    yield Sample("padding only", inputs(16, 4, [1, 1], [-1, -1]))
    yield Sample("long", inputs(130, 4, [70], [3]))


@op(
    samples=_samples, tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2)}
)
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Convolves every channel with the last tokens of its sequence, and applies silu.

    Args:
        x: `[num_tokens, channels]`, the tokens of the step; rows may have a stride.
        weight: `[channels, width]` in the dtype of x; the last column belongs to the token itself.
        bias: `[channels]` in the dtype of x, or None.
        state: `[num_rows, width - 1, channels]` in the dtype of x, the last inputs of the sequence that owns each row,
            the latest one last. It is changed in place.
        rows: `[num_seqs]` int32, the row of each sequence; -1 for padding, whose state is neither read nor written.
        query_start_loc: `[num_seqs + 1]` int32, prefix sums of the numbers of tokens of the sequences.
        seq_lens: `[num_seqs]` int32, number of tokens of each sequence, those of this step included.

    Returns:
        `[num_tokens, channels]` in the dtype of x, contiguous.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    history, width = weight.shape[1] - 1, weight.shape[1]
    counts, old = query_start_loc.diff(), old_states(state, rows, query_start_loc, seq_lens)
    owners = torch.arange(len(rows), device=x.device).repeat_interleave(counts, output_size=len(x))
    offsets = torch.arange(len(x), device=x.device) - query_start_loc[owners]

    def inputs(owner: Tensor, offset: Tensor) -> Tensor:
        """Returns inputs of sequences, counted from their first token in this step; negative ones are in the state."""
        now = x[(query_start_loc[owner] + offset).clamp(min=0)]
        before = old[owner, (history + offset).clamp(0, history - 1)]
        return torch.where((offset < 0).unsqueeze(-1), before, now)

    total = torch.zeros(x.shape, dtype=wide, device=x.device) if bias is None else bias.to(wide).expand(x.shape)
    for j in range(width):
        total = total + weight[:, width - 1 - j].to(wide) * inputs(owners, offsets - j).to(wide)
    everyone = torch.arange(len(rows), device=x.device)
    last = [inputs(everyone, counts - history + i) for i in range(history)]
    store_states(state, rows, torch.stack(last, dim=1))
    return torch.nn.functional.silu(total).to(x.dtype)

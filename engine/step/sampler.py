"""`Sampler`: turns logits into token ids: masks and penalties for the rows that ask for them, then one draw a row.

The order is that of vLLM. Log-probabilities are computed from the raw logits. Then structured_outputs,
allowed_token_ids, bad_words, min_tokens, logit_bias and the penalties change the logits. Temperature, min_p, top_k,
top_p and the draw come last (`kernels.sample`).
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import greedy, sample, sample_shard, top_logprobs
from ..device import to_device
from ..parallel.context import ParallelContext
from ..sampling_params import ALL_FORBIDDEN
from ..sequence import Sequence
from ..structured.token_masks import TokenMasks
from .logit_edits import LogitEdits


@dataclass(slots=True)
class TopLogprobs:
    """Log-probabilities of the tokens at some positions, on the device.

    Attributes:
        logprobs: `[num_positions, k + 1]` float32; column 0 is the token at the position, then the k most probable.
        token_ids: `[num_positions, k + 1]` int64, the tokens of these log-probabilities.
        ranks: `[num_positions]` int64, rank of the token itself in the vocabulary; 1 is the most probable.
    """

    logprobs: Tensor
    token_ids: Tensor
    ranks: Tensor


class Sampler:
    """Stores the sampling parameters of the sequence in each row of the tables, and draws tokens with them.

    Args:
        max_num_seqs: Number of rows of the tables.
        device: Device of the logits.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self._temperature = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        self._top_k = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._top_p = torch.ones(max_num_seqs, dtype=torch.float32, device=device)
        self._min_p = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        self._seeds = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._edits = LogitEdits(max_num_seqs, device)
        self._num_logprobs: dict[int, int] = {}
        self._drawing_rows: set[int] = set()
        self._filtering_rows: set[int] = set()

    def set_rows(self, rows: abc.Sequence[int], sequences: abc.Sequence[Sequence]) -> None:
        """Stores the sampling parameters of `sequences`, which enter the `rows` of the tables in the same order."""
        index = to_device(rows, torch.int64, self.device)
        params = [sequence.params for sequence in sequences]
        for table, values in (
            (self._temperature, [p.temperature for p in params]),
            (self._top_k, [p.top_k for p in params]),
            (self._top_p, [p.top_p for p in params]),
            (self._min_p, [p.min_p for p in params]),
            (self._seeds, [sequence.seed for sequence in sequences]),
        ):
            table[index] = to_device(values, table.dtype, self.device)
        self._edits.set_rows(rows, sequences)
        for row, sequence in zip(rows, sequences, strict=True):
            self._num_logprobs.pop(row, None)
            self._drawing_rows.discard(row)
            self._filtering_rows.discard(row)
            if sequence.params.temperature > 0:
                self._drawing_rows.add(row)
                if sequence.params.top_k > 0 or sequence.params.top_p < 1:
                    self._filtering_rows.add(row)
            if sequence.params.logprobs is not None:
                self._num_logprobs[row] = sequence.params.logprobs

    def only_draws(self, rows: abc.Sequence[int], lengths: abc.Sequence[int], masks: TokenMasks | None) -> bool:
        """Returns whether a step reads logits for nothing but the draw: no edits, token masks or log-probabilities.

        Args:
            rows: As in `draw`.
            lengths: As in `draw`.
            masks: As in `draw`.
        """
        return masks is None and self._num_logprobs.keys().isdisjoint(rows) and not self._edits.find(rows, lengths)

    def draws(self, rows: abc.Sequence[int]) -> bool:
        """Returns whether a sequence in one of the `rows` of the tables has a temperature above 0."""
        return not self._drawing_rows.isdisjoint(rows)

    def filters(self, rows: abc.Sequence[int]) -> bool:
        """Returns whether a sequence in one of the `rows` of the tables draws with top_k or top_p."""
        return not self._filtering_rows.isdisjoint(rows)

    def draw(
        self,
        logits: Tensor,
        rows: abc.Sequence[int],
        lengths: abc.Sequence[int],
        placed: Tensor,
        token_table: Tensor,
        masks: TokenMasks | None = None,
    ) -> tuple[Tensor, TopLogprobs | None]:
        """Draws one token for each line of logits.

        Args:
            logits: `[num_lines, vocab_size]` float32, one line for each sequence that samples; may be overwritten.
            rows: Row of the tables that the sequence of each line has.
            lengths: Number of tokens of each line's sequence so far, which is the position of the new token.
            placed: `rows` and `lengths` on the device, `[2, num_lines]` integers.
            token_table: `[max_num_seqs, max_model_len]` integers, tokens of prompt and output by row of the tables.
            masks: Tokens that grammars allow; None if no sequence follows a grammar.

        Returns:
            Token ids `[num_lines]` int64, which are `NAN_LOGITS` or `ALL_FORBIDDEN` where no token could be drawn; and
            the log-probabilities of all lines, or None if no sequence asks for them.
        """
        edited = self._edits.find(rows, lengths)
        num_logprobs = self._max_num_logprobs(rows, logits.shape[-1])
        is_changed = bool(edited) or masks is not None
        raw = logits.clone() if is_changed and num_logprobs is not None else logits
        if masks is not None:
            masks.apply(logits)
        is_forbidden = self._edits.apply(logits, edited, rows, lengths, token_table) if edited else None
        token_ids = self.sample(logits, placed) if self.draws(rows) else greedy(logits)
        if is_forbidden is not None:
            token_ids.masked_fill_(is_forbidden, ALL_FORBIDDEN)
        if num_logprobs is None:
            return token_ids, None
        return token_ids, TopLogprobs(*top_logprobs(raw, token_ids.clamp(min=0), num_logprobs))

    def draw_in_shards(
        self, logits: Tensor, first_id: int, placed: Tensor, parallel: ParallelContext, *, draws: bool = True
    ) -> Tensor:
        """Draws one token for each line of logits whose columns are divided among the ranks of a pp stage.

        The ranks exchange two numbers of each line, the largest value and its token, and no logits. The tokens are the
        same as those of `draw`, for sequences that only draw (`only_draws`) and do not filter (`filters`).

        Args:
            logits: `[num_lines, num_columns]` float32, this rank's columns.
            first_id: Token id of the first column.
            placed: As in `draw`.
            parallel: The place of this rank among all ranks.
            draws: Whether a sequence may have a temperature above 0 (`draws`).

        Returns:
            Token ids `[num_lines]` int64, as in `draw`.
        """
        own_peaks, columns = logits.max(-1)
        peaks, token_ids = parallel.best(own_peaks, columns.int() + first_id)
        token_ids = torch.where(peaks.isfinite(), token_ids, -1)
        if draws:
            index, positions = placed.long().unbind()
            temperature = self._temperature[index]
            chosen = (temperature, self._min_p[index], self._seeds[index], positions)
            _, drawn = parallel.best(*sample_shard(logits, first_id, peaks, *chosen))
            token_ids = torch.where(temperature > 0, drawn, token_ids)
        return token_ids.long()

    def sample(self, logits: Tensor, placed: Tensor) -> Tensor:
        """Draws a token for each line of logits with the stored temperature, top_k, top_p, min_p and seed.

        The work is the same for all parameters, so that a CUDA graph can record it.

        Args:
            logits: As in `draw`.
            placed: As in `draw`.

        Returns:
            Token ids `[num_lines]` int64, as in `draw`.
        """
        index, positions = placed.long().unbind()
        return sample(
            logits,
            self._temperature[index],
            self._top_k[index],
            self._top_p[index],
            self._min_p[index],
            self._seeds[index],
            positions,
        )

    def _max_num_logprobs(self, rows: abc.Sequence[int], vocab_size: int) -> int | None:
        asked = [self._num_logprobs[row] for row in rows if row in self._num_logprobs]
        if not asked:
            return None
        return vocab_size if -1 in asked else min(vocab_size, max(asked))

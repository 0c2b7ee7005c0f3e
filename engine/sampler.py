"""From logits to token ids: masks and penalties for the rows that ask for them, then one draw for every row.

Order, as users of vLLM know it: log-probabilities are taken from the raw logits; then allowed_token_ids, bad_words,
min_tokens, logit_bias, the penalties; then temperature, min_p, top_k, top_p and the draw (`kernels.sample`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import sample, top_logprobs
from .request import Request
from .sampling_params import ALL_FORBIDDEN, SamplingParams


@dataclass(slots=True)
class TopLogprobs:
    """Log-probabilities of the tokens of some positions, on the device until they are read.

    Attributes:
        logprobs: `[num_positions, k + 1]` float32; column 0 is the token itself, then the k most probable.
        token_ids: `[num_positions, k + 1]` int64.
        ranks: `[num_positions]` int64, of the token itself.
    """

    logprobs: Tensor
    token_ids: Tensor
    ranks: Tensor


@dataclass(slots=True)
class LogitEdits:
    """What a request wants done to its logits, with its words and sets as token ids.

    Attributes:
        params: The request's parameters.
        num_prompt_tokens: Where its output begins.
        stop_token_ids: Tokens to mask until min_tokens are there.
        bad_words: Token sequences never to complete.
        allowed: The only tokens to keep, if given.
        bias: (token ids, numbers to add), if given.
    """

    params: SamplingParams
    num_prompt_tokens: int
    stop_token_ids: list[int]
    bad_words: list[list[int]] = field(default_factory=list)
    allowed: Tensor | None = None
    bias: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, request: Request, device: torch.device) -> LogitEdits | None:
        """Returns the edits of a request, or None if it wants none."""
        params = request.params
        has_penalty = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        has_set = params.allowed_token_ids or params.logit_bias or request.bad_word_ids
        if not (has_penalty or has_set or params.min_tokens):
            return None
        edits = cls(params, request.num_prompt_tokens, list(request.stop_token_ids), request.bad_word_ids)
        if params.allowed_token_ids:
            edits.allowed = torch.tensor(params.allowed_token_ids, device=device)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=device)
            edits.bias = ids, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        return edits

    def apply(self, logits: Tensor, token_ids: Tensor) -> None:
        """Edits one row in place.

        Args:
            logits: `[vocab_size]` float32.
            token_ids: `[num_tokens]` int64, prompt and output so far.
        """
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(-torch.inf)
            logits[self.allowed] = kept
        for word in self.bad_words:
            self._mask_bad_word(logits, token_ids, word)
        if len(token_ids) - self.num_prompt_tokens < self.params.min_tokens and self.stop_token_ids:
            logits[self.stop_token_ids] = -torch.inf
        if self.bias is not None:
            logits.index_add_(0, *self.bias)
        self._penalise(logits, token_ids)

    def _mask_bad_word(self, logits: Tensor, token_ids: Tensor, word: list[int]) -> None:
        """Masks the last token of a word whose other tokens were just generated."""
        first = len(token_ids) - (len(word) - 1)
        if first >= self.num_prompt_tokens and token_ids[first:].tolist() == word[:-1]:
            logits[word[-1]] = -torch.inf

    def _penalise(self, logits: Tensor, token_ids: Tensor) -> None:
        """Applies the penalties: repetition to tokens of prompt and output, the others to those of the output."""
        params = self.params
        if params.repetition_penalty != 1:
            seen = token_ids.unique()
            values = logits[seen]
            factor = params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / factor, values * factor)
        if params.frequency_penalty or params.presence_penalty:
            generated, counts = token_ids[self.num_prompt_tokens :].unique(return_counts=True)
            logits[generated] -= params.frequency_penalty * counts + params.presence_penalty


class Sampler:
    """Keeps the sampling parameters of each row of the batch, and draws.

    Args:
        max_num_seqs: Number of rows.
        device: Where logits are.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self._temperature = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        self._top_k = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._top_p = torch.ones(max_num_seqs, dtype=torch.float32, device=device)
        self._min_p = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        self._seeds = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._edits: dict[int, LogitEdits] = {}
        self._num_logprobs: dict[int, int] = {}

    def set_rows(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
        """Takes the parameters of the requests that now own these rows."""
        index = torch.tensor(rows, device=self.device)
        params = [request.params for request in requests]
        for table, values in (
            (self._temperature, [p.temperature for p in params]),
            (self._top_k, [p.top_k for p in params]),
            (self._top_p, [p.top_p for p in params]),
            (self._min_p, [p.min_p for p in params]),
            (self._seeds, [request.seed for request in requests]),
        ):
            table[index] = torch.tensor(values, dtype=table.dtype, device=self.device)
        for row, request in zip(rows, requests, strict=True):
            self._edits.pop(row, None)
            if (edits := LogitEdits.of(request, self.device)) is not None:
                self._edits[row] = edits
            self._num_logprobs.pop(row, None)
            if request.params.logprobs is not None:
                self._num_logprobs[row] = request.params.logprobs

    def draw(
        self, logits: Tensor, rows: Sequence[int], lengths: Sequence[int], token_table: Tensor
    ) -> tuple[Tensor, TopLogprobs | None]:
        """Draws one token for each row.

        Args:
            logits: `[num_rows, vocab_size]` float32; may be overwritten.
            rows: The row each belongs to.
            lengths: Number of tokens of each so far, which is the position of the new one.
            token_table: `[max_num_seqs, max_model_len]`, tokens by row.

        Returns:
            Token ids `[num_rows]` int64, `NAN_LOGITS` or `ALL_FORBIDDEN` where there is none; and log-probabilities of
            all rows if any row asked for them.
        """
        edited = [(i, self._edits[row]) for i, row in enumerate(rows) if row in self._edits]
        num_logprobs = self._max_num_logprobs(rows, logits.shape[-1])
        raw = logits.clone() if edited and num_logprobs is not None else logits
        for i, edits in edited:
            edits.apply(logits[i], token_table[rows[i], : lengths[i]].long())
        index = torch.tensor(rows, device=self.device)
        positions = torch.tensor(lengths, device=self.device)
        token_ids = sample(
            logits,
            self._temperature[index],
            self._top_k[index],
            self._top_p[index],
            self._min_p[index],
            self._seeds[index],
            positions,
        )
        if edited:
            where = torch.tensor([i for i, _ in edited], device=self.device)
            is_forbidden = logits[where].amax(dim=-1).isneginf()
            token_ids[where] = token_ids[where].masked_fill(is_forbidden, ALL_FORBIDDEN)
        if num_logprobs is None:
            return token_ids, None
        return token_ids, TopLogprobs(*top_logprobs(raw, token_ids.clamp(min=0), num_logprobs))

    def _max_num_logprobs(self, rows: Sequence[int], vocab_size: int) -> int | None:
        asked = [self._num_logprobs[row] for row in rows if row in self._num_logprobs]
        if not asked:
            return None
        return vocab_size if -1 in asked else min(vocab_size, max(asked))

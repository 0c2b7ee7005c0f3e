"""`TokenHead`: the head of a generating engine, which computes logits and log-probabilities and draws new tokens."""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from ...kernels import top_logprobs
from ..device import HostCopies, HostCopy
from ..models.decoder import Decoder
from ..step_plan import NewRow, StepPlan
from ..structured.token_masks import TokenMasks
from .head import Draw, RunningStep
from .head_routing import route_head, routed_head
from .sampler import Sampler, TopLogprobs
from .tables import SentPlan, Tables

__all__ = ["MAX_PROMPT_LOGITS", "TokenHead"]

MAX_PROMPT_LOGITS = 512
"""Most prompt positions whose logits are in memory at once: 300 MB for a vocabulary of 150,000."""


class TokenHead:
    """Draws a token for every sequence that samples, and computes the log-probabilities that requests ask for.

    Args:
        model: The last pp stage of a model.
        tables: Tables of the running sequences, to which the drawn tokens are written.
    """

    def __init__(self, model: Decoder, tables: Tables) -> None:
        device = tables.tokens.device
        self._model = model
        self._tables = tables
        self._sampler = Sampler(len(tables.tokens), device)
        self._host_copies = HostCopies(device, are_read=model.parallel.reports)
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}

    def enter(self, new_rows: abc.Sequence[NewRow]) -> None:
        """As `Head.enter`."""
        for new in new_rows:
            self._prompt_logprobs.pop(new.row, None)
            if (num_logprobs := new.sequence.params.prompt_logprobs) is not None:
                self._prompt_logprobs[new.row] = (num_logprobs, new.sequence.num_prompt_tokens)
        if new_rows:
            self._sampler.set_rows([new.row for new in new_rows], [new.sequence for new in new_rows])

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan, draw: Draw | None = None) -> RunningStep:
        """As `Head.finish`."""
        prompt_logprobs = self._score_prompts(plan, hidden)
        if not any(plan.samples):
            return RunningStep(prompt_logprobs=prompt_logprobs)
        # In a decode step each sequence computes one token, so every token is the last of its sequence.
        num_seqs = len(plan.rows)
        is_decode = plan.num_tokens == num_seqs and all(plan.samples)
        ends = zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True)
        rows, lengths = zip(*((row, start + count) for row, start, count, samples in ends if samples), strict=True)
        routing = route_head(self._model, self._tables, rows)
        if draw is not None and is_decode and routing is None and self._only_draws(rows, lengths, plan.token_masks):
            # A copy, because the next draw overwrites the result, perhaps before it is on the host.
            token_ids = draw(hidden, sent.sequences)[:num_seqs].clone()
            return RunningStep(self._host_copies.start(token_ids), prompt_logprobs=prompt_logprobs)
        last = hidden[:num_seqs] if is_decode else hidden[sent.sampled[0]]
        with routed_head(self._model, routing):
            token_ids, logprobs = self._draw(last, rows, lengths, sent.sampled[1:], plan.token_masks)
        self._tables.append(sent.sampled, token_ids)
        logprobs_copy = None if logprobs is None else self._copy(logprobs)
        return RunningStep(self._host_copies.start(token_ids), logprobs_copy, prompt_logprobs)

    def draw(self, hidden: Tensor, sequences: Tensor) -> Tensor:
        """Draws a token for each sequence of a decode step and appends it, without a look at the step on the host.

        So the draw can be recorded. The step must be one for which `_only_draws` is true.

        Args:
            hidden: `[num_seqs, embedding_size]`, the hidden states of the step.
            sequences: `[4, num_seqs]` int32 as in `SentPlan`, padding included.

        Returns:
            Token ids `[num_seqs]` int64; those of padding have no meaning.
        """
        placed = self._tables.ends(sequences)
        if self._model.parallel.tp_size > 1:
            token_ids = self._draw_in_shards(hidden, placed, draws=True)
        else:
            token_ids = self._sampler.sample(self._model.compute_logits(hidden), placed)
        self._tables.append_all(sequences, token_ids)
        return token_ids

    def _only_draws(self, rows: abc.Sequence[int], lengths: abc.Sequence[int], masks: TokenMasks | None) -> bool:
        """Returns whether the step needs logits for the draw alone, and each rank those of its own columns alone.

        Ranks gather whole rows if a sequence of the step asks for an edit, a token mask or log-probabilities, which are
        computed for whole rows, or for top_k or top_p, whose limit depends on all columns.
        """
        has_all = self._model.parallel.tp_size == 1
        return self._sampler.only_draws(rows, lengths, masks) and (has_all or not self._sampler.filters(rows))

    def _draw(
        self,
        hidden: Tensor,
        rows: abc.Sequence[int],
        lengths: abc.Sequence[int],
        placed: Tensor,
        masks: TokenMasks | None,
    ) -> tuple[Tensor, TopLogprobs | None]:
        """Returns the results of `Sampler.draw` for the hidden states of some lines."""
        if self._model.parallel.tp_size > 1 and self._only_draws(rows, lengths, masks):
            return self._draw_in_shards(hidden, placed, draws=self._sampler.draws(rows)), None
        logits = self._model.compute_logits(hidden)
        return self._sampler.draw(logits, rows, lengths, placed, self._tables.tokens, masks)

    def _draw_in_shards(self, hidden: Tensor, placed: Tensor, *, draws: bool) -> Tensor:
        model = self._model
        logits = model.compute_own_logits(hidden)
        return self._sampler.draw_in_shards(logits, model.columns.start, placed, model.parallel, draws=draws)

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> dict[int, HostCopy]:
        """Returns the log-probabilities of prompt tokens by index in the plan, for the sequences that ask for them."""
        scores: dict[int, HostCopy] = {}
        if not self._prompt_logprobs:
            return scores
        offset = 0
        for i, (row, start, count) in enumerate(zip(plan.rows, plan.starts, plan.counts, strict=True)):
            num_logprobs, num_prompt_tokens = self._prompt_logprobs.get(row, (0, 0))
            num_scored = min(start + count, num_prompt_tokens - 1) - start
            if num_scored > 0:
                targets = self._tables.tokens[row, start + 1 : start + 1 + num_scored].long()
                states = hidden[offset : offset + num_scored]
                scores[i] = self._copy(self._score(states, row, targets, num_logprobs))
            offset += count
        return scores

    def _score(self, hidden: Tensor, row: int, targets: Tensor, num_logprobs: int) -> TopLogprobs:
        """Returns the log-probabilities of token `targets[i]` and of the most probable tokens for each `hidden[i]`.

        All of `hidden` are of the sequence in `row`.
        """
        vocab_size = self._model.spec.vocab_size
        num_logprobs = vocab_size if num_logprobs == -1 else min(num_logprobs, vocab_size)
        parts = []
        for states, ids in zip(hidden.split(MAX_PROMPT_LOGITS), targets.split(MAX_PROMPT_LOGITS), strict=True):
            with routed_head(self._model, route_head(self._model, self._tables, [row] * len(states))):
                parts.append(top_logprobs(self._model.compute_logits(states), ids, num_logprobs))
        return TopLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _copy(self, scores: TopLogprobs) -> HostCopy:
        return self._host_copies.start(scores.logprobs, scores.token_ids, scores.ranks)

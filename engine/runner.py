"""Runs step plans on one device: sends the plan, runs the model, samples, starts the results on their way back.

Nothing in `ModelRunner.execute` waits for the device. What the host must know is read from the `RunningStep`, as a rule
when the next step has been started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels import top_logprobs
from .batch import KVCache
from .device import HostCopies, HostCopy
from .kv_cache.layout import allocate_kv_cache
from .models.decoder import Decoder
from .models.stages import kv_cache_sizes
from .parallel import SINGLE, ParallelContext
from .sampler import Sampler, TopLogprobs
from .scheduler import StepPlan
from .tables import SentPlan, Tables

MAX_PROMPT_LOGITS = 512
"""Prompt positions whose logits exist at once: a vocabulary of 150,000 takes 300 MB for them."""


@dataclass(frozen=True, slots=True)
class HostLogprobs:
    """`TopLogprobs`, on the host.

    Attributes:
        logprobs: `[num_positions, k + 1]` float32; column 0 is the token itself, then the k most probable.
        token_ids: `[num_positions, k + 1]` int64.
        ranks: `[num_positions]` int64, of the token itself.
    """

    logprobs: np.ndarray
    token_ids: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, on the host.

    Attributes:
        token_ids: One for each sequence of the plan that samples, in order; negative where there is none.
        logprobs: Of those tokens, if any request asked.
        prompt_logprobs: Index in the plan -> of the prompt tokens after each computed position.
    """

    token_ids: list[int]
    logprobs: HostLogprobs | None = None
    prompt_logprobs: Mapping[int, HostLogprobs] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step whose work is queued on the device, and whose results will be on the host when it is done.

    Attributes:
        token_ids: `[num_samples]` int64; None if no sequence samples.
        logprobs: The fields of `TopLogprobs`, of those tokens; None if no request asked.
        prompt_logprobs: Index in the plan -> the same, of prompt tokens.
    """

    token_ids: HostCopy | None
    logprobs: HostCopy | None
    prompt_logprobs: Mapping[int, HostCopy]

    def is_ready(self) -> bool:
        """Returns whether `result` would not wait."""
        copies = (self.token_ids, self.logprobs, *self.prompt_logprobs.values())
        return all(copy is None or copy.is_ready() for copy in copies)

    def result(self) -> StepResult:
        """Waits for the step."""
        return StepResult(
            [] if self.token_ids is None else self.token_ids.wait()[0].tolist(),
            None if self.logprobs is None else HostLogprobs(*self.logprobs.wait()),
            {index: HostLogprobs(*copy.wait()) for index, copy in self.prompt_logprobs.items()},
        )


class DecodeRecorder(Protocol):
    """Runs decode steps from recordings: `DecodeGraphs` on a GPU, `DecodeTape` on a CPU."""

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns the number of sequences to which a step of so many is padded; None if none is recorded."""

    def run(self, sequences: Tensor, num_shared: Tensor | None) -> Tensor:
        """Runs a step of `[4, size]` sequences; returns its hidden states."""


MakeRecorder = Callable[[Callable[[Tensor, Tensor | None], Tensor]], DecodeRecorder]
"""Makes a recorder of a function that runs a decode step."""


class ModelRunner:
    """A model with its KV cache and its tables.

    Args:
        model: The model, weights loaded.
        device: Where it is.
        num_blocks: KV cache blocks.
        block_size: Tokens per block.
        max_num_seqs: Rows of the tables.
        max_model_len: Tokens a row can hold.
        dtype: Of the KV cache.
        make_recorder: Makes what records decode steps; None to run every kernel of every step by itself.
        parallel: This rank.
    """

    def __init__(
        self,
        model: Decoder,
        device: torch.device,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        dtype: torch.dtype,
        make_recorder: MakeRecorder | None = None,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        self.model = model
        num_layers, num_kv_heads, head_dim = kv_cache_sizes(model.spec, parallel)
        self.kv_cache: KVCache = allocate_kv_cache(
            num_layers, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=device
        )
        self._draws = parallel.is_last_stage
        self._tables = Tables(max_num_seqs, max_model_len, block_size, device)
        self._sampler = Sampler(max_num_seqs, device)
        self._host_copies = HostCopies(device)
        self._recorder = make_recorder(self._decode) if make_recorder else None
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> RunningStep:
        """Queues a step on the device.

        Args:
            plan: What to compute.

        Returns:
            The step; reading its result waits for it.
        """
        self._enter_rows(plan)
        hidden, sent = self._forward(plan)
        if not self._draws:
            return RunningStep(None, None, {})
        prompt_logprobs = self._score_prompts(plan, hidden)
        if not any(plan.samples):
            return RunningStep(None, None, prompt_logprobs)
        # Where each sequence computed one token, as it decodes, the last tokens are all tokens.
        num_seqs = len(plan.rows)
        is_decode = plan.num_tokens == num_seqs and all(plan.samples)
        last = hidden[:num_seqs] if is_decode else hidden[sent.sampled[0]]
        logits = self.model.compute_logits(last)
        ends = zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True)
        rows, lengths = zip(*((row, start + count) for row, start, count, samples in ends if samples), strict=True)
        token_ids, logprobs = self._sampler.draw(
            logits, rows, lengths, sent.sampled[1:], self._tables.tokens, plan.token_masks
        )
        self._tables.append(sent.sampled, token_ids)
        logprobs_copy = None if logprobs is None else self._copy(logprobs)
        return RunningStep(self._host_copies.start(token_ids), logprobs_copy, prompt_logprobs)

    def _enter_rows(self, plan: StepPlan) -> None:
        """Takes over the parameters of the requests that enter."""
        for new in plan.new_rows:
            self._prompt_logprobs.pop(new.row, None)
            if (num_logprobs := new.request.params.prompt_logprobs) is not None:
                self._prompt_logprobs[new.row] = (num_logprobs, new.request.num_prompt_tokens)
        if plan.new_rows:
            self._sampler.set_rows([new.row for new in plan.new_rows], [new.request for new in plan.new_rows])

    def _forward(self, plan: StepPlan) -> tuple[Tensor, SentPlan]:
        """Runs the model: from a recording if every sequence computes one token, and there is one of the size."""
        num_seqs = len(plan.rows)
        size = self._recorder.padded_size(num_seqs) if self._recorder and plan.num_decodes == num_seqs else None
        sent = self._tables.send(plan, size or num_seqs)
        num_shared = sent.num_shared if plan.num_shared_blocks else None
        if self._recorder and size:
            return self._recorder.run(sent.sequences, num_shared), sent
        longest = max(map(sum, zip(plan.starts, plan.counts, strict=True)))
        max_blocks = -(-longest // self._tables.block_size)
        batch = self._tables.gather(sent.sequences, plan.num_tokens, max_blocks, plan.num_decodes, num_shared)
        return self.model(batch, self.kv_cache), sent

    def _decode(self, sequences: Tensor, num_shared: Tensor | None) -> Tensor:
        """Runs a decode step whose every size is fixed: it serves sequences of any length."""
        num_seqs = sequences.shape[1]
        batch = self._tables.gather(sequences, num_seqs, self._tables.max_blocks, num_seqs, num_shared)
        hidden: Tensor = self.model(batch, self.kv_cache)
        return hidden

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> dict[int, HostCopy]:
        """Computes the log-probabilities of prompt tokens, for the sequences that ask for them."""
        scores: dict[int, HostCopy] = {}
        if not self._prompt_logprobs:
            return scores
        offset = 0
        for i, (row, start, count) in enumerate(zip(plan.rows, plan.starts, plan.counts, strict=True)):
            num_logprobs, num_prompt_tokens = self._prompt_logprobs.get(row, (0, 0))
            num_scored = min(start + count, num_prompt_tokens - 1) - start
            if num_scored > 0:
                targets = self._tables.tokens[row, start + 1 : start + 1 + num_scored].long()
                scores[i] = self._copy(self._score(hidden[offset : offset + num_scored], targets, num_logprobs))
            offset += count
        return scores

    def _score(self, hidden: Tensor, targets: Tensor, num_logprobs: int) -> TopLogprobs:
        """Scores the tokens that follow some positions, a few positions at a time."""
        vocab_size = self.model.spec.vocab_size
        num_logprobs = vocab_size if num_logprobs == -1 else min(num_logprobs, vocab_size)
        parts = [
            top_logprobs(self.model.compute_logits(states), ids, num_logprobs)
            for states, ids in zip(hidden.split(MAX_PROMPT_LOGITS), targets.split(MAX_PROMPT_LOGITS), strict=True)
        ]
        return TopLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _copy(self, scores: TopLogprobs) -> HostCopy:
        return self._host_copies.start(scores.logprobs, scores.token_ids, scores.ranks)

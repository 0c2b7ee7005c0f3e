"""Runs step plans on one device: fills the tables, builds the batch, runs the model, samples.

Every running request owns a row of two tables that stay on the device: its tokens, and its block table. A plan sends
what is new; a sampled token is written into its row on the device, so the next step can read it before the host does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels import top_logprobs
from .batch import ForwardBatch, KVCache
from .device import HostCopy
from .kv_cache.layout import allocate_kv_cache
from .models.decoder import Decoder
from .sampler import Sampler, TopLogprobs
from .scheduler import StepPlan

MAX_PROMPT_LOGITS = 512
"""Prompt positions whose logits exist at once: a vocabulary of 150,000 takes 300 MB for them."""


@dataclass(slots=True)
class StepResult:
    """What a step gave, on the host.

    Attributes:
        token_ids: One for each sequence of the plan that samples, in order; negative where there is none.
        logprobs: Of those tokens, if any request asked.
        prompt_logprobs: Index in the plan -> of the prompt tokens after each computed position.
    """

    token_ids: list[int]
    logprobs: TopLogprobs | None
    prompt_logprobs: dict[int, TopLogprobs]


class RunningStep:
    """A step whose work is queued on the device.

    Args:
        token_ids: `[num_samples]` int64, on the device.
        logprobs: Of those tokens.
        prompt_logprobs: Index in the plan -> of prompt tokens.
    """

    def __init__(
        self, token_ids: Tensor, logprobs: TopLogprobs | None, prompt_logprobs: dict[int, TopLogprobs]
    ) -> None:
        self._token_ids = HostCopy(token_ids)
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs

    def result(self) -> StepResult:
        """Waits for the sampled tokens."""
        return StepResult(self._token_ids.wait().tolist(), self._logprobs, self._prompt_logprobs)


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
    ) -> None:
        self.model = model
        self.device = device
        self.block_size = block_size
        spec = model.spec
        self.kv_cache: KVCache = allocate_kv_cache(
            spec.num_layers, num_blocks, spec.num_kv_heads, block_size, spec.head_dim, dtype=dtype, device=device
        )
        max_blocks = -(-max_model_len // block_size)
        self._token_table = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int32, device=device)
        self._block_table = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._sampler = Sampler(max_num_seqs, device)
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> RunningStep:
        """Queues a step on the device.

        Args:
            plan: What to compute.

        Returns:
            The step; reading its result waits for it.
        """
        self._fill_tables(plan)
        batch = self._build_batch(plan)
        hidden = self.model(batch, self.kv_cache)
        prompt_logprobs = self._score_prompts(plan, hidden)
        sampled = [i for i, samples in enumerate(plan.samples) if samples]
        if not sampled:
            return RunningStep(torch.empty(0, dtype=torch.int64), None, prompt_logprobs)
        last = np.cumsum(plan.counts)[sampled] - 1
        logits = self.model.compute_logits(hidden[torch.from_numpy(last).to(self.device)])
        rows = [plan.rows[i] for i in sampled]
        lengths = [plan.starts[i] + plan.counts[i] for i in sampled]
        token_ids, logprobs = self._sampler.draw(logits, rows, lengths, self._token_table)
        where = (torch.tensor(rows, device=self.device), torch.tensor(lengths, device=self.device))
        # A row whose logits hold NaN must still leave a token that exists: a step that is planned ahead reads it.
        self._token_table[where] = token_ids.clamp(min=0).int()
        return RunningStep(token_ids, logprobs, prompt_logprobs)

    def _fill_tables(self, plan: StepPlan) -> None:
        """Writes what is new: the tokens and parameters of rows that change hands, and the blocks that were added."""
        for new in plan.new_rows:
            token_ids = torch.tensor(new.request.token_ids[: new.num_tokens], dtype=torch.int32)
            self._token_table[new.row, : new.num_tokens] = token_ids.to(self.device)
            self._prompt_logprobs.pop(new.row, None)
            if new.request.params.prompt_logprobs is not None:
                num_logprobs = new.request.params.prompt_logprobs
                self._prompt_logprobs[new.row] = (num_logprobs, new.request.num_prompt_tokens)
        if plan.new_rows:
            self._sampler.set_rows([new.row for new in plan.new_rows], [new.request for new in plan.new_rows])
        if plan.new_blocks:
            rows = [row for row, _, blocks in plan.new_blocks for _ in blocks]
            columns = [first + i for _, first, blocks in plan.new_blocks for i in range(len(blocks))]
            values = [block for _, _, blocks in plan.new_blocks for block in blocks]
            where = torch.tensor([rows, columns], device=self.device)
            self._block_table[where[0], where[1]] = torch.tensor(values, dtype=torch.int32, device=self.device)

    def _build_batch(self, plan: StepPlan) -> ForwardBatch:
        """Derives the step's tensors from the tables; the host sends three numbers per sequence."""
        rows, starts, counts = torch.tensor([plan.rows, plan.starts, plan.counts]).to(self.device)
        num_tokens = plan.num_tokens
        query_start_loc = torch.zeros(len(plan.rows) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=query_start_loc[1:])
        sequence = torch.repeat_interleave(counts, output_size=num_tokens)
        positions = torch.arange(num_tokens, device=self.device) - (query_start_loc[:-1] - starts)[sequence]
        row = rows[sequence]
        block = self._block_table[row, positions // self.block_size]
        max_blocks = -(-max(map(sum, zip(plan.starts, plan.counts, strict=True))) // self.block_size)
        return ForwardBatch(
            token_ids=self._token_table[row, positions].long(),
            positions=positions,
            slot_mapping=block.long() * self.block_size + positions % self.block_size,
            query_start_loc=query_start_loc.int(),
            seq_lens=(starts + counts).int(),
            block_tables=self._block_table[rows, :max_blocks],
        )

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> dict[int, TopLogprobs]:
        """Computes the log-probabilities of prompt tokens, for the sequences that ask for them."""
        scores: dict[int, TopLogprobs] = {}
        if not self._prompt_logprobs:
            return scores
        offset = 0
        for i, (row, start, count) in enumerate(zip(plan.rows, plan.starts, plan.counts, strict=True)):
            num_logprobs, num_prompt_tokens = self._prompt_logprobs.get(row, (0, 0))
            num_scored = min(start + count, num_prompt_tokens - 1) - start
            if num_scored > 0:
                targets = self._token_table[row, start + 1 : start + 1 + num_scored].long()
                scores[i] = self._score(hidden[offset : offset + num_scored], targets, num_logprobs)
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

"""`ModelRunner`: runs step plans on one device: sends the plan, runs the model, passes hidden states to the head.

`ModelRunner.execute` never waits for the device. The host reads the results from the `RunningStep`, usually after it
has started the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ..batch import ForwardBatch, GivenEmbeddings, KVCache
from ..embeds.rows import SpanRows
from ..kv_cache.layout import allocate_kv_cache
from ..kv_cache.states import allocate_states
from ..lora.routing import Routing
from ..models.decoder import Decoder
from ..models.pp_stages import cache_groups, cache_shape, state_shape
from ..parallel.context import SINGLE, ParallelContext
from ..step_plan import StepPlan
from .head import Draw, Head, RunDecode, RunningStep
from .tables import SentPlan, Tables
from .token_head import TokenHead


class DecodeRecorder(Protocol):
    """Runs decode steps from recordings: `DecodeGraphs` on a GPU, `DecodeTape` on a CPU."""

    @property
    def draw(self) -> Draw | None:
        """Runs the draw of a decode step from a recording; None if draws are not recorded."""

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns the size to which a step of `num_seqs` sequences is padded; None if no recording can run it."""

    def run(self, sequences: Tensor, num_shared: Tensor | None, routing: Tensor | None) -> Tensor:
        """Runs a decode step as `RunDecode` does."""

    def close(self) -> None:
        """Frees the recordings; no step is run afterwards."""


MakeRecorder = Callable[[RunDecode, Draw | None], DecodeRecorder]
"""Makes a recorder from a function that runs a decode step, and one that draws its tokens (or None)."""

MakeHead = Callable[[Decoder, Tables], Head]
"""Makes the head from a model and the tables of the running sequences."""


class ModelRunner:
    """Runs step plans on a device, with a model, its KV cache and the tables of the running sequences.

    Args:
        model: The model, with its weights loaded.
        device: Device of the model.
        num_blocks: Number of KV cache blocks.
        block_size: Tokens per block.
        max_num_seqs: Number of rows of the tables.
        max_model_len: Most tokens of a row.
        dtype: Number type of the KV cache.
        make_recorder: Makes the recorder of decode steps; None to launch every kernel of every step separately.
        make_head: Makes the head; called in the last pp stage.
        parallel: The place of this rank among all ranks.
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
        make_head: MakeHead = TokenHead,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        self.model = model
        shape = cache_shape(model.spec, parallel)
        self.kv_cache: KVCache = allocate_kv_cache(shape, num_blocks, block_size, dtype=dtype, device=device)
        states = state_shape(model.spec, parallel)
        self.kv_cache += allocate_states(states, max_num_seqs, dtype=model.dtype, device=device)
        num_groups = max(1, len(cache_groups(model.spec)))
        self._tables = Tables(max_num_seqs, max_model_len, block_size, device, num_groups)
        self._spans = SpanRows(device) if parallel.is_first_stage else None
        self._head = make_head(model, self._tables) if parallel.is_last_stage else None
        draw = self._head.draw if self._head else None
        self._recorder = make_recorder(self._decode, draw) if make_recorder else None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> RunningStep:
        """Queues a step on the device.

        Args:
            plan: The step plan.

        Returns:
            The running step, from which the results are read; empty in a pp stage that is not the last.
        """
        if self._head is not None:
            self._head.enter(plan.new_rows)
        self._enter_adapters(plan)
        hidden, sent, draw = self._forward(plan)
        if self._head is None:
            return RunningStep()
        return self._head.finish(plan, hidden, sent, draw)

    def close(self) -> None:
        """Frees the recordings of decode steps, which must come before the ranks close their connections."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _forward(self, plan: StepPlan) -> tuple[Tensor, SentPlan, Draw | None]:
        """Sends the plan and runs the model, if possible from a recording.

        Returns:
            The hidden states, the sent plan, and the recorded draw if the step was run from a recording.
        """
        num_seqs = len(plan.rows)
        given = self._find_embeddings(plan)
        is_decode = plan.num_decodes == num_seqs and given is None and self._can_record(plan)
        size = self._recorder.padded_size(num_seqs) if self._recorder and is_decode else None
        sent = self._tables.send(plan, size or num_seqs)
        num_shared = sent.num_shared if plan.num_shared_blocks else None
        if self._recorder and size:
            routing = self._route(plan, size)
            packed = None if routing is None else routing.packed
            return self._recorder.run(sent.sequences, num_shared, packed), sent, self._recorder.draw
        longest = max(map(sum, zip(plan.starts, plan.counts, strict=True)))
        max_blocks = -(-longest // self._tables.block_size)
        batch = self._tables.gather(sent.sequences, plan.num_tokens, max_blocks, plan.num_decodes, num_shared, given)
        types = self._tables.token_types(plan) if self.model.spec.num_token_types else None
        batch = replace(batch, longest_prompt=plan.longest_prompt, token_types=types)
        return self._run_model(batch, self._route(plan, plan.num_tokens)), sent, None

    def _find_embeddings(self, plan: StepPlan) -> GivenEmbeddings | None:
        """Returns the embeddings that prompts give for tokens of this step; None in a pp stage that does not embed."""
        if self._spans is None:
            return None
        self._spans.enter(plan.new_rows)
        return self._spans.find(plan)

    def _enter_adapters(self, plan: StepPlan) -> None:
        """Uploads the adapters that enter slots in this step, and notes the adapter slot of each new row."""
        if self.model.adapters is None:
            return
        for new in plan.new_adapters:
            self.model.adapters.load(new.slot, new.adapter)
        for row in plan.new_rows:
            self._tables.adapter_slots[row.row] = row.sequence.adapter_slot

    def _can_record(self, plan: StepPlan) -> bool:
        """Returns whether the adapters of a step let it run from a recording."""
        adapters = self.model.adapters
        return adapters is None or adapters.can_record(self._tables.adapter_slots[plan.rows])

    def _route(self, plan: StepPlan, num_tokens: int) -> Routing | None:
        """Returns the routing of a step that is padded to `num_tokens` tokens; None if none has an adapter."""
        if self.model.adapters is None:
            return None
        slots = np.repeat(self._tables.adapter_slots[plan.rows], plan.counts)
        return self.model.adapters.route(slots, num_tokens, self._tables.tokens.device)

    def _run_model(self, batch: ForwardBatch, routing: Routing | None) -> Tensor:
        """Runs the model on the tokens of a step."""
        if self.model.adapters is None or routing is None:
            return cast("Tensor", self.model(batch, self.kv_cache))
        with self.model.adapters.routed(routing):
            return cast("Tensor", self.model(batch, self.kv_cache))

    def _decode(self, sequences: Tensor, num_shared: Tensor | None, packed: Tensor | None = None) -> Tensor:
        """Runs a decode step whose shapes depend on the number of sequences only, so one recording fits all lengths."""
        num_seqs = sequences.shape[1]
        batch = self._tables.gather(sequences, num_seqs, self._tables.max_blocks, num_seqs, num_shared)
        adapters = self.model.adapters
        routing = None if packed is None or adapters is None else Routing(packed, adapters.sizes.num_slots)
        return self._run_model(batch, routing)

"""`start_rehearsal`: compiles the Triton kernels of a model while its weights are read.

A rehearsal is a few steps on the meta device, where tensors have shapes but no memory. They launch each kernel that the
engine will launch, in each form that its steps can ask for, and a launch there only compiles (`kernels/ahead.py`).
Without it the first steps would wait for 20 to 30 compilations of a second or more.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.ahead import compile_launches
from ..config import EngineConfig
from ..device import Device, share_current_device
from ..lora.routing import NO_SLOT
from ..models import ModelOptions, build_model
from ..parallel.context import ParallelContext
from ..sampling_params import SamplingParams
from ..sequence import Sequence as EngineSequence
from ..step.runner import ModelRunner
from ..step_plan import NewRow, StepPlan
from ..tasks.task import Task
from .capacity import choose_max_model_len

__all__ = ["Rehearsal", "start_rehearsal"]

logger = logging.getLogger(__name__)

META = torch.device("meta")
MAX_THREADS = 8
"""Most threads that compile, beside the threads that read weights."""
PROMPT_TOKENS = 48
"""Number of tokens of the prompt of a rehearsal; prompts of all lengths use the same kernels."""
MIN_CHUNK = 2
"""Fewest tokens of a step of a sequence that is not a decode."""
SLOT_TOKENS = 64
"""Number of tokens for each adapter slot from which on the products of adapters have their largest tiles."""
GROWTH = 4
"""Factor from one length of a rehearsal to the next: attention splits the keys of a longer sequence over more programs,
and the kernel that merges their results has forms for 4, 16 and 64 of them."""


def start_rehearsal(rehearsal: Rehearsal, device: Device) -> Callable[[], None]:
    """Starts to compile the kernels of a rehearsal in threads, and returns a function that waits for the end.

    Nothing happens on a CPU, or without Triton. If the rehearsal fails, a warning is logged, and the kernels are
    compiled when they are first launched.

    Args:
        rehearsal: The steps.
        device: Device of the engine.
    """
    if device.is_cpu or importlib.util.find_spec("triton") is None:
        return lambda: None
    thread = threading.Thread(target=_compile, args=(rehearsal, share_current_device()), name="rehearsal", daemon=True)
    thread.start()
    return thread.join


def _compile(rehearsal: Rehearsal, enter_thread: Callable[[], None]) -> None:
    """Compiles the kernels of a rehearsal."""
    begin_s = time.monotonic()
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    try:
        enter_thread()
        num_kernels = compile_launches(rehearsal.run, num_threads, enter_thread)
    except Exception as error:  # noqa: BLE001  # The engine works without it; a real fault shows at the first launch.
        logger.warning(
            "kernels are not compiled ahead, so the first steps will wait for it: %s: %s", type(error).__name__, error
        )
        return
    logger.info("%d kernels were compiled ahead in %.1f s", num_kernels, time.monotonic() - begin_s)


class _NoStages:
    """Stands for the neighbouring pp stages in a rehearsal."""

    def send(self, tensor: Tensor) -> None:
        """Drops the tensor."""

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a tensor without content."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def close(self) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The steps of an engine that launch all of its kernels.

    Attributes:
        config: Settings of the engine.
        hf_config: The transformers config of the model.
        task: The task of the engine.
        options: The user's options for the model.
        dtype: Number type of weights and activations.
        kv_dtype: Number type of the KV cache.
        max_num_seqs: Most sequences of a step.
        parallel: The place of this rank among all ranks.
    """

    config: EngineConfig
    hf_config: Any
    task: Task
    options: ModelOptions
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_num_seqs: int
    parallel: ParallelContext

    @torch.inference_mode()
    def run(self) -> None:
        """Runs the steps on the meta device."""
        place = ParallelContext.of_rank(self.parallel.rank, self.parallel.tp_size, self.parallel.pp_size)
        alone = replace(place, stages=_NoStages() if place.pp_size > 1 else None)
        model = build_model(self.hf_config, self.dtype, META, self.options, alone)
        max_model_len = choose_max_model_len(self.config, model.spec.max_position_embeddings)
        runner = ModelRunner(
            model,
            META,
            num_blocks=2,
            block_size=self.config.block_size,
            max_num_seqs=self.max_num_seqs,
            max_model_len=max_model_len,
            dtype=self.kv_dtype,
            make_head=self.task.make_head,
            parallel=alone,
        )
        for plan in self.plans(max_model_len):
            runner.execute(plan)

    def plans(self, max_model_len: int) -> Iterator[StepPlan]:
        """Yields the steps: a prompt, a chunk, decodes of several lengths, with a shared prefix, and of all rows.

        With adapters, the last steps are those of one token, of a prompt and of many prompts with an adapter.
        """
        prompt = _plan(1, 0, min(PROMPT_TOKENS, max_model_len))
        prompt.new_rows = self._new_rows(NO_SLOT)
        yield prompt
        if max_model_len > MIN_CHUNK:
            yield _plan(1, 1, min(PROMPT_TOKENS, max_model_len) - 1)  # Latents of a context are not expanded.
        length = 1
        while length < max_model_len:
            yield _plan(1, length - 1, 1)
            length *= GROWTH
        yield _plan(self.max_num_seqs, max_model_len - 1, 1)
        if self.config.enable_prefix_caching:
            yield replace(_plan(self.max_num_seqs, max_model_len - 1, 1), num_shared_blocks=1)
        if self.config.enable_lora:
            yield replace(_plan(1, 0, 1), new_rows=self._new_rows(0))
            yield _plan(1, 0, min(PROMPT_TOKENS, max_model_len))
            many = -(-SLOT_TOKENS * self.config.max_loras // self.max_num_seqs)
            yield _plan(self.max_num_seqs, 0, min(max(many, MIN_CHUNK), max_model_len))

    def _new_rows(self, adapter_slot: int) -> list[NewRow]:
        """Returns sequences for all rows, with the adapter in a slot or with none."""
        return [NewRow(row, _drawing_sequence(adapter_slot), 1) for row in range(self.max_num_seqs)]


def _plan(num_seqs: int, start: int, count: int) -> StepPlan:
    """Returns a step in which each sequence computes `count` tokens from position `start` on, and draws one."""
    return StepPlan(
        rows=list(range(num_seqs)),
        starts=[start] * num_seqs,
        counts=[count] * num_seqs,
        samples=[True] * num_seqs,
        num_decodes=num_seqs if count == 1 else 0,
    )


def _drawing_sequence(adapter_slot: int) -> EngineSequence:
    """Returns a sequence of one token that draws at random and asks for log-probabilities."""
    params = SamplingParams(temperature=1.0, logprobs=1)
    return EngineSequence(
        "rehearsal",
        0,
        params,
        0,
        [0],
        num_prompt_tokens=1,
        max_tokens_total=2,
        stop_token_ids={},
        adapter_slot=adapter_slot,
    )

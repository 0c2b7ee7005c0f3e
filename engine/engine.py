"""The engine: requests in, finished outputs out, one step at a time.

`step` plans, runs and reads. With an overlap depth of 1 it starts step N + 1 before it reads step N, so that a device
never waits for the host; with 0 the two take turns. It is the same loop.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .device import Device
from .embeds.prompts import PromptEmbeds
from .errors import ConfigError, EngineDeadError, ModelExecutionError, RequestError
from .executor.executor import Executor, InProcessExecutor, StepHandle
from .inputs import PromptReader
from .kv_cache import KVCacheManager
from .loading.capacity import Capacity
from .loading.generation_config import recommended_params
from .loading.model_source import resolve_model
from .request import EngineOutput, Request
from .sampling_params import SamplingParams
from .scheduler import Scheduler, SchedulerCounters
from .sequence import Sequence
from .step.head import StepResult
from .step_plan import StepPlan
from .tasks.choose import choose_task
from .tasks.task import RequestHandler, Task
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .parallel.rendezvous import Rendezvous

logger = logging.getLogger(__name__)

MAX_SITTING_OUT = 0.25
"""Share of a step's sequences that may sit the next one out, because they follow grammars, so that it is planned ahead.

With t the time of a step and h that of planning it, two steps ahead give 2 f + c tokens in 2 t, and two steps in turn
2 f + 2 c in 2 (t + h), of f free sequences and c others: turns are better from c / (2 f + c) = h / t on.
"""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing and has done.

    Attributes:
        num_running: Requests that hold KV cache.
        num_waiting: Requests that hold none.
        kv_cache_usage: Share of the KV cache blocks in use, 0 to 1.
        step_time_s: Seconds spent in steps.
        counters: What the scheduler counted.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    step_time_s: float
    counters: SchedulerCounters


@dataclass(slots=True)
class RequestGroup:
    """The sequences of one request."""

    request: Request
    sequences: list[Sequence]
    num_unfinished: int


@dataclass(frozen=True, slots=True)
class FailedStep:
    """A step that could not even be started; its error comes out where any step's does."""

    error: Exception

    def result(self) -> StepResult:
        """Raises what the start raised."""
        raise self.error


@dataclass(slots=True)
class LLMEngine:
    """One model on one device.

    Use `LLMEngine.from_config`; the constructor takes the parts, which lets tests replace them.

    Attributes:
        config: Settings.
        tokenizer: The model's tokenizer; None if skipped.
        default_params: For requests that bring none.
        handler: Serves requests, as the task of the engine does.
        scheduler: Plans steps.
        executor: Runs them.
        overlap_depth: Steps planned ahead.
    """

    config: EngineConfig
    tokenizer: Tokenizer | None
    default_params: SamplingParams
    handler: RequestHandler[Any, Any]
    scheduler: Scheduler
    executor: Executor
    overlap_depth: int = 0
    _groups: dict[str, RequestGroup] = field(default_factory=dict)
    _in_flight: deque[tuple[StepPlan, StepHandle]] = field(default_factory=deque)
    _step_time_s: float = 0.0
    _is_closed: bool = False

    @classmethod
    def from_config(cls, config: EngineConfig, rendezvous: Rendezvous | None = None) -> LLMEngine:
        """Loads a model and makes its engine.

        Args:
            config: Settings.
            rendezvous: Where the other ranks of a parallel engine come to (`worker.run_worker`); None to start them as
                processes on this host.

        Raises:
            UserError: A setting, the model folder or the tokenizer cannot be used.
            EngineDeadError: A rank did not come, or has ended.
        """
        from .models import describe_model, load_hf_config
        from .models.stages import cache_groups

        starts_ranks = config.num_ranks > 1 and rendezvous is None
        device = Device.choose(config.device, 0 if starts_ranks else None)
        folder = resolve_model(config.model)
        hf_config = load_hf_config(folder, config.hf_overrides)
        tokenizer = None
        if not config.skip_tokenizer_init:
            own = folder if config.tokenizer is None else resolve_model(config.tokenizer, "tokenizer")
            tokenizer = Tokenizer(own, config.chat_template)
        task = choose_task(config, hf_config)
        num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
        spec = describe_model(hf_config)
        executor, capacity = _open_executor(config, device, hf_config, task, rendezvous)
        dtype = device.resolve_dtype(config.dtype, hf_config.dtype)
        prompt_embeds = PromptEmbeds(spec.embedding_size, dtype) if config.enable_prompt_embeds else None
        return cls(
            config=config,
            tokenizer=tokenizer,
            default_params=recommended_params(config),
            handler=task.make_handler(PromptReader(tokenizer, spec.vocab_size, capacity.max_model_len, prompt_embeds)),
            scheduler=Scheduler(
                KVCacheManager(
                    capacity.num_blocks,
                    config.block_size,
                    config.enable_prefix_caching,
                    [group.cache for group in cache_groups(spec)],
                ),
                config.max_num_seqs,
                num_tokens,
                config.pipeline_parallel_size,
            ),
            executor=executor,
            overlap_depth=_overlap_depth(config, device),
        )

    @property
    def task(self) -> Task:
        """What the engine is for."""
        return self.handler.task

    def add_request(self, request: Request) -> None:
        """Takes a request.

        Args:
            request: With an id that no unfinished request has.

        Raises:
            UserError: The request cannot be run; nothing of it stays.
            EngineDeadError: The engine is closed.
        """
        if self._is_closed:
            raise EngineDeadError("this engine is closed and its model is freed; construct another one")
        if request.request_id in self._groups:
            raise ConfigError(f"request id {request.request_id!r} is in use; give each unfinished request its own")
        sequences = self.handler.open(request)
        self._groups[request.request_id] = RequestGroup(request, sequences, len(sequences))
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests; they give no output. Unknown and finished ids are fine."""
        for request_id in request_ids:
            group = self._groups.pop(request_id, None)
            for sequence in group.sequences if group else ():
                self.scheduler.abort(sequence)

    def step(self) -> list[EngineOutput]:
        """Runs one step.

        Returns:
            The requests that finished in it, well or with an error.
        """
        start_s = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._start(plan)))
        assert self._in_flight or not self._groups, "requests wait, and none of them can ever run"
        ended: list[Sequence] = []
        most_unread = self._most_unread(plan)
        while len(self._in_flight) > most_unread:
            ended += self._read_step()
        outputs = [output for request in ended for output in self._close_sequence(request)]
        while self._in_flight and not self.has_unfinished_requests():
            # Only wasted tokens are in flight; but whether their steps succeeded says what the prefix cache is worth.
            self._read_step()
        self._step_time_s += time.perf_counter() - start_s
        return outputs

    def reset(self) -> None:
        """Drops all requests and forgets the prefix cache.

        For after an interrupt: that may come between any two halves of a change, so no state in between is trusted.
        """
        self._groups.clear()
        self._in_flight.clear()
        self.scheduler.reset()

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes; requests that run keep what they hold."""
        self.scheduler.kv_cache.pool.forget_all()

    def save_sharded_state(self, folder: str | Path) -> None:
        """Writes each rank's part of the weights to files of its own, which start faster than a checkpoint.

        Args:
            folder: Where to; made if absent. It is then a model folder for `load_format="sharded_state"` and the same
                numbers of ranks.

        Raises:
            ConfigError: The engine has read no checkpoint, or the folder is where it is.
        """
        from .weights.sharded_state import copy_model_files

        source, target = resolve_model(self.config.model).resolve(), Path(folder).resolve()
        if self.config.load_format != "auto" or source == target:
            raise ConfigError(
                f"save_sharded_state cuts a checkpoint that load_format='auto' has read, into another folder; got "
                f"load_format={self.config.load_format!r} and folder {target}"
            )
        target.mkdir(parents=True, exist_ok=True)
        self.executor.save_sharded_state(self.config, target)
        copy_model_files(source, target)

    def has_unfinished_requests(self) -> bool:
        """Returns whether any request has not given its output yet."""
        return bool(self._groups)

    def stats(self) -> EngineStats:
        """Returns what the engine is doing and has done."""
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=scheduler.kv_cache.usage,
            step_time_s=self._step_time_s,
            counters=scheduler.counters,
        )

    def check_integrity(self) -> None:
        """Checks that nothing is lost, doubled or leaked.

        Raises:
            AssertionError: Something is.
        """
        self.scheduler.check_integrity()
        if not self.has_unfinished_requests():
            num_used = self.scheduler.kv_cache.pool.num_used
            assert num_used == 0, f"the engine is idle and {num_used} KV cache blocks are in use"

    def close(self) -> None:
        """Drops all requests and frees the model and the KV cache."""
        self.abort(list(self._groups))
        self._in_flight.clear()
        self._is_closed = True
        self.executor.close()
        gc.collect()

    def _most_unread(self, plan: StepPlan | None) -> int:
        """Returns how many steps may be left unread before the next one is planned, after a plan."""
        if plan is None:
            return max(0, len(self._in_flight) - 1)
        masks = plan.token_masks
        if masks is None or self.config.pipeline_parallel_size > 1:
            return self.overlap_depth
        return self.overlap_depth if len(masks.indices) < MAX_SITTING_OUT * len(plan.sequences) else 0

    def _start(self, plan: StepPlan) -> StepHandle:
        try:
            self.handler.prepare(plan)
            return self.executor.execute(plan)
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001  # Whatever a model raises must not take the other requests along.
            return FailedStep(error)

    def _read_step(self) -> list[Sequence]:
        """Reads the oldest step in flight; a failed one is taken apart to find the request that makes it fail."""
        plan, handle = self._in_flight.popleft()
        try:
            result = handle.result()
        except EngineDeadError:
            raise
        except Exception as error:  # As above.
            plans = [plan, *(later for later, _ in self._in_flight)]
            self._in_flight.clear()
            if not plan.sequences[0].is_suspect:
                logger.warning("a step of %d requests failed", len(plan.sequences), exc_info=error)
            cause = ModelExecutionError(f"the model failed on this request: {type(error).__name__}: {error}")
            return self.scheduler.recover(plans, RequestError.from_exception(cause))
        self.handler.record(plan, result)
        return self.scheduler.update(plan, result.drawn, result.num_drawn)

    def _close_sequence(self, sequence: Sequence) -> list[EngineOutput]:
        """Counts a sequence as ended; returns the request's output if it was the last or the first to fail."""
        group = self._groups.get(sequence.request_id)
        if group is None:
            return []
        group.num_unfinished -= 1
        if sequence.error is None and group.num_unfinished:
            return []
        del self._groups[sequence.request_id]
        for other in group.sequences:
            self.scheduler.abort(other)
        return [self.handler.make_output(group.request, group.sequences)]


def _open_executor(
    config: EngineConfig, device: Device, hf_config: Any, task: Task, rendezvous: Rendezvous | None
) -> tuple[Executor, Capacity]:
    """Loads the model, here or on many ranks; returns what runs it, and its limits."""
    from .loading.runner import load_runner, prepare_host

    if config.num_ranks > 1:
        from .executor.distributed import start_ranks

        return start_ranks(config, device, hf_config, task, rendezvous)
    prepare_host(config, device)
    num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    runner, capacity = load_runner(config, device, hf_config, task, num_tokens)
    return InProcessExecutor(runner), capacity


def _overlap_depth(config: EngineConfig, device: Device) -> int:
    """Returns how many steps to plan ahead: of several stages, each is to have one."""
    if config.pipeline_parallel_size > 1:
        return config.pipeline_parallel_size - 1
    return device.overlap_depth if config.overlap_depth is None else config.overlap_depth

"""`LLMEngine`: takes requests and returns the outputs of finished ones, one step at a time.

`LLMEngine.step` plans a step, starts it, and reads the results of the oldest step. With an overlap depth of 1 it starts
step N + 1 before it reads the results of step N, so that the device never waits for the host. With an overlap depth of
0 it reads the results of every step before it plans the next one. Both cases run the same loop.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .device import Device
from .embeds.prompts import PromptEmbeds
from .errors import ConfigError, EngineDeadError, ModelExecutionError, RequestError
from .executor.executor import Executor, InProcessExecutor, StepHandle
from .inputs import PromptReader
from .kv_cache import KVCacheManager
from .loading.capacity import Capacity, fit_to_model
from .loading.generation_config import recommended_params
from .loading.model_source import resolve_model, resolve_tokenizer, warn_of_unused
from .lora.adapter import Adapter
from .lora.files import locate_adapter
from .lora.library import AdapterLibrary
from .lora.reader import read_adapter
from .lora.request import LoRARequest, check_lora_request
from .request import EngineOutput, Request
from .sampling_params import SamplingParams
from .scheduler import Scheduler, SchedulerCounters
from .sequence import Sequence
from .step.head import StepResult
from .step_plan import StepPlan
from .tasks.choose import choose_task
from .tasks.task import RequestHandler, Task
from .text.adapter_texts import ModelTexts
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from .parallel.rendezvous import Rendezvous

logger = logging.getLogger(__name__)

MAX_GRAMMAR_SHARE = 0.25
"""Largest share of a step's sequences that may follow grammars if the next step is planned ahead.

A sequence that follows a grammar cannot be part of a step that is planned before its last token is read. Let t be the
duration of a step, h the duration of planning it, c the number of sequences that follow grammars and f the number of
other sequences. Two steps give 2 f + c tokens in 2 t if the second is planned ahead, and 2 f + 2 c tokens in 2 (t + h)
if it is planned after the first is read. So planning ahead is slower from c / (2 f + c) = h / t on.
"""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Statistics of an engine.

    Attributes:
        num_running: Number of sequences that hold KV cache blocks.
        num_waiting: Number of sequences that hold no KV cache blocks.
        kv_cache_usage: Share of the KV cache blocks in use, 0 to 1.
        step_time_s: Seconds that `LLMEngine.step` has taken in total.
        counters: Counters of the scheduler since the engine was made.
        num_adapter_loads: Number of adapters that were read into the memory of the host.
        num_adapter_uploads: Number of adapters that were uploaded to an adapter slot of the device.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    step_time_s: float
    counters: SchedulerCounters
    num_adapter_loads: int = 0
    num_adapter_uploads: int = 0


@dataclass(slots=True)
class RequestSequences:
    """An unfinished request, its sequences, and the number of its sequences that have not ended."""

    request: Request
    sequences: list[Sequence]
    num_unfinished: int


@dataclass(frozen=True, slots=True)
class FailedStep:
    """A step that could not be started. `result` raises the error, as it does for a step that fails later."""

    error: Exception

    def result(self) -> StepResult:
        """Raises the error that the start of the step raised; there is no result."""
        raise self.error


@dataclass(slots=True)
class LLMEngine:
    """One model with its scheduler, KV cache and tokenizer. It runs requests step by step.

    `LLMEngine.from_config` makes an engine. The constructor takes the parts of an engine, so that tests can replace
    them.

    Attributes:
        config: Settings of the engine.
        tokenizer: The model's tokenizer; None if the engine was made with `skip_tokenizer_init`.
        default_params: Sampling parameters that the model recommends.
        handler: Request handler of the engine's task, which makes the sequences of requests and their outputs.
        scheduler: Scheduler that plans the steps.
        executor: Executor that runs the steps.
        overlap_depth: Number of steps that may be started before the results of an earlier one are read.
        adapters: The LoRA adapters in the memory of the host; None without `enable_lora`.
    """

    config: EngineConfig
    tokenizer: Tokenizer | None
    default_params: SamplingParams
    handler: RequestHandler[Any, Any]
    scheduler: Scheduler
    executor: Executor
    overlap_depth: int = 0
    adapters: AdapterLibrary | None = None
    _groups: dict[str, RequestSequences] = field(default_factory=dict)
    _in_flight: deque[tuple[StepPlan, StepHandle]] = field(default_factory=deque)
    _step_time_s: float = 0.0
    _is_closed: bool = False

    @classmethod
    def from_config(cls, config: EngineConfig, rendezvous: Rendezvous | None = None) -> LLMEngine:
        """Loads a model and makes its engine.

        Args:
            config: Settings of the engine.
            rendezvous: Rendezvous that the other ranks of a parallel engine join (`worker.run_worker`); None to start
                them as processes on this host.

        Raises:
            UserError: A setting, the model folder or the tokenizer cannot be used.
            EngineDeadError: A rank did not come, or has ended.
        """
        from .models import describe_model, load_hf_config
        from .models.pp_stages import cache_groups

        starts_ranks = config.num_ranks > 1 and rendezvous is None
        device = Device.choose(config.device, 0 if starts_ranks else None)
        warn_of_unused(config.model, config.hub)
        folder = resolve_model(config.model, config.hub)
        hf_config = load_hf_config(folder, config.hf_overrides, **config.model_code)
        task = choose_task(config, hf_config)
        tokenizer = None
        if not config.skip_tokenizer_init:
            what = "model" if config.tokenizer is None else "tokenizer"
            own = resolve_tokenizer(config.tokenizer or config.model, config.tokenizer_hub, what)
            settings = task.text_settings(config)
            tokenizer = Tokenizer(own, config.chat_template, settings, trust_remote_code=config.trust_remote_code)
        spec = describe_model(hf_config)
        config = fit_to_model(config, device, spec)
        num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
        executor, capacity = _open_executor(config, device, hf_config, task, rendezvous)
        dtype = device.resolve_dtype(config.dtype, hf_config.dtype)
        prompt_embeds = PromptEmbeds(spec.embedding_size, dtype) if config.enable_prompt_embeds else None
        return cls(
            config=replace(config, max_num_seqs=capacity.max_num_seqs),
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
                capacity.max_num_seqs,
                num_tokens,
                config.pipeline_parallel_size,
                config.max_loras if config.enable_lora else 0,
            ),
            executor=executor,
            overlap_depth=_overlap_depth(config, device),
            adapters=_open_library(config, hf_config, task, dtype, tokenizer),
        )

    @property
    def task(self) -> Task:
        """The task that the engine was made for."""
        return self.handler.task

    def add_request(self, request: Request) -> None:
        """Checks a request and queues its sequences; `step` runs them.

        Args:
            request: The request. Its id must differ from the ids of all unfinished requests.

        Raises:
            UserError: The request cannot be run. The engine has not changed.
            EngineDeadError: The engine is closed.
        """
        self._check_open()
        if request.request_id in self._groups:
            raise ConfigError(f"request id {request.request_id!r} is in use; give each unfinished request its own")
        lora_request = request.lora_request
        if lora_request is not None:
            self.library().check(check_lora_request(lora_request))
        sequences = self.handler.open(request)
        self._groups[request.request_id] = RequestSequences(request, sequences, len(sequences))
        for sequence in sequences:
            if lora_request is None:
                self.scheduler.add(sequence)
            else:
                self.scheduler.number(sequence)
                self.library().ask(lora_request, sequence)

    def library(self) -> AdapterLibrary:
        """Returns the adapters in the memory of the host.

        Raises:
            ConfigError: The engine was made without `enable_lora`.
            EngineDeadError: The engine is closed.
        """
        self._check_open()
        if self.adapters is None:
            raise ConfigError("this engine runs no LoRA adapters; construct it with enable_lora=True")
        return self.adapters

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """As `AdapterLibrary.add`."""
        return self.library().add(check_lora_request(lora_request))

    def remove_lora(self, lora_int_id: int) -> bool:
        """As `AdapterLibrary.remove`."""
        return self.library().remove(lora_int_id)

    def list_loras(self) -> set[int]:
        """As `AdapterLibrary.ids`."""
        return self.library().ids()

    def pin_lora(self, lora_int_id: int) -> bool:
        """As `AdapterLibrary.pin`."""
        return self.library().pin(lora_int_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Removes requests; they give no output. Ids of unknown and of finished requests are ignored."""
        for request_id in request_ids:
            group = self._groups.pop(request_id, None)
            for sequence in group.sequences if group else ():
                self._abort(sequence)

    def step(self) -> list[EngineOutput]:
        """Plans and starts a step, then reads the oldest results until at most `overlap_depth` steps are unread.

        If nothing can run before an adapter is read, it waits for the adapter for a short time only (`MAX_WAIT_S`).

        Returns:
            The outputs of the requests that finished or failed in the steps that were read.
        """
        start_s = time.perf_counter()
        ended = self._enter_adapted()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._start(plan)))
        elif self.adapters is not None and not self._in_flight and not ended:
            self.adapters.wait()
        is_loading = self.adapters is not None and self.adapters.is_loading
        assert self._in_flight or ended or is_loading or not self._groups, (
            "requests wait, and none of them can ever run"
        )
        most_unread = self._most_unread(plan)
        while len(self._in_flight) > most_unread:
            ended += self._read_step()
        outputs = [output for sequence in ended for output in self._close_sequence(sequence)]
        while self._in_flight and not self.has_unfinished_requests():
            # These steps draw only tokens that nobody needs. They are read because a failed step makes the prefix
            # cache forget the blocks that it should have filled.
            self._read_step()
        self._step_time_s += time.perf_counter() - start_s
        return outputs

    def reset(self) -> None:
        """Removes all requests and clears the prefix cache.

        `LLM` calls this method after an interrupt. The interrupt may have left the state of the engine inconsistent, so
        the state is replaced by an empty one.
        """
        self._groups.clear()
        self._in_flight.clear()
        self.scheduler.reset()
        if self.adapters is not None:
            self.adapters.reset()

    def reset_prefix_cache(self) -> None:
        """Removes all cached prefixes from the KV cache. Running requests keep their blocks."""
        self.scheduler.kv_cache.pool.forget_all()

    def save_sharded_state(self, folder: str | Path) -> None:
        """Writes each rank's part of the weights to separate files, which load faster than a checkpoint.

        Args:
            folder: Folder that the files are written to; it is made if absent. An engine with
                `load_format="sharded_state"` and the same numbers of ranks can load it as a model folder.

        Raises:
            ConfigError: The engine has not read a checkpoint, or the folder is the folder of the checkpoint.
        """
        from .weights.sharded_state import copy_model_files

        config = self.config
        source, target = resolve_model(config.model, config.hub).resolve(), Path(folder).resolve()
        if self.config.load_format != "auto" or source == target:
            raise ConfigError(
                f"save_sharded_state cuts a checkpoint that load_format='auto' has read, into another folder; got "
                f"load_format={self.config.load_format!r} and folder {target}"
            )
        target.mkdir(parents=True, exist_ok=True)
        self.executor.save_sharded_state(self.config, target)
        for made in dict.fromkeys((source, resolve_tokenizer(config.model, config.hub))):
            copy_model_files(made, target)

    def has_unfinished_requests(self) -> bool:
        """Returns whether there is a request whose output `step` has not returned yet."""
        return bool(self._groups)

    def stats(self) -> EngineStats:
        """Returns the engine's statistics: numbers of running and waiting sequences, KV cache usage, counters."""
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + (0 if self.adapters is None else self.adapters.num_waiting),
            kv_cache_usage=scheduler.kv_cache.usage,
            step_time_s=self._step_time_s,
            counters=scheduler.counters,
            num_adapter_loads=0 if self.adapters is None else self.adapters.num_loads,
            num_adapter_uploads=scheduler.adapter_slots.num_uploads,
        )

    def check_integrity(self) -> None:
        """Checks that no sequence, row or KV cache block is lost, counted twice or leaked.

        Raises:
            AssertionError: The check fails.
        """
        self.scheduler.check_integrity()
        if not self.has_unfinished_requests():
            num_used = self.scheduler.kv_cache.pool.num_used
            assert num_used == 0, f"the engine is idle and {num_used} KV cache blocks are in use"

    def close(self) -> None:
        """Removes all requests and frees the model and the KV cache."""
        self.abort(list(self._groups))
        self._in_flight.clear()
        self._is_closed = True
        if self.adapters is not None:
            self.adapters.close()
        self.executor.close()
        gc.collect()

    def _enter_adapted(self) -> list[Sequence]:
        """Hands sequences whose adapters were read to the scheduler; returns those whose adapters cannot be used."""
        if self.adapters is None:
            return []
        ready, failed = self.adapters.take_ready()
        for sequence in ready:
            self.scheduler.add_numbered(sequence)
        return failed

    def _abort(self, sequence: Sequence) -> None:
        """Ends a sequence whose result is no longer needed, wherever it is."""
        if self.adapters is None or not self.adapters.leave(sequence):
            self.scheduler.abort(sequence)

    def _most_unread(self, plan: StepPlan | None) -> int:
        """Returns how many started steps `step` may leave unread when it returns.

        Args:
            plan: The plan that was just started; None if there was no step to plan.
        """
        if plan is None:
            return max(0, len(self._in_flight) - 1)
        masks = plan.token_masks
        if masks is None or self.config.pipeline_parallel_size > 1:
            return self.overlap_depth
        return self.overlap_depth if len(masks.indices) < MAX_GRAMMAR_SHARE * len(plan.sequences) else 0

    def _start(self, plan: StepPlan) -> StepHandle:
        try:
            self.handler.prepare(plan)
            return self.executor.execute(plan)
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001  # An error of the model must not fail other requests.
            return FailedStep(error)

    def _read_step(self) -> list[Sequence]:
        """Reads the results of the oldest step and returns the sequences that ended.

        If the step failed, the scheduler runs its sequences again one at a time, to find the one that makes it fail.

        Raises:
            EngineDeadError: The step failed, and no other step can succeed.
        """
        plan, handle = self._in_flight.popleft()
        try:
            result = handle.result()
        except EngineDeadError:
            raise
        except Exception as error:  # An error of the model must not fail other requests.
            plans = [plan, *(later for later, _ in self._in_flight)]
            self._in_flight.clear()
            if not plan.sequences[0].is_suspect:
                logger.warning("a step of %d requests failed", len(plan.sequences), exc_info=error)
            cause = ModelExecutionError(f"the model failed on this request: {type(error).__name__}: {error}")
            ended = self.scheduler.recover(plans, RequestError.from_exception(cause))
            if ended:
                self._check_alive(error)
            return ended
        self.handler.record(plan, result)
        return self.scheduler.update(plan, result.drawn, result.num_drawn)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineDeadError("this engine is closed and its model is freed; construct another one")

    def _check_alive(self, cause: Exception) -> None:
        """Runs a step of one token, which must succeed, after a step of one request has failed.

        After an illegal access of memory on a GPU every later step fails too. The requests are not to blame then, and
        must run on another engine.

        Raises:
            EngineDeadError: The step of one token failed.
        """
        (probe,) = self.handler.make_sequences(self.handler.probe_request())
        plan = self.scheduler.schedule_alone(probe)
        if plan is None:
            return
        try:
            self.executor.execute(plan).result()
        except Exception as error:
            raise EngineDeadError(
                f"the device can run no step any more, not even one of one token; restart the process: "
                f"{type(cause).__name__}: {cause!s:.500}"
            ) from error
        finally:
            self.scheduler.abort(probe)

    def _close_sequence(self, sequence: Sequence) -> list[EngineOutput]:
        """Marks a sequence as ended. If its request has ended with it, returns the request's output.

        A request ends with the last of its sequences, or with the first one that fails.
        """
        group = self._groups.get(sequence.request_id)
        if group is None:
            return []
        group.num_unfinished -= 1
        if sequence.error is None and group.num_unfinished:
            return []
        del self._groups[sequence.request_id]
        for other in group.sequences:
            self._abort(other)
        return [self.handler.make_output(group.request, group.sequences)]


def _open_executor(
    config: EngineConfig, device: Device, hf_config: Any, task: Task, rendezvous: Rendezvous | None
) -> tuple[Executor, Capacity]:
    """Loads the model, in this process or on many ranks. Returns its executor and the limits of length and memory."""
    from .loading.load import load_runner, prepare_host

    if config.num_ranks > 1:
        from .executor.distributed import start_ranks

        return start_ranks(config, device, hf_config, task, rendezvous)
    prepare_host(config, device)
    num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    runner, capacity = load_runner(config, device, hf_config, task, num_tokens)
    return InProcessExecutor(runner), capacity


def _open_library(
    config: EngineConfig, hf_config: Any, task: Task, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> AdapterLibrary | None:
    """Makes the library of adapters; None without `enable_lora`."""
    from .loading.adapter_base import describe_adapter_base

    if not config.enable_lora:
        return None
    base = describe_adapter_base(config, hf_config, task.model_head, dtype)
    texts = None if tokenizer is None else ModelTexts.of(tokenizer)

    def read(request: LoRARequest) -> Adapter:
        adapter = read_adapter(request, base)
        if texts is not None:
            texts.compare(request.lora_name, locate_adapter(request.lora_path, base.download_dir))
        return adapter

    most = 2 * config.max_loras if config.max_cpu_loras is None else config.max_cpu_loras
    return AdapterLibrary(read, most)


def _overlap_depth(config: EngineConfig, device: Device) -> int:
    """Returns how many steps to plan ahead.

    With several pp stages these are as many as keep every pp stage busy. With one it is the setting `overlap_depth`, or
    the device's own depth if that is None.
    """
    if config.pipeline_parallel_size > 1:
        return config.pipeline_parallel_size - 1
    return device.overlap_depth if config.overlap_depth is None else config.overlap_depth

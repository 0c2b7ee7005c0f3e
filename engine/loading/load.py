"""`load_runner`: loads a model, sizes the KV cache by the memory that is left, and makes the model's runner."""

from __future__ import annotations

import functools
import logging
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from ..config import EngineConfig
from ..device import Device, keep_freed_memory, memory_bytes, return_freed_memory
from ..errors import ConfigError
from ..kv_cache import kv_block_bytes
from ..lora.slots import SlotSizes
from ..models import Decoder, ModelOptions, build_model, describe_model, load_hf_config, load_model, weight_map
from ..models.hf_config import quantization_settings
from ..models.pp_stages import cache_groups, cache_shape, state_shape
from ..models.spec import DecoderSpec
from ..parallel.context import SINGLE, ParallelContext
from ..quantization.stored import StoredForms
from ..step.cuda_graph import CudaGraphs, DecodeGraphs, graph_sizes
from ..step.decode_tape import DecodeTape
from ..step.head import Draw, RunDecode
from ..step.runner import MakeRecorder, ModelRunner
from ..storage import Location
from ..tasks.choose import choose_task
from ..tasks.task import Task
from ..weights.checkpoint import Join
from ..weights.sharded_state import save_sharded_state
from .adapter_memory import check_adapter_slots, lora_bytes
from .capacity import GRAPH_BYTES, Capacity, Reserve, choose_max_model_len, most_num_seqs, plan_capacity
from .kv_scales import choose_kv_dtype, prepare_kv_scales
from .memory_profile import run_largest_step
from .model_source import locate_model, resolve_model
from .rehearsal import Rehearsal, start_rehearsal
from .stored_forms import plan_stored_forms, read_stored_forms

logger = logging.getLogger(__name__)


def prepare_host(config: EngineConfig, device: Device) -> None:
    """Sets the number of compute threads and makes the process keep freed memory for reuse; does nothing on a GPU."""
    if device.is_cpu:
        torch.set_num_threads(config.num_threads or device.default_num_threads)
        keep_freed_memory()


def save_rank(config: EngineConfig, parallel: ParallelContext, folder: Path) -> None:
    """Writes a rank's part of the model's weights to a folder, from which `load_format="sharded_state"` reads it.

    Args:
        config: Settings of the engine. The checkpoint is read again, because the loaded weights may be packed or
            quantised.
        parallel: The place of the rank among all ranks.
        folder: Folder to which the files are written.

    Raises:
        CheckpointError: The checkpoint can no longer be read.
        ConfigError: The checkpoint is quantised.
    """
    hf_config = load_hf_config(resolve_model(config.model, config.hub), config.hf_overrides, **config.model_code)
    if quantization_settings(hf_config) is not None:
        raise ConfigError(
            f"{config.model} is quantised, and save_sharded_state would write it dequantised; each rank reads only its "
            "own part of the checkpoint anyway, so load it as it is"
        )
    dtype = Device.choose(config.device).resolve_dtype(config.dtype, hf_config.dtype)
    task = choose_task(config, hf_config)
    options = ModelOptions(head=task.model_head, expert_parallel=config.enable_expert_parallel)
    model = build_model(hf_config, dtype, "meta", options, parallel)
    place = locate_model(config.model, config.hub)
    weights = weight_map(place, hf_config, dtype)
    join: Join = iter if task.head_rows is None else task.head_rows.after(iter, weights)
    save_sharded_state(model, place, weights, parallel, folder, join)


def load_runner(
    config: EngineConfig,
    device: Device,
    hf_config: Any,
    task: Task,
    num_tokens: int,
    parallel: ParallelContext = SINGLE,
) -> tuple[ModelRunner, Capacity]:
    """Loads a model, plans the KV cache for the memory that is left, and makes the model's runner.

    Args:
        config: Settings of the engine.
        device: Device of the model.
        hf_config: The transformers config of the model.
        task: The task of the engine.
        num_tokens: Most tokens of a step.
        parallel: The place of this rank among all ranks.

    Returns:
        The runner, and the limits of the engine, which are the smallest limits of all ranks.

    Raises:
        UserError: A setting or the model folder cannot be used.
    """
    dtype = device.resolve_dtype(config.dtype, hf_config.dtype)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype, describe_model(hf_config), device)
    place = locate_model(config.model, config.hub)
    options = ModelOptions(
        config.quantization,
        config.deterministic,
        config.load_format,
        task.model_head,
        task.unused_weights,
        expert_parallel=config.enable_expert_parallel,
        max_model_len=config.max_model_len,
        adapter_slots=SlotSizes(config.max_loras, config.max_lora_rank) if config.enable_lora else None,
        stored=_stored_forms(config, place, hf_config, dtype, device),
        head_rows=task.head_rows,
    )
    options.make_scheme().check(device, dtype)
    check_adapter_slots(device, lora_bytes(hf_config, dtype, options, parallel), options)
    most_seqs = most_num_seqs(config, device)
    rehearsal = Rehearsal(config, hf_config, task, options, dtype, kv_dtype, most_seqs, parallel)
    end_rehearsal = start_rehearsal(rehearsal, device)
    model = load_model(place, hf_config, dtype, device.torch_device, options, parallel)
    end_rehearsal()
    if device.is_cpu:
        return_freed_memory()
    _warn_of_long_rope(config, model.spec)
    prepare_kv_scales(model, hf_config, device=device.torch_device, block_size=config.block_size, kv_dtype=kv_dtype)
    step_bytes = _step_bytes(config, device, model, task, num_tokens, kv_dtype)
    spec = model.spec
    row_bytes = state_shape(spec, parallel).row_bytes(dtype)
    reserve = Reserve(step_bytes, _graph_bytes(config, device, task, most_seqs, model), row_bytes)
    block_bytes = kv_block_bytes(cache_shape(spec, parallel), config.block_size, kv_dtype)
    caches = [group.cache for group in cache_groups(spec)]
    capacity = plan_capacity(config, device, spec.max_position_embeddings, block_bytes, reserve, caches)
    _check_cache_memory(device, capacity, block_bytes, row_bytes)
    capacity = Capacity(*(parallel.smallest(limit) for limit in astuple(capacity)))
    runner = ModelRunner(
        model,
        device.torch_device,
        num_blocks=capacity.num_blocks,
        block_size=config.block_size,
        max_num_seqs=capacity.max_num_seqs,
        max_model_len=capacity.max_model_len,
        dtype=kv_dtype,
        make_recorder=_choose_recorder(config, device, task, capacity.max_num_seqs, parallel),
        make_head=task.make_head,
        parallel=parallel,
    )
    return runner, capacity


def _stored_forms(
    config: EngineConfig, place: Location, hf_config: Any, dtype: torch.dtype, device: Device
) -> StoredForms | None:
    """Returns how the matrices of a quantised checkpoint are stored; None for an unquantised checkpoint."""
    if config.load_format != "auto":
        return plan_stored_forms(hf_config, config.quantization, device)
    return read_stored_forms(place, weight_map(place, hf_config, dtype), hf_config, config.quantization, device)


def _warn_of_long_rope(config: EngineConfig, spec: DecoderSpec) -> None:
    """Logs a warning if short sequences are run with the rotary frequencies that a model has for long ones."""
    ropes = [rope for rope in map(spec.rope_of, range(spec.num_layers)) if rope is not None]
    max_model_len = config.max_model_len or spec.max_position_embeddings
    if any(rope.is_long(max_model_len) for rope in ropes):
        most = max(rope.num_short_positions for rope in ropes)
        logger.warning(
            "this model has two lists of rotary frequencies, and with max_model_len=%d sequences of every length use "
            "the one for more than %d tokens; if all sequences are shorter, set max_model_len=%d for the outputs that "
            "the model was made for",
            max_model_len,
            most,
            most,
        )


def _check_cache_memory(device: Device, capacity: Capacity, block_bytes: int, row_bytes: int) -> None:
    """Raises if the settings ask for a larger KV cache, or for more states, than the memory of the device."""
    most, num_blocks, num_rows = memory_bytes(device.torch_device), capacity.num_blocks, capacity.max_num_seqs
    if num_blocks * block_bytes > most:
        raise ConfigError(
            f"{num_blocks} KV cache blocks of {block_bytes} bytes do not fit into the {most} bytes of the device; "
            "lower num_gpu_blocks_override, kv_cache_memory_bytes or block_size"
        )
    if num_rows * row_bytes > most:
        raise ConfigError(
            f"the states of {num_rows} sequences, of {row_bytes} bytes each, do not fit into the {most} bytes of the "
            "device; lower max_num_seqs"
        )


def _records(config: EngineConfig, device: Device, task: Task, parallel: ParallelContext) -> bool:
    """Returns whether decode steps are recorded."""
    # A pp stage waits for a transfer in a later step than the one that begins it (`GroupLink.send`), so no step of it
    # can be recorded by itself. And a tape can record only kernels, and no sums over ranks.
    is_alone = parallel.pp_size == 1 and (parallel.tp_size == 1 or not device.is_cpu)
    return is_alone and task.decodes and not config.enforce_eager


def _graph_bytes(config: EngineConfig, device: Device, task: Task, max_num_seqs: int, model: Decoder) -> int:
    """Returns the memory of the CUDA graphs of an engine, those of the draw included."""
    if device.is_cpu or not _records(config, device, task, model.parallel):
        return 0
    num_forms = (1 + config.enable_prefix_caching) * (1 + config.enable_lora)
    num_steps = len(graph_sizes(max_num_seqs, config.cudagraph_capture_sizes)) * num_forms
    # The largest draw has float32 logits, and as much for its temporary tensors.
    return num_steps * GRAPH_BYTES + 2 * max_num_seqs * model.columns.room * torch.float32.itemsize


def _choose_recorder(
    config: EngineConfig, device: Device, task: Task, max_num_seqs: int, parallel: ParallelContext
) -> MakeRecorder | None:
    """Returns the function that makes the recorder of decode steps; None for none."""
    if not _records(config, device, task, parallel):
        return None
    if device.is_cpu:
        return lambda run, _: DecodeTape(run, max_num_seqs)
    sizes = graph_sizes(max_num_seqs, config.cudagraph_capture_sizes)

    def make(run: RunDecode, draw: Draw | None) -> DecodeGraphs:
        graphs = DecodeGraphs(run, sizes, CudaGraphs(), parallel.agree if parallel.num_ranks > 1 else None, draw)
        try:
            num_slots = config.max_loras if config.enable_lora else None
            graphs.record_all(device.torch_device, with_shared=config.enable_prefix_caching, num_slots=num_slots)
        except BaseException:
            graphs.close()
            raise
        return graphs

    return make


def _step_bytes(
    config: EngineConfig, device: Device, model: Decoder, task: Task, num_tokens: int, kv_dtype: torch.dtype
) -> int:
    """Returns the temporary memory of the largest step, measured on a GPU; 0 on a CPU, where it is not reserved."""
    if device.is_cpu:
        return 0
    step = functools.partial(
        run_largest_step,
        model,
        device.torch_device,
        num_tokens=num_tokens,
        num_seqs=most_num_seqs(config, device),
        max_model_len=choose_max_model_len(config, model.spec.max_position_embeddings),
        block_size=config.block_size,
        kv_dtype=kv_dtype,
        draws=task.decodes,
    )
    try:
        return device.measure_peak_bytes(step)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {num_tokens} tokens does not fit beside the weights, {device.used_memory_bytes()} bytes are in "
            "use; lower max_num_batched_tokens or max_num_seqs, or use a smaller model"
        ) from error

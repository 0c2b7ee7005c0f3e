"""`save_sharded_state`, `load_sharded_state`: weights in separate files for each rank, so each reads only its own.

The tensors have our names, are the parts of one rank, and have the dtype of the model. The files say for how many ranks
they were saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..parallel.context import ParallelContext
from ..storage import Location
from .checkpoint import Join, StoredTensor, WeightMap, fill_slots, iter_safetensors, iter_tensors, match_tensor
from .model_slots import weight_slots
from .quantised_matrix import numbers_of
from .remote import iter_remote_tensors, read_metadata

__all__ = ["copy_model_files", "load_sharded_state", "save_sharded_state"]

MAX_FILE_BYTES = 4 << 30
"""Size at which a file is closed and the next one begins. The tensors of a file are in memory until it is written."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")


def save_sharded_state(
    model: nn.Module,
    folder: str | Path | Location,
    weights: WeightMap,
    parallel: ParallelContext,
    target: Path,
    join: Join = iter,
) -> None:
    """Reads one rank's part of a checkpoint and writes it to files that only this rank reads.

    Args:
        model: The rank's part of the model. Its memory is not read, so it may be on the meta device.
        folder: Folder of the checkpoint.
        weights: The names of the model's weights in the checkpoint.
        parallel: The place of the rank among all ranks.
        target: Folder to which the files are written.
        join: Function that adds tensors to those of the checkpoint, such as the head of a classifier.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    slots = weight_slots(model)
    part: dict[str, Tensor] = {}
    num_parts = 0
    for name, tensor in join(iter_tensors(folder)):
        for ours, stored in match_tensor(slots, weights, name, tensor):
            if ours in slots:
                dtype = slots[ours].targets[0].dtype
                kept = numbers_of(slots[ours].cut(stored))
                part[ours] = kept.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if sum(tensor.nbytes for tensor in part.values()) >= MAX_FILE_BYTES:
            _write(part, target, parallel, num_parts)
            part, num_parts = {}, num_parts + 1
    _write(part, target, parallel, num_parts)


def copy_model_files(folder: Path, target: Path) -> None:
    """Copies all files of a model folder except its weights: config, tokenizer, generation config."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)


def load_sharded_state(model: nn.Module, folder: str | Path | Location, parallel: ParallelContext) -> None:
    """Fills every parameter of a rank's part of a model from the files that `save_sharded_state` wrote for the rank.

    Args:
        model: The rank's part of the model, on its device and in its dtype.
        folder: Folder of the files.
        parallel: The place of the rank among all ranks.

    Raises:
        ConfigError: The files were saved for another number of ranks.
        CheckpointError: A file is missing or damaged, lacks a weight, or has an unknown or misshapen one.
    """
    slots = {name: replace(slot, parts=()) for name, slot in weight_slots(model).items()}
    sources: dict[str, list[tuple[str, StoredTensor]]] = {}
    unexpected = []
    for name, tensor in _read(folder, parallel):
        if name in slots:
            sources[name] = [(name, tensor)]
        else:
            unexpected.append(name)
    found = {slots[name].key for name in sources}
    missing = [name for name, slot in slots.items() if not slot.optional and slot.key not in found]
    if missing or unexpected:
        raise CheckpointError(
            f"the files of rank {parallel.rank} in {folder} do not match config.json: missing {missing[:12]}, "
            f"unexpected {unexpected[:12]}; save them again"
        )
    fill_slots(slots, sources)


def _write(part: dict[str, Tensor], target: Path, parallel: ParallelContext, index: int) -> None:
    save_file(part, target / f"model-rank-{parallel.rank}-part-{index}.safetensors", metadata=_ranks(parallel))


def _ranks(parallel: ParallelContext) -> dict[str, str]:
    return {"ranks": json.dumps({"tp_size": parallel.tp_size, "pp_size": parallel.pp_size})}


def _read(folder: str | Path | Location, parallel: ParallelContext) -> Iterator[tuple[str, StoredTensor]]:
    place = folder if isinstance(folder, Location) else Location.at(folder)
    prefix = f"model-rank-{parallel.rank}-part-"
    files = [file for file in place.list(".safetensors") if file.name.startswith(prefix)]
    if not files:
        raise CheckpointError(
            f"{place} holds no {prefix}*.safetensors; write them with save_sharded_state, or read an ordinary "
            "checkpoint with load_format='auto'"
        )
    for file in files:
        try:
            saved = _metadata(file)["ranks"]
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged, or save_sharded_state did not write it ({error!r})") from error
        if {"ranks": saved} != _ranks(parallel):
            raise ConfigError(
                f"{file} was saved for {saved}, and this engine has tensor_parallel_size={parallel.tp_size}, "
                f"pipeline_parallel_size={parallel.pp_size}; use the same, or save again"
            )
        yield from iter_safetensors(Path(file.url)) if file.is_local else iter_remote_tensors([file])


def _metadata(file: Location) -> dict[str, str]:
    if not file.is_local:
        return read_metadata(file)
    with safe_open(file.url, framework="pt") as opened:
        return opened.metadata()

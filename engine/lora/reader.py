"""`read_adapter`: reads the folder of an adapter and checks it against the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError, MillraceError, quote
from .adapter import Adapter, LowRank, NewRows
from .base import AdapterBase
from .cast import cast_matrix
from .config import AdapterConfig
from .files import locate_adapter, read_files
from .names import FUSED, Sorted, find_pieces, is_unused, sort_tensors
from .request import LoRARequest
from .table_rows import read_new_rows

__all__ = ["read_adapter"]

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20
"""Bytes that a file of tensors may have beyond those of the model's matrices: a header, padding, and other tensors."""


def read_adapter(request: LoRARequest, base: AdapterBase) -> Adapter:
    """Reads the folder of an adapter in PEFT's layout, and checks it against the model.

    Args:
        request: Names the adapter and its folder.
        base: The model that the adapter changes.

    Raises:
        AdapterError: The adapter is missing, damaged or hostile, does not fit the model, or asks for what is not
            implemented.
    """
    try:
        files = read_files(locate_adapter(request.lora_path, base.download_dir), _max_bytes(base))
        config, tensors = AdapterConfig.of(files.fields), sort_tensors(files.tensors)
        _check_pairs(tensors)
        _drop_unused(request.lora_name, tensors, base)
        updates = _updates(config, tensors, base)
        new_rows = read_new_rows(tensors.others, config, base)
        _check_one_kind(config, updates, new_rows)
        _warn_of_missing(request.lora_name, config, tensors, base)
    except (MillraceError, OSError, RecursionError) as error:  # A config may be nested as deep as can be read.
        raise AdapterError(f"the adapter {quote(request.lora_name)} cannot be used: {error}") from error
    matrices = {id(one): one.nbytes for update in updates.values() for one in (update.a, update.b)}
    matrices |= {id(new.rows): new.rows.nbytes for new in new_rows.values()}
    return Adapter(request.lora_name, files.digest, updates, sum(matrices.values()), new_rows)


def _max_bytes(base: AdapterBase) -> int:
    """Returns the most bytes of a file of tensors: with each matrix in float64, and two copies of the largest one."""
    narrow = sum(rows + columns for rows, columns in base.shapes.values()) * base.max_rank
    largest = max((rows * columns for rows, columns in base.shapes.values()), default=0)
    return SPARE_BYTES + torch.float64.itemsize * (narrow + 2 * largest)


def _check_pairs(tensors: Sorted) -> None:
    """Raises if a module has one of its two matrices, or if there is nothing at all."""
    alone = tensors.a.keys() ^ tensors.b.keys()
    if alone:
        module = min(alone)
        here, absent = ("lora_A", "lora_B") if module in tensors.a else ("lora_B", "lora_A")
        raise AdapterError(f"the file holds {here} of {quote(module)} and no {absent}; save the adapter again")
    if not tensors.a and not tensors.others:
        raise AdapterError("the file holds no matrices lora_A and lora_B; check that training has saved the adapter")


def _drop_unused(name: str, tensors: Sorted, base: AdapterBase) -> None:
    """Drops the matrices of modules that the model never runs, which PEFT writes if the targets name them too."""
    unused = sorted(module for module in tensors.a if is_unused(module, base))
    for module in unused:
        del tensors.a[module], tensors.b[module]
    if unused:
        logger.warning(
            "the adapter %s changes %s and %d more, which the model does not run for this task; they are not used",
            quote(name),
            quote(unused[0]),
            len(unused) - 1,
        )


def _updates(config: AdapterConfig, tensors: Sorted, base: AdapterBase) -> dict[str, LowRank]:
    """Returns the update of each of our parts."""
    updates: dict[str, LowRank] = {}
    for module, a in sorted(tensors.a.items()):
        for part, update in _read_module(module, a, tensors.b[module], config, base).items():
            if part in updates:
                raise AdapterError(
                    f"the adapter changes {quote(part)} (our name) twice, the second time as {quote(module)}; "
                    "save its modules either fused or separate"
                )
            updates[part] = update
    return updates


def _read_module(module: str, a: Tensor, b: Tensor, config: AdapterConfig, base: AdapterBase) -> dict[str, LowRank]:
    """Returns the updates of the parts of a module."""
    if config.names(module) is False and not _names_separate(module, config):
        raise AdapterError(
            f"the file holds matrices of {quote(module)}, which target_modules, exclude_modules and "
            "layers_to_transform of adapter_config.json leave out; correct the config or the file"
        )
    pieces = find_pieces(module, base)
    parts = [part for piece in pieces for part in piece.parts]
    num_rows = [piece.num_rows(base) for piece in pieces]
    rank = _check_rank(module, a, config, base)
    _check_shape(module, "lora_A", a, [rank, base.shapes[parts[0]][1]])
    _check_shape(module, "lora_B", b, [sum(num_rows), rank])
    a = cast_matrix(module, "lora_A", a.float(), base.dtype)
    b = cast_matrix(module, "lora_B", b.float() * config.scale_of(module), base.dtype)
    rows = [part for piece, own in zip(pieces, b.split(num_rows), strict=True) for part in piece.cut(own, base)]
    return {part: LowRank(a, own.contiguous()) for part, own in zip(parts, rows, strict=True)}


def _names_separate(module: str, config: AdapterConfig) -> bool:
    """Returns whether the config names the modules of which a fused module consists."""
    outer, dot, last = module.rpartition(".")
    return any(config.names(f"{outer}{dot}{one}") for one in FUSED.get(last, ()))


def _check_rank(module: str, a: Tensor, config: AdapterConfig, base: AdapterBase) -> int:
    rank = config.rank_of(module)
    if a.dim() == 2 and len(a) != rank:
        raise AdapterError(
            f"lora_A of {quote(module)} has the rank {len(a)}, and r or rank_pattern of adapter_config.json say "
            f"{rank}; save both files again"
        )
    if rank > base.max_rank:
        raise AdapterError(
            f"{quote(module)} has the rank {rank}, and max_lora_rank is {base.max_rank}; set max_lora_rank to at least "
            f"{rank}"
        )
    return rank


def _check_shape(module: str, which: str, tensor: Tensor, asked: list[int]) -> None:
    if list(tensor.shape) != asked:
        raise AdapterError(
            f"{which} of {quote(module)} has shape {list(tensor.shape)}, and the model asks for {asked}; check that "
            "the adapter was trained for this model, and that its matrices were whole when they were saved"
        )


def _check_one_kind(config: AdapterConfig, updates: Mapping[str, LowRank], new_rows: Mapping[str, NewRows]) -> None:
    """Raises if a table has single new rows and matrices A and B, of which PEFT applies one at a time."""
    both = sorted(updates.keys() & new_rows.keys()) if config.tokens else []
    if both:
        raise AdapterError(
            f"the adapter has both trainable_token_indices and matrices lora_A and lora_B for {quote(both[0])}; train "
            "it with one of them"
        )


def _warn_of_missing(name: str, config: AdapterConfig, tensors: Sorted, base: AdapterBase) -> None:
    """Warns if the config names modules of the model of which the file has no matrices: they stay as they are."""
    if config.targets is None:
        return
    changed = {part for module in tensors.a for piece in find_pieces(module, base) for part in piece.parts}
    theirs = (
        base.weights.theirs(f"{part}.weight").removesuffix(".weight") for part in base.shapes if part not in changed
    )
    missing = sorted({module for module in theirs if config.names(module)})
    if missing:
        logger.warning(
            "the adapter %s has no matrices of %s and %d more, which its config names; they stay as they are",
            quote(name),
            missing[0],
            len(missing) - 1,
        )

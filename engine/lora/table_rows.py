"""`read_new_rows`: the rows of embeddings and output heads that an adapter's file holds in place of the model's own.

PEFT writes single rows (`trainable_token_indices`), whole modules (`modules_to_save`), and copies of the model's own
tables beside matrices that change them. Rows that are equal to the model's own change nothing and are dropped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError, quote
from .adapter import NewRows
from .base import AdapterBase
from .cast import cast_matrix
from .config import AdapterConfig
from .names import find_pieces
from .slots import EMBEDDING, HEADS

__all__ = ["read_new_rows"]

logger = logging.getLogger(__name__)

MAX_NEW_ROWS = 8192
"""Most rows of a table that an adapter may replace. Each adapter slot holds its own, beside the model's table."""

NUM_COMPARED = 4096
"""Rows that are compared at once with those of the model."""

HEAD = "lm_head"

_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_TABLE = re.compile(r"(?P<module>.+?)((\.token_adapter)?\.base_layer)?(\.modules_to_save(\.[^.]+)?)?\.weight")

_BIAS = re.compile(r"(?P<module>.+)\.base_layer\.bias")


def read_new_rows(tensors: Mapping[str, Tensor], config: AdapterConfig, base: AdapterBase) -> dict[str, NewRows]:
    """Returns the new rows of each table.

    Args:
        tensors: The tensors of the adapter's file beside the matrices A and B, without the prefix of their names.
        config: The config of the adapter.
        base: The model that the adapter changes.

    Returns:
        Our path of the token embedding or of an output head -> its new rows.

    Raises:
        AdapterError: A tensor belongs to no table, does not fit its table, or replaces too many rows.
    """
    found: dict[str, NewRows] = {}
    shared: NewRows | None = None  # Rows of the token embedding that a tied head has too.
    seen: set[str] = set()
    has_tokens = False
    for name, tensor in sorted(tensors.items()):
        match = _TOKENS.fullmatch(name) or _TABLE.fullmatch(name)
        if match is None and _is_own_bias(name, tensor, base):
            continue
        if match is None:
            raise _unused(name)
        module, is_tokens = match["module"], match.re is _TOKENS
        part = _find_table(name, module, base)
        seen.add(part)
        has_tokens |= is_tokens
        new = (_read_tokens if is_tokens else _read_table)(module, part, tensor, config, base)
        if new is None or not len(new.indices):
            continue
        if part in found:
            raise AdapterError(
                f"the file replaces rows of {quote(part)} (our name) twice, the second time as {quote(name)}"
            )
        found[part] = _checked(module, part, new, base)
        if part == EMBEDDING and not config.saves(module):
            shared = found[part]
    if config.tokens and not has_tokens:
        raise AdapterError(
            "trainable_token_indices of adapter_config.json names tokens, and the file holds no rows of them; save the "
            "adapter again"
        )
    _check_saved(seen, config, base)
    if base.is_tied and shared is not None and HEAD in base.tables:
        found.setdefault(HEAD, shared)
    return found


def _check_saved(seen: set[str], config: AdapterConfig, base: AdapterBase) -> None:
    """Raises if the file lacks a table that the config names."""
    for part in sorted({EMBEDDING, *HEADS} & base.shapes.keys() - seen):
        module = base.weights.theirs(f"{part}.weight").removesuffix(".weight")
        if config.saves(module):
            raise AdapterError(
                f"modules_to_save of adapter_config.json names {quote(module)}, and the file does not hold it; save "
                "the adapter again"
            )


def _find_table(name: str, module: str, base: AdapterBase) -> str:
    """Returns our path of the token embedding or the output head that a module is."""
    try:
        (part,) = (part for piece in find_pieces(module, base) for part in piece.parts)
    except (AdapterError, ValueError):
        raise _unused(name) from None
    if part not in {EMBEDDING, *HEADS}:
        raise _unused(name)
    return part


def _unused(name: str) -> AdapterError:
    return AdapterError(
        f"the file holds {quote(name)}, and beside the matrices lora_A and lora_B only the model's token embedding and "
        "output head are used; train the adapter without it, or merge it into the model with merge_and_unload() of PEFT"
    )


def _is_own_bias(name: str, tensor: Tensor, base: AdapterBase) -> bool:
    """Returns whether a tensor is a copy of the bias of the model's own output head."""
    if (match := _BIAS.fullmatch(name)) is None:
        return False
    own = base.read_own(f"{_find_table(name, match['module'], base)}.bias")
    return own is None or (own.shape == tensor.shape and bool(_is_same(tensor, own).all()))


def _read_tokens(module: str, part: str, tensor: Tensor, config: AdapterConfig, base: AdapterBase) -> NewRows:
    """Returns the rows of the tokens that the config names."""
    tokens, (num_rows, size) = config.tokens_of(module), _table_shape(part, base)
    if tokens is None:
        raise AdapterError(
            f"the file holds rows of {quote(module)}, and trainable_token_indices of adapter_config.json does not say "
            "of which tokens; save both files again"
        )
    if max(tokens, default=0) >= num_rows:
        raise AdapterError(
            f"trainable_token_indices of adapter_config.json names the token {max(tokens)}, and {quote(module)} of the "
            f"model has {num_rows} rows; add the token to the model's own vocabulary first"
        )
    if list(tensor.shape) != [len(tokens), size]:
        raise AdapterError(
            f"the rows of {quote(module)} have shape {list(tensor.shape)}, and trainable_token_indices and the model "
            f"ask for {[len(tokens), size]}; check that the adapter was trained for this model"
        )
    indices, order = torch.tensor(tokens).sort()
    return NewRows(indices, tensor[order])


def _read_table(module: str, part: str, tensor: Tensor, config: AdapterConfig, base: AdapterBase) -> NewRows | None:
    """Returns the rows of a whole table that differ from the model's own; None if there are none."""
    shape = _table_shape(part, base)
    if tuple(tensor.shape) != shape:
        raise AdapterError(
            f"the file holds the whole of {quote(module)} with the shape {list(tensor.shape)}, and the model's is "
            f"{list(shape)}: the vocabulary or the classes were changed; merge the adapter into that model"
        )
    own = base.read_own(f"{part}.weight")
    if own is not None and own.shape == tensor.shape and own.is_floating_point():
        indices = _changed_rows(tensor, own)
        return NewRows(indices, tensor[indices]) if len(indices) else None
    if not config.saves(module):
        logger.warning(
            "%s in the adapter's file is taken for a copy of the model's own, and is not used", quote(module)
        )
        return None
    return NewRows(torch.arange(len(tensor)), tensor)


def _table_shape(part: str, base: AdapterBase) -> tuple[int, int]:
    """Returns the number of rows of a table and their length."""
    rows, columns = base.shapes[part]
    return (columns, rows) if part == EMBEDDING else (rows, columns)


def _changed_rows(table: Tensor, own: Tensor) -> Tensor:
    """Returns the indices of the rows in which two tables differ."""
    changed = []
    for new, old in zip(table.split(NUM_COMPARED), own.split(NUM_COMPARED), strict=True):
        changed.append(~_is_same(new, old).all(1))
    return torch.cat(changed).nonzero().flatten()


def _is_same(new: Tensor, old: Tensor) -> Tensor:
    """Returns where tensors are equal, apart from a rounding to the number type of one of them."""
    return (new == old.to(new.dtype)) | (new.to(old.dtype) == old)


def _checked(module: str, part: str, new: NewRows, base: AdapterBase) -> NewRows:
    """Returns rows of a table in the number type of the model."""
    if part not in base.tables:
        raise AdapterError(
            f"the adapter replaces rows of {quote(module)}, which has a bias: new rows beside a bias are not "
            "supported; train this module with LoRA, or merge the adapter into the model with PEFT"
        )
    if len(new.indices) > MAX_NEW_ROWS:
        raise AdapterError(
            f"the adapter replaces {len(new.indices):,} rows of {quote(module)}, and at most {MAX_NEW_ROWS:,} can be "
            "replaced, because each adapter slot would hold them beside the model's own; train this module with LoRA, "
            "or merge the adapter into the model with merge_and_unload() of PEFT"
        )
    return NewRows(new.indices, cast_matrix(module, "the table", new.rows.float(), base.dtype))

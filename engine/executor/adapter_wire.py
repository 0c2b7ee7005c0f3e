"""Encodes LoRA adapters for the messages of `plan_wire`: rank 0 reads an adapter, the other ranks get it from there.

So no rank needs the folder of the adapter, and no adapter can be there on one rank and missing on another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lora.adapter import Adapter, LowRank, NewRows
from ..lora.slots import NewAdapter

__all__ = ["pack_adapter", "unpack_adapter"]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


def pack_adapter(new: NewAdapter) -> list[Any]:
    """Returns an adapter and its slot as values that a message can hold."""
    adapter = new.adapter
    updates = [[name, _pack(update.a), _pack(update.b)] for name, update in adapter.updates.items()]
    new_rows = [[name, _pack(each.indices), _pack(each.rows)] for name, each in adapter.new_rows.items()]
    return [new.slot, adapter.name, adapter.digest.hex(), adapter.num_bytes, updates, new_rows]


def unpack_adapter(packed: list[Any]) -> NewAdapter:
    """Returns the adapter and the slot of a message."""
    slot, name, digest, num_bytes, updates, new_rows = packed
    matrices = {part: LowRank(_unpack(*a), _unpack(*b)) for part, a, b in updates}
    tables = {table: NewRows(_unpack(*indices), _unpack(*rows)) for table, indices, rows in new_rows}
    return NewAdapter(slot, Adapter(name, bytes.fromhex(digest), matrices, num_bytes, tables))


def _pack(matrix: Tensor) -> list[Any]:
    dtype = str(matrix.dtype).removeprefix("torch.")
    return [dtype, list(matrix.shape), matrix.contiguous().view(torch.uint8).numpy()]


def _unpack(dtype: str, shape: list[int], content: Any) -> Tensor:
    return torch.from_numpy(content).view(_DTYPES[dtype]).view(shape)

"""`WeightSlot`: a weight slot, which is the memory of a layer that one tensor of a checkpoint fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ..parallel.shard import Shard

__all__ = ["HasSlots", "WeightSlot"]


class _Narrows(Protocol):
    @property
    def shape(self) -> torch.Size: ...

    def narrow(self, dim: int, start: int, length: int) -> Any: ...


Narrowable = TypeVar("Narrowable", bound=_Narrows)
"""A tensor, or an object such as `FileTensor` that stands for a tensor whose numbers are not read yet."""


def _as_it_is(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True, slots=True, eq=False)
class WeightSlot:
    """A weight slot: the memory that one tensor of a checkpoint fills.

    Two names of the same weight, such as those of a tied head and its embedding, have weight slots with equal keys.

    Attributes:
        targets: The memory to fill: a parameter or some of its rows, and its scales if it is quantised.
        encode: Maps this rank's part of the checkpoint's tensor to one tensor for each target, which `fill` casts and
            copies to the target.
        parts: The part of each dimension of the tensor that this rank holds; empty if the rank holds the whole tensor.
        padding: Memory of the parameter that no tensor fills and the module has set already, such as rows for
            which a shard has room (`Shard.room`) but no elements.
        dtypes: Number types that the checkpoint's tensor may have; empty for every floating-point type.
        optional: Whether a checkpoint may lack the tensor. The memory then keeps what the module has set.
        broadcasts: Whether the tensor may also be a single number for all elements, or have further dimensions of
            length 1.
        takes_codes: Whether `encode` takes the `Codes` of a tensor that is quantised in the checkpoint. Otherwise it
            gets dequantised numbers.
        by_row: Whether each row of the targets comes from the same row of the tensor alone, so that `fill_rows` may
            fill them a few at a time.
    """

    targets: tuple[Tensor, ...]
    encode: Callable[[Any], tuple[Tensor, ...]] = _as_it_is
    parts: tuple[Shard, ...] = ()
    padding: tuple[Tensor, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    optional: bool = False
    broadcasts: bool = False
    takes_codes: bool = False
    by_row: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """Identity of the memory, also of the meta device; it is equal for two names of the same weight."""
        return self.targets[0].untyped_storage()._cdata, int(self.targets[0].storage_offset())

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that `fill` takes: this rank's part of the checkpoint's tensor."""
        return torch.Size(part.length for part in self.parts) if self.parts else self.targets[0].shape

    @property
    def whole_shape(self) -> torch.Size:
        """Shape of the checkpoint's tensor, before `cut` takes this rank's part of it."""
        return torch.Size(part.size for part in self.parts) if self.parts else self.shape

    def cut(self, tensor: Narrowable) -> Narrowable:
        """Returns the part of a tensor of `whole_shape` that fills this weight slot, as a view: no numbers are read."""
        if self.broadcasts and math.prod(tensor.shape) == 1:
            return tensor
        for dim, part in enumerate(self.parts):
            if part.count > 1:
                tensor = tensor.narrow(dim, part.start, part.length)
        return tensor

    def fits(self, shape: torch.Size) -> bool:
        """Returns whether the checkpoint's tensor may have this shape."""
        if not self.broadcasts:
            return shape == self.whole_shape
        return math.prod(shape) == 1 or [n for n in shape if n > 1] == [n for n in self.whole_shape if n > 1]

    def accepts(self, dtype: torch.dtype) -> bool:
        """Returns whether the checkpoint's tensor may have this number type."""
        return dtype in self.dtypes if self.dtypes else dtype.is_floating_point

    def fill(self, tensor: Any) -> None:
        """Encodes a tensor of `shape`, or its `Codes`, and copies the result to the memory of this weight slot.

        The tensor may be on any device, and have any dtype that `accepts` allows.
        """
        for target, value in zip(self.targets, self.encode(tensor), strict=True):
            target.copy_(value)

    def fill_rows(self, first: int, rows: Tensor) -> None:
        """Fills the rows from `first` on; only if `by_row`."""
        for target, value in zip(self.targets, self.encode(rows), strict=True):
            target[first : first + len(rows)].copy_(value)

    def holds(self, tensor: Any) -> bool:
        """Returns whether the memory of this weight slot has the values that `fill` would store for `tensor`."""
        return all(
            torch.equal(target, value.to(target))
            for target, value in zip(self.targets, self.encode(tensor), strict=True)
        )


@runtime_checkable
class HasSlots(Protocol):
    """A module that declares its weight slots itself, because not every parameter is one tensor of a checkpoint."""

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot) of the module; the names are relative to the module."""

"""Where a checkpoint's tensor goes: a place in a layer's memory, and the form that it takes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ..parallel.shard import Shard

__all__ = ["HasSlots", "Slot"]


class _Narrows(Protocol):
    def narrow(self, dim: int, start: int, length: int) -> Any: ...


Narrowable = TypeVar("Narrowable", bound=_Narrows)
"""A tensor, or what stands for one that is not read yet."""


def _as_it_is(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """What one tensor of a checkpoint fills. Two names of one weight (a tied head's) have slots with the same key.

    Attributes:
        targets: The memory to be filled: a parameter or some of its rows, and what belongs to it (scales).
        encode: Maps the checkpoint's tensor to what the targets hold, one for one; the rest is a cast and a copy.
        parts: Which part of each of the tensor's dimensions the targets hold; empty where they hold all of it.
        padding: Memory beside the targets that the module has set already, such as the rows that a shard lacks.
        dtypes: Number types that the checkpoint's tensor may have; empty for every floating-point type.
    """

    targets: tuple[Tensor, ...]
    encode: Callable[[Tensor], tuple[Tensor, ...]] = _as_it_is
    parts: tuple[Shard, ...] = ()
    padding: tuple[Tensor, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def key(self) -> int:
        """What tells this memory from any other's: its address."""
        return self.targets[0].data_ptr()

    @property
    def shape(self) -> torch.Size:
        """The shape of what fills it."""
        return self.targets[0].shape

    @property
    def whole_shape(self) -> torch.Size:
        """The shape of the checkpoint's tensor, of which `cut` gives what fills it."""
        return torch.Size(part.size for part in self.parts) if self.parts else self.shape

    def cut(self, tensor: Narrowable) -> Narrowable:
        """Returns the part of a tensor of `whole_shape` that fills this slot: a view, so the rest is not read."""
        for dim, part in enumerate(self.parts):
            if part.count > 1:
                tensor = tensor.narrow(dim, part.start, part.length)
        return tensor

    def accepts(self, dtype: torch.dtype) -> bool:
        """Returns whether the checkpoint's tensor may be of this number type."""
        return dtype in self.dtypes if self.dtypes else dtype.is_floating_point

    def fill(self, tensor: Tensor) -> None:
        """Stores a tensor of `shape`, of any dtype that the slot accepts, from any device."""
        for target, value in zip(self.targets, self.encode(tensor), strict=True):
            target.copy_(value)

    def holds(self, tensor: Tensor) -> bool:
        """Says whether filling it with this tensor would change nothing."""
        return all(
            torch.equal(target, value.to(target))
            for target, value in zip(self.targets, self.encode(tensor), strict=True)
        )


@runtime_checkable
class HasSlots(Protocol):
    """A module that says itself what a checkpoint fills."""

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Yields every (name, slot), the names relative to the module."""

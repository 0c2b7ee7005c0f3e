"""`weight_slots`: collects the weight slots of all modules of a model, and checks that they cover all parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import HasSlots, WeightSlot

__all__ = ["WRAPPED", "weight_slots"]

WRAPPED = "unadapted"
"""Name of a layer inside a wrapper that adds adapters (`LoraLinear`). The layer has the path of the wrapper."""


def weight_slots(model: nn.Module) -> dict[str, WeightSlot]:
    """Returns the weight slots of a model by their names in it. The weight slots of tied weights share their memory.

    A module with a method `slots` yields its weight slots itself. In any other module each parameter and each
    persistent buffer is a weight slot. A buffer that a module computes itself must be made with `persistent=False`.

    Raises:
        CheckpointError: A method `slots` is malformed, or leaves out a part of a parameter or of a persistent buffer.
    """
    slots = {}
    for full_path, module in model.named_modules():
        path = full_path.replace(f".{WRAPPED}", "").removeprefix(WRAPPED)
        state = _own_state(module)
        own = {name: _whole(tensor) for name, tensor in state.items()}
        if isinstance(module, HasSlots):
            own = _declared(path, module)
            for name, tensor in state.items():
                _check_filled(f"{path}.{name}".lstrip("."), tensor, own.values(), type(module).__name__)
        slots.update({f"{path}.{name}".lstrip("."): slot for name, slot in own.items()})
    return slots


def _declared(path: str, module: HasSlots) -> dict[str, WeightSlot]:
    """Returns the weight slots of `module.slots()` by name; raises `CheckpointError` if the method is malformed."""
    kind = type(module).__name__
    try:
        own = dict(module.slots())
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path or 'the model'} ({kind}): slots() must yield pairs of a name and a WeightSlot: {error}"
        ) from error
    for name, slot in own.items():
        if not isinstance(slot, WeightSlot):
            raise CheckpointError(
                f"{path or 'the model'} ({kind}): slots() yields a {type(slot).__name__} for {name!r}, not a WeightSlot"
            )
    return own


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and persistent buffers of a module, without those of its children."""
    state = module.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in state if "." not in name and isinstance(tensor, Tensor)}


def _whole(tensor: Tensor) -> WeightSlot:
    """Returns a weight slot for a whole tensor; integers must have the same number type in the checkpoint."""
    return WeightSlot((tensor,), dtypes=() if tensor.is_floating_point() else (tensor.dtype,), by_row=True)


def _check_filled(name: str, tensor: Tensor, slots: Iterable[WeightSlot], layer: str) -> None:
    """Raises `CheckpointError` unless `targets` and `padding` of the weight slots cover all memory of a tensor."""
    memory = tensor.untyped_storage()
    views = [view for slot in slots for view in (*slot.targets, *slot.padding) if view.untyped_storage() is memory]
    is_filled = _is_chain if all(view.is_contiguous() for view in views) else _is_covered
    if not is_filled(tensor, views):
        raise CheckpointError(
            f"{name}, of shape {list(tensor.shape)}, would not be filled: the weight slots of {layer} must cover all "
            "of it, without overlaps; add the missing weight slot, give the rest as the padding of one, or make it a "
            "buffer with persistent=False if the layer computes it"
        )


def _is_chain(tensor: Tensor, views: Sequence[Tensor]) -> bool:
    """Returns whether contiguous views cover the tensor from its first byte to its last without gaps or overlaps."""
    end, last = _start(tensor), _start(tensor) + tensor.nbytes
    for start, size in sorted({(_start(view), view.nbytes) for view in views}):
        if not size or not _start(tensor) <= start < last:
            continue  # Another parameter of the module lies in the same memory.
        if start != end:
            return False
        end += size
    return end == last


def _is_covered(tensor: Tensor, views: Sequence[Tensor]) -> bool:
    """Returns whether views of any strides cover all bytes of the tensor, each of them once, by marking each byte."""
    marks = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    for view in {(_start(view), view.shape, view.stride()): view for view in views}.values():
        marked = _bytes_of(view, marks)
        if marked.any():
            return False
        marked.fill_(True)
    return bool(_bytes_of(tensor, marks).all())


def _bytes_of(view: Tensor, marks: Tensor) -> Tensor:
    """Returns the view's bytes in `marks`, a tensor with one mark for each byte of the memory behind the view."""
    strides = [stride * view.itemsize for stride in view.stride()]
    return marks.as_strided((*view.shape, view.itemsize), (*strides, 1), _start(view))


def _start(view: Tensor) -> int:
    """Returns the offset in bytes at which a view begins in its memory."""
    return int(view.storage_offset()) * view.itemsize

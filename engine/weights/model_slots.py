"""What a checkpoint has to fill of a model: the slots of all modules, checked so that no memory is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import HasSlots, Slot

__all__ = ["weight_slots"]


def weight_slots(model: nn.Module) -> dict[str, Slot]:
    """Returns every name of a model to be filled, with what it fills. Tied weights share memory.

    A module with a method `slots` is asked for them, whatever its class. In any other module each parameter and each
    persistent buffer is a slot. A buffer that the module computes itself is made with `persistent=False`.

    Raises:
        CheckpointError: The slots of a module leave out a part of a parameter or of a persistent buffer.
    """
    slots = {}
    for path, module in model.named_modules():
        state = _own_state(module)
        own = {name: _whole(tensor) for name, tensor in state.items()}
        if isinstance(module, HasSlots):
            own = dict(module.slots())
            for name, tensor in state.items():
                _check_filled(f"{path}.{name}".lstrip("."), tensor, own.values(), type(module).__name__)
        slots.update({f"{path}.{name}".lstrip("."): slot for name, slot in own.items()})
    return slots


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and persistent buffers of a module, without those of its children."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name}


def _whole(tensor: Tensor) -> Slot:
    """Returns the slot of a tensor that the checkpoint has as it is; of integers only the same type will do."""
    return Slot((tensor,), dtypes=() if tensor.is_floating_point() else (tensor.dtype,))


def _check_filled(name: str, tensor: Tensor, slots: Iterable[Slot], layer: str) -> None:
    """Raises unless the targets and the padding of the slots make up all memory of a tensor."""
    memory = tensor.untyped_storage()
    views = [view for slot in slots for view in (*slot.targets, *slot.padding) if view.untyped_storage() is memory]
    is_filled = _is_chain if all(view.is_contiguous() for view in views) else _is_covered
    if not is_filled(tensor, views):
        raise CheckpointError(
            f"{name}, of shape {list(tensor.shape)}, would not be filled: the slots of {layer} must cover all of it, "
            "without overlaps; add the missing slot, give the rest as the padding of one, or make it a buffer with "
            "persistent=False if the layer computes it"
        )


def _is_chain(tensor: Tensor, views: Sequence[Tensor]) -> bool:
    """Returns whether contiguous views follow each other from the tensor's first byte to its last."""
    end = _start(tensor)
    for start, size in sorted({(_start(view), view.nbytes) for view in views}):
        if size and start != end:
            return False
        end += size
    return end == _start(tensor) + tensor.nbytes


def _is_covered(tensor: Tensor, views: Sequence[Tensor]) -> bool:
    """Returns whether views of any strides cover all bytes of the tensor, by marking each byte."""
    marks = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    for view in views:
        _bytes_of(view, marks).fill_(True)
    return bool(_bytes_of(tensor, marks).all())


def _bytes_of(view: Tensor, marks: Tensor) -> Tensor:
    """Returns the marks of a view's bytes, of which `marks` has one for each byte of the memory."""
    strides = [stride * view.itemsize for stride in view.stride()]
    return marks.as_strided((*view.shape, view.itemsize), (*strides, 1), _start(view))


def _start(view: Tensor) -> int:
    """Returns where in its memory a view begins, in bytes."""
    return int(view.storage_offset()) * view.itemsize

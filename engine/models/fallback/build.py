"""`build_module`: makes a module of transformers with parameters that have no content yet, on any device.

The constructor runs as it does for transformers, but `torch.empty`, from which parameters are made, returns tensors of
the meta device. So buffers that a constructor computes, such as rotary frequencies, have their values, and no memory is
taken for parameters before it is known which of them this process needs.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedModelError
from ...layers import LinearBase
from .attention import RECORDED

__all__ = ["META", "build_module", "build_trial_module", "materialise"]

META = torch.device("meta")

_DEFAULT_DTYPE_LOCK = threading.Lock()
"""Held while the default dtype of torch is changed, which belongs to the process: a rehearsal builds in a thread."""


class _EmptyIsMeta(TorchFunctionMode):
    """Makes `torch.empty` return tensors of the meta device in this thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), "device": "meta"} if func is torch.empty else (kwargs or {}))


def build_module(
    module_class: Any, hf_config: Any, dtype: torch.dtype, attention: str, experts: str | None = None
) -> nn.Module:
    """Makes a module of transformers; its parameters are on the meta device, and it has a copy of the config.

    Args:
        module_class: Class of the module.
        hf_config: The transformers config of the model.
        dtype: Number type of the parameters, except of those for which the class asks for float32.
        attention: Name of the attention function, as it is registered with transformers.
        experts: Name of the function that computes experts; None for the choice of transformers.

    Raises:
        UnsupportedModelError: The constructor fails.
    """
    config = copy.deepcopy(hf_config)
    try:
        with _DEFAULT_DTYPE_LOCK, _EmptyIsMeta():
            module: nn.Module = module_class._from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
            )
    except Exception as error:  # A constructor raises anything.
        raise UnsupportedModelError(
            f"{module_class.__name__} of transformers cannot be made with the paged attention of this engine: "
            f"{error!r:.300}"
        ) from error
    return module.eval().requires_grad_(False)


def build_trial_module(module_class: Any, hf_config: Any) -> nn.Module:
    """Makes a module for a trial: wholly on the meta device, with the attention function of trials.

    Raises:
        UnsupportedModelError: The constructor fails.
    """
    # This computation of experts takes any dtype and shape on the meta device.
    module = build_module(module_class, hf_config, torch.float32, RECORDED, experts="batched_mm")
    materialise(module, torch.float32, META)
    return module


def materialise(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives parameters and persistent buffers memory on a device, without content, and moves computed buffers there.

    Weights that are tied stay tied. Linear layers of our own have their memory already.

    Raises:
        UnsupportedModelError: A buffer that no checkpoint holds was made without content.
    """
    wide = _wide_names(module, dtype)
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # The first of each pair keeps its id from being used again.
    for path, part in module.named_modules():
        if isinstance(part, LinearBase):
            continue
        for name, weight in part.named_parameters(recurse=False):
            if id(weight) not in made:
                new = _empty(weight, f"{path}.{name}", wide, device)
                made[id(weight)] = weight, nn.Parameter(new, requires_grad=False)
            part._parameters[name] = made[id(weight)][1]
        for name, buffer in part.named_buffers(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            is_computed = name in part._non_persistent_buffers_set
            if is_computed and buffer.is_meta and device.type != "meta":
                raise UnsupportedModelError(
                    f"{type(module).__name__}: the buffer {full} is in no checkpoint, and its values are not computed "
                    "where the module is made, so this model cannot run here"
                )
            part._buffers[name] = buffer.to(device) if is_computed else _empty(buffer, full, wide, device)


def _empty(tensor: Tensor, name: str, wide: re.Pattern[str] | None, device: torch.device) -> Tensor:
    dtype = torch.float32 if wide is not None and wide.search(name) else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=device)


def _wide_names(module: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Returns a pattern of the names of weights that stay in float32 in a model of another dtype; None for none."""
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(names)) if names and dtype != torch.float32 else None

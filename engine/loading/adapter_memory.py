"""`lora_bytes`: the memory of the adapter slots of a model, known before the model is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..device import Device, memory_bytes
from ..errors import ConfigError
from ..models import ModelOptions, build_model
from ..parallel.context import SINGLE, ParallelContext

__all__ = ["check_adapter_slots", "lora_bytes"]


def lora_bytes(hf_config: Any, dtype: torch.dtype, options: ModelOptions, parallel: ParallelContext = SINGLE) -> int:
    """Returns the bytes of the adapter slots of one rank, which are taken when the model is built.

    They are `max_loras · max_lora_rank · (P · K + N)` numbers for a linear layer of P fused parts with K inputs and N
    outputs on the rank, and 4 bytes for the rank of each part in each slot.

    Args:
        hf_config: The transformers config of the model.
        dtype: Number type of the adapters' matrices, which is that of the model.
        options: The user's options for the model, with the number and size of the slots.
        parallel: The place of the rank among all ranks.
    """
    if options.adapter_slots is None:
        return 0
    plain = replace(options, quantization=None, stored=None)  # The codes of quantised weights do not matter here.
    adapters = build_model(hf_config, dtype, "meta", plain, parallel).adapters
    assert adapters is not None
    return adapters.num_bytes


def check_adapter_slots(device: Device, num_bytes: int, options: ModelOptions) -> None:
    """Raises if the adapter slots alone need more memory than the device has, or cannot do what other options promise.

    Args:
        device: Device of the model.
        num_bytes: Bytes of the slots, as `lora_bytes` returns them.
        options: The user's options for the model.

    Raises:
        ConfigError: There is too little memory, or the model is deterministic and on a GPU; the message says what to
            change.
    """
    sizes = options.adapter_slots
    if sizes is None:
        return
    if options.deterministic and not device.is_cpu:
        raise ConfigError(
            "deterministic=True with enable_lora=True: on a GPU the order of the sums of an adapter depends on the "
            "batch; leave one of them out"
        )
    most = memory_bytes(device.torch_device)
    if num_bytes > most:
        raise ConfigError(
            f"{sizes.num_slots} adapter slots for ranks up to {sizes.max_rank} take {num_bytes} bytes, and do not fit "
            f"into the {most} bytes of the device; lower max_loras or max_lora_rank"
        )

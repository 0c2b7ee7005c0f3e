"""`Routing`: which tokens of a step have an adapter, grouped by the adapter slot; the host makes it from the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["NO_SLOT", "Routing", "no_routing", "pack_routing"]

NO_SLOT = -1
"""Stands for the adapter slot of a sequence or a token without an adapter."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Which tokens of a step have an adapter, grouped by the adapter slot.

    Attributes:
        packed: `[num_slots + 1 + num_tokens]` int32 on the device of the model, as `pack_routing` returns it.
        num_slots: Number of adapter slots of the model.
        groups: Slot -> `[num_tokens]` int64, the indices of its tokens, for the adapters that change more than linear
            layers. Steps with such adapters are not recorded.
    """

    packed: Tensor
    num_slots: int
    groups: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def starts(self) -> Tensor:
        """`[num_slots + 1]` int32: the tokens of slot s are `tokens[starts[s]:starts[s + 1]]`."""
        return self.packed[: self.num_slots + 1]

    @property
    def tokens(self) -> Tensor:
        """`[num_tokens]` int32: indices of the tokens that have an adapter, by slot. The rest has no meaning."""
        return self.packed[self.num_slots + 1 :]


def pack_routing(slots: np.ndarray, num_slots: int, num_tokens: int) -> np.ndarray:
    """Returns the content of `Routing.packed`.

    Args:
        slots: Adapter slot of each token; `NO_SLOT` for none.
        num_slots: Number of adapter slots of the model.
        num_tokens: Number of tokens to which the step is padded.
    """
    packed = np.zeros(num_slots + 1 + num_tokens, dtype=np.int32)
    tokens = np.flatnonzero(slots >= 0)
    tokens = tokens[np.argsort(slots[tokens], kind="stable")]
    packed[: num_slots + 1] = np.searchsorted(slots[tokens], np.arange(num_slots + 1))
    packed[num_slots + 1 : num_slots + 1 + len(tokens)] = tokens
    return packed


def no_routing(num_slots: int, num_tokens: int, device: torch.device) -> Tensor:
    """Returns `Routing.packed` of a step in which no token has an adapter, to record and to measure steps with.

    Args:
        num_slots: Number of adapter slots of the model.
        num_tokens: Number of tokens of the step.
        device: Device of the step.
    """
    return torch.zeros(num_slots + 1 + num_tokens, dtype=torch.int32, device=device)

"""`TokenMasks`: the tokens that grammars allow in a step, as bits on the host, and their use on the device's logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..device import to_device

__all__ = ["TokenMasks"]

MAX_LOGITS_AT_ONCE = 1 << 24
"""Most logits that are masked at once. A mask takes one byte a logit, which is gigabytes for a large batch."""


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The token masks of a step, one for each sequence that samples and follows a grammar.

    Attributes:
        indices: Indices of the sequences with a mask, among the sequences that sample; ascending.
        bits: `[num_masks, num_bytes]` uint8; bit i of byte j is set if token `8 * j + i` is allowed. Tokens after the
            last byte are not allowed.
    """

    indices: list[int]
    bits: np.ndarray

    def apply(self, logits: Tensor) -> None:
        """Sets the logits of all forbidden tokens to minus infinity, in place; the host does not wait for the device.

        Args:
            logits: `[num_samples, vocab_size]` float32, the logits of the sequences that sample.
        """
        vocab_size = logits.shape[-1]
        has_all = len(self.indices) == len(logits)
        where = None if has_all else to_device(self.indices, torch.int64, logits.device)
        step = max(1, MAX_LOGITS_AT_ONCE // vocab_size)
        for start in range(0, len(self.indices), step):
            part = slice(start, start + step)
            forbidden = _forbidden(self.bits[part], logits.device)[:, :vocab_size]
            if forbidden.shape[-1] < vocab_size:
                forbidden = torch.nn.functional.pad(forbidden, (0, vocab_size - forbidden.shape[-1]), value=True)
            if where is None:
                logits[part].masked_fill_(forbidden, -torch.inf)
            else:
                logits[where[part]] = logits[where[part]].masked_fill(forbidden, -torch.inf)


def _forbidden(bits: np.ndarray, device: torch.device) -> Tensor:
    """Returns `[num_masks, 8 * num_bytes]` bool, True where a bit is not set, on `device`; numpy is used on a CPU."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(~bits, axis=1, bitorder="little").view(np.bool_))
    return _spread(to_device(bits, torch.uint8, device))


def _spread(bits: Tensor) -> Tensor:
    """Returns `[num_masks, 8 * num_bytes]` bool, True where a bit is not set, computed on the device of `bits`."""
    places = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & places).eq(0).flatten(1)

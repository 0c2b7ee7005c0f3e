"""`InputFormat`: the form in which a linear layer reads its rows, and the kernels that write rows in this form.

A layer that multiplies in 8 bits quantises its input. Most inputs come from a norm or from the gate of a feed-forward
network, which have each row in registers when they write it. Such a kernel can quantise the row itself, which saves a
launch, and a read and a write of the rows in 16 bits.

So a linear layer declares its format, and when the model is built, the norm or gate before the layer is made with the
kernel of that format. A layer without a format of its own has `PLAIN`: rows in the dtype of the model. A layer that
must see such rows, for instance to add an adapter's product, keeps `PLAIN` and quantises them itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from ...kernels import gelu_and_mul, rms_norm, silu_and_mul

__all__ = ["GATES", "PLAIN", "InputFormat", "Quantized", "Rows"]


class Quantized(NamedTuple):
    """Rows of numbers of few bits. A row is approximately the product of its values and its scales.

    Attributes:
        values: `[num_tokens, size]`, in the dtype of the scheme.
        scales: Float32 in the shape of the scheme; `[num_tokens, 1]` if each row has one scale.
    """

    values: Tensor
    scales: Tensor


Rows: TypeAlias = Tensor | Quantized
"""The input of a linear layer: `[num_tokens, size]` in the dtype of the model, or the same quantised."""

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functools.partial(gelu_and_mul, approximate="none"),
    "gelu_pytorch_tanh": functools.partial(gelu_and_mul, approximate="tanh"),
    "silu": silu_and_mul,
}
"""Activations of gated networks, by their names in Hugging Face configs.

Each maps a row `cat(gate, up)` to `activation(gate) * up`.
"""


@dataclass(frozen=True, slots=True)
class InputFormat:
    """The form in which a linear layer reads its rows, as the kernels that write it.

    Attributes:
        rms_norm: Takes what `kernels.rms_norm` takes; returns the normed rows in this form, and the new residual.
        gates: Takes for each key of `GATES` what the function there takes; returns the gated rows in this form.
    """

    rms_norm: Callable[..., tuple[Rows, Tensor]]
    gates: Mapping[str, Callable[[Tensor], Rows]]


PLAIN = InputFormat(rms_norm, GATES)
"""Rows in the dtype of the model."""

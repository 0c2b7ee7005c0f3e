"""`Activation`: a function of each number, which a kernel may compute together with the product before it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of each number of a tensor.

    Attributes:
        function: The function.
        fused: Its name in `kernels.packed_linear`, which applies it to the sums of a product; empty if it has none.
    """

    function: Callable[[Tensor], Tensor]
    fused: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the function of each number of `x`, in its shape and dtype."""
        return self.function(x)


_GELU_TANH = Activation(functools.partial(F.gelu, approximate="tanh"), "gelu_tanh")

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": Activation(F.gelu, "gelu"),
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": Activation(F.relu, "relu"),
    "relu2": Activation(lambda x: F.relu(x).square()),
    "silu": Activation(F.silu, "silu"),
}
"""Elementwise activations, by their names in Hugging Face configs."""

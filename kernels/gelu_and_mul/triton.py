"""The gate of a GeGLU layer on the GPU: the kernel is in `kernels/_gated.py`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .._gated import gate_and_mul, gate_specialisations
from .._triton import Specialisation, Target
from .op import gelu_and_mul

_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


@gelu_and_mul.register("cuda")
def gelu_and_mul_triton(x: Tensor, approximate: str) -> Tensor:
    """Runs `gelu_and_mul` in one kernel.

    Raises:
        ValueError: `approximate` is neither "none" nor "tanh".
    """
    if approximate not in _ACTIVATIONS:
        raise ValueError(f"gelu_and_mul: approximate is {approximate!r}; use one of {sorted(_ACTIVATIONS)}")
    return gate_and_mul(x, _ACTIVATIONS[approximate])


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of `gate_and_mul_kernel` that this op uses on a target."""
    return gate_specialisations(target, tuple(_ACTIVATIONS.values()))

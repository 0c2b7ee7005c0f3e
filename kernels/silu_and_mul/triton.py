"""The gate of a SwiGLU layer on the GPU: the kernel is in `kernels/_gated.py`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .._gated import gate_and_mul, gate_specialisations
from .._triton import Specialisation, Target
from .op import silu_and_mul


@silu_and_mul.register("cuda")
def silu_and_mul_triton(x: Tensor) -> Tensor:
    """Runs `silu_and_mul` in one kernel."""
    return gate_and_mul(x, "silu")


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of `gate_and_mul_kernel` that this op uses on a target."""
    return gate_specialisations(target, ("silu",))

"""The gate of a feed-forward layer on the GPU, in Triton: one kernel for every activation.

    out = activation(gate) · up,   x = cat(gate, up)

Grid: (rows, blocks of 1,024 columns). A thread reads 8 numbers of either half, which are 16 bytes each in half
precision. That keeps enough loads in flight to reach the memory bandwidth. `silu_and_mul` and `gelu_and_mul` launch it.
`gate_and_mul_fp8` has a kernel of its own, whose programs own whole rows, and gates as this one does (`gated`). The
product of `experts` gates its results (`activate`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import as_rows
from ._triton import MAX_PLANS, Launch, Specialisation, Target, current_target

_BLOCK = 1024
_NUM_THREADS = 128


def gate_and_mul(x: Tensor, activation: str) -> Tensor:
    """Multiplies the second half of each row by the activation of the first.

    Args:
        x: `[num_tokens, 2 * size]`.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        `[num_tokens, size]`, in the dtype of x.

    Raises:
        ValueError: The number of columns is odd.
    """
    rows = as_rows(x)
    launch = _plan(rows.shape, rows.stride(0), activation, current_target())
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if out.numel():
        launch.run(rows, out)
    return out


@functools.lru_cache(MAX_PLANS)
def _plan(shape: tuple[int, ...], stride: int, activation: str, target: Target) -> Launch:
    num_rows, num_columns = shape
    if num_columns % 2:
        raise ValueError(f"a gated activation got rows of {num_columns} elements; they must be even")
    size = num_columns // 2
    options = {"ACTIVATION": activation, "BLOCK": _BLOCK, **_options(target)}
    return Launch(gate_and_mul_kernel, (num_rows, triton.cdiv(size, _BLOCK)), (stride, size), options)


def gate_specialisations(target: Target, activations: tuple[str, ...]) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel on a target, one for each dtype and given activation."""
    for dtype in ("fp32", "fp16", "bf16"):
        for activation in activations:
            types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "x_stride": "i32", "size": "i32"}
            constants = {"ACTIVATION": activation, "BLOCK": _BLOCK}
            yield Specialisation(gate_and_mul_kernel, types, constants, _options(target), ("x_stride", "size"))


def _options(target: Target) -> dict[str, Any]:
    return {"num_warps": _NUM_THREADS // target.warp_size, "enable_fp_fusion": True}


@triton.jit
def gate_and_mul_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    x_stride,
    size,
    ACTIVATION: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Computes BLOCK columns of a row of the result: activation(gate) * up, from the halves of the row of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * size + column, gated(x_ptr + row * x_stride, column, size, ACTIVATION), mask=column < size)


@triton.jit
def gated(x_ptr, column, size, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns columns of the gated row that begins at `x_ptr`, rounded to its element type; zeros past its end."""
    inside = column < size
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + size + column, mask=inside, other=0.0).to(tl.float32)
    return (activate(gate, ACTIVATION) * up).to(x_ptr.dtype.element_ty)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the activation of float32 numbers."""
    if ACTIVATION == "silu":
        out = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh(y)) / 2 is sigmoid(2 y), and 1.5957... is 2 sqrt(2 / pi).
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return out

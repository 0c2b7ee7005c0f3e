"""The linear layer of a weight in 8-bit floats on the GPU, in Triton; the kernel is in `kernels/_scaled_product.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._fp8 import e4m3_type, has_e4m3
from .._scaled_product import Types, product_specialisations, scaled_product
from .._triton import Specialisation, Target, current_target
from .op import fp8_linear


@fp8_linear.register("cuda")
def fp8_linear_triton(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Runs `fp8_linear` in one kernel, or in two if there are few rows.

    Raises:
        ValueError: The rows of x or the weight are not contiguous.
    """
    return scaled_product(x, x_scale, weight, weight_scale, bias, dtype, current_target())


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernels: plain and 8-bit rows, scales of rows and of groups."""
    e4m3, rows = e4m3_type(target), "fp8e4nv" if has_e4m3(target) else "fp16"
    for dtype in ("fp32", "fp16", "bf16"):
        for by_group in (False, True):
            yield from product_specialisations(target, Types(dtype, "", e4m3, dtype, dtype), by_group)
            yield from product_specialisations(target, Types(rows, "fp32", e4m3, dtype, dtype), by_group)

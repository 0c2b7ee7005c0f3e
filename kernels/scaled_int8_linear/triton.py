"""The linear layer of 8-bit integers on the GPU, in Triton; the kernel is in `kernels/_scaled_product.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._scaled_product import Types, product_specialisations, scaled_product
from .._triton import Specialisation, Target, current_target
from .op import scaled_int8_linear


@scaled_int8_linear.register("cuda")
def scaled_int8_linear_triton(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Runs `scaled_int8_linear` in one kernel, or in two if there are few rows.

    Raises:
        ValueError: The rows of x or the weight are not contiguous.
    """
    return scaled_product(x, x_scale[:, None], weight, weight_scale[None, :], bias, dtype, current_target())


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernels: a result in each dtype."""
    for out in ("fp32", "fp16", "bf16"):
        yield from product_specialisations(target, Types("i8", "fp32", "i8", "fp32", out), by_group=False)

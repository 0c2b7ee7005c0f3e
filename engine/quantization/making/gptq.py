"""`round_for_inputs`: rounds a matrix so that its products with given inputs change least (GPTQ).

Frantar et al., 2022, arXiv:2210.17323. With the inputs X as columns, the squared error of the products is
`trace((W - Q) H (W - Q)^T)` for `H = X X^T`. Columns are rounded one after another, and each time the columns that are
left are changed to make up for the error as well as H allows. Those with the largest inputs come first, while others
can still make up for them. The scales of all groups are chosen before that, so groups stay consecutive columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grid import Grid, QuantisedWeight, as_stored

__all__ = ["relative_product_error", "round_for_inputs"]

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: H of few inputs has no inverse."""

BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""


def round_for_inputs(weight: Tensor, grid: Grid, hessian: Tensor) -> QuantisedWeight:
    """Rounds a matrix for the inputs that a layer gets.

    Args:
        weight: `[num_rows, num_columns]`, whose number type the scales will have.
        grid: The grid; its group size divides the number of columns.
        hessian: `[num_columns, num_columns]` float32, the sum of the outer products of the inputs with themselves.
    """
    numbers, importance = weight.float(), hessian.diagonal().clone()
    is_unused = importance == 0
    importance[is_unused] = 1.0
    scales, zeros = grid.scales(numbers, weight.dtype, importance)
    order = importance.argsort(descending=True)
    inverse = _inverse_factor(hessian, is_unused, order)
    left, codes = numbers[:, order].clone(), torch.empty_like(numbers)
    size = grid.group_size or weight.shape[1]
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = torch.empty(len(weight), stop - start, device=weight.device)
        for i in range(start, stop):
            group = int(order[i]) // size
            scale, zero = scales[:, group], None if zeros is None else zeros[:, group]
            code = grid.round(left[:, i], scale, zero)
            codes[:, order[i]] = code
            error = (left[:, i] - (code if zero is None else code - zero) * scale) / inverse[i, i]
            left[:, i:stop] -= error[:, None] * inverse[i, i:stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return as_stored(grid, codes, scales, zeros, weight.dtype)


def _inverse_factor(hessian: Tensor, is_unused: Tensor, order: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of H, with its columns in order."""
    damped = hessian.clone()
    damped.diagonal()[is_unused] = 1.0
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(damped[order][:, order])
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def relative_product_error(weight: Tensor, rounded: QuantisedWeight, hessian: Tensor) -> float:
    """Returns the norm of the error of the products with the inputs, as a share of the norm of the products."""
    exact = weight.float()
    wrong, total = (float(((each @ hessian) * each).sum()) for each in (rounded.dequantise() - exact, exact))
    return math.sqrt(max(wrong, 0.0) / total) if total > 0 else 0.0

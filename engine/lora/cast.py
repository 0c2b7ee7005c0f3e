"""`cast_matrix`: a matrix of an adapter in the number type of the model, if all of its numbers are finite there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AdapterError, quote

__all__ = ["cast_matrix"]


def cast_matrix(module: str, which: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a matrix in the number type of the model.

    Args:
        module: Name of the module that the matrix belongs to, for messages.
        which: Which matrix of the module it is, for messages.
        numbers: The matrix.
        dtype: Number type of the model.

    Raises:
        AdapterError: A number is not finite in this type.
    """
    cast = numbers.to(dtype).contiguous()
    if not cast.isfinite().all():
        where = "" if numbers.isfinite().all() else " (before they are cast)"
        raise AdapterError(
            f"{which} of {quote(module)} holds NaN or infinite numbers in {dtype}{where}; train the adapter again, or "
            "use a model whose dtype can hold its numbers"
        )
    return cast

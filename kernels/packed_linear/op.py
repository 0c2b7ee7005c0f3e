"""A linear layer over a packed weight: the definition.

    out = activation(x · weightᵀ + bias)

It is for the CPU, where a library would rearrange the weight for every product. The result of a row does not depend on
the other rows, because every row adds up its products in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Draw, Sample, op
from .layout import pack_panels, unpack_panels

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "": lambda x: x,
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }
)
"""The activations by name; the empty name is for none."""


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, out_features in ((1, 2, 1), (1, 64, 5), (7, 130, 96), (64, 64, 64), (200, 122, 200)):
        x, weight = draw.normal(num_rows, in_features), draw.normal(out_features, in_features) * in_features**-0.5
        name = f"{num_rows} x {in_features} to {out_features}"
        packed, bias = pack_panels(weight), draw.normal(out_features)
        yield Sample(name, (x, packed, None, out_features))
        yield Sample(f"{name} biased, float32", (x, packed, bias, out_features, torch.float32))
        for activation in ACTIVATIONS:
            kwargs = {"activation": activation}
            yield Sample(f"{name} {activation or 'biased'}", (3 * x, packed, bias, out_features), kwargs)
    packed = pack_panels(draw.normal(32, 64))
    yield Sample("no rows", (draw.normal(0, 64), packed, draw.normal(32), 32))
    wider, taller = draw.full(torch.nan, 9, 160), draw.full(torch.nan, 14, 64)
    wider[:, 32:96], taller[::2] = draw.normal(9, 64), draw.normal(7, 64)
    yield Sample("columns of a wider matrix", (wider[:, 32:96], packed, None, 32))
    yield Sample("every other row", (taller[::2], packed, None, 32))


@op(samples=_samples, tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1.6e-2)})
def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None = None,
    *,
    activation: str = "",
) -> Tensor:
    """Multiplies rows by a packed matrix, and applies an activation to the sums.

    Args:
        x: `[num_rows, in_features]`, contiguous rows with any stride between them.
        packed: The weight as `pack_panels` returns it, in the dtype of x.
        bias: `[out_features]`, the dtype of x, or None for 0.
        out_features: The number of rows of the weight, without the padding.
        dtype: The dtype of the result: float32, or None for that of x.
        activation: A key of `ACTIVATIONS`.

    Returns:
        `[num_rows, out_features]`. Sums and activations are in float32, and are rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ unpack_panels(packed, out_features).to(wide).t()
    return ACTIVATIONS[activation](out if bias is None else out + bias).to(dtype or x.dtype)

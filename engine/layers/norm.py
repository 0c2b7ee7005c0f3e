"""Norms such as `RMSNorm`, each fused with the addition of the residual stream.

Every norm maps (hidden, residual) to (norm(hidden + residual), hidden + residual). The sum is the new residual stream,
and adding inside the kernel saves one pass over memory. Without a residual the sum is `hidden` itself. An `RMSNorm`
writes the normed rows in the form that the next linear layer reads (`InputFormat`).

When ranks share a sublayer, each rank computes one addend of its result. The norm that follows adds up the addends of
all ranks, because this sum, the residual addition and the norm can be one kernel. A norm whose input is complete is
made without `reduce`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...kernels import layer_norm, rms_norm
from ..parallel.shard import Shard
from .input_format import PLAIN, InputFormat, Rows
from .weight_slot import WeightSlot

__all__ = [
    "Gather",
    "HeadLayerNorm",
    "HeadNorm",
    "LayerNorm",
    "LayerNormPerHead",
    "NoNorm",
    "Norm",
    "ProjectionNorm",
    "RMSNorm",
    "Reduce",
]

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Replaces a tensor by its sum over the ranks of the pp stage and returns it; all ranks get the same bits."""

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""Concatenates the columns of the ranks of the pp stage: `[rows, columns]` to `[rows, tp_size * columns]`."""


class RMSNorm(nn.Module):
    """Adds the residual, divides by the root mean square of the last axis and scales; statistics in float32.

    Args:
        size: Length of the last axis.
        eps: Number that is added to the mean square.
        unit_offset: Whether the scale is `1 + weight` in place of `weight`.
        dtype: Number type of `weight`.
        device: Device of `weight`. Its memory is not initialised.
        reduce: Sums `hidden` over the ranks; None if every rank has the complete `hidden`.
        output: The form of the normed rows: that of the layer which reads them.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        unit_offset: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        reduce: Reduce | None = None,
        output: InputFormat = PLAIN,
    ) -> None:
        super().__init__()
        self.reduce = reduce
        self.eps = eps
        self.unit_offset = unit_offset
        self._norm = output.rms_norm
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Rows, Tensor]:
        """Returns (normed sum, sum) of `hidden` and `residual` (None counts as zeros), both `[..., size]`."""
        if self.reduce is not None:
            hidden = self.reduce(hidden)
        return self._norm(hidden, self.weight, self.eps, residual, add_unit_offset=self.unit_offset)


class LayerNorm(nn.Module):
    """Adds the residual, subtracts the mean of the last axis, divides by the standard deviation, scales and shifts.

    The mean and the standard deviation are computed in float32.

    Args:
        size: Length of the last axis.
        eps: Number that is added to the variance.
        affine: Whether the norm scales and shifts.
        unit_offset: Whether the scale is `1 + weight`. The sum is stored, rounded to the dtype like Nemotron's.
        bias: Whether a norm that scales also shifts.
        dtype: Number type of scale and shift.
        device: Device of scale and shift. Their memory is not initialised.
        reduce: As in `RMSNorm`.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        affine: bool,
        unit_offset: bool = False,
        bias: bool = True,
        dtype: torch.dtype,
        device: torch.device,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        self.reduce = reduce
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if affine:
            self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        if affine and bias:
            self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the names and weight slots of scale and shift, if the norm has them."""
        if self.weight is not None:
            encode = functools.partial(_plus_one, dtype=self.weight.dtype)
            yield "weight", WeightSlot((self.weight,), encode) if self.unit_offset else WeightSlot((self.weight,))
        if self.bias is not None:
            yield "bias", WeightSlot((self.bias,))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (normed sum, sum) of `hidden` and `residual` (None counts as zeros), both `[..., size]`."""
        if self.reduce is not None:
            hidden = self.reduce(hidden)
        return layer_norm(hidden, self.weight, self.bias, self.eps, residual)


class HeadNorm(nn.Module):
    """The weight of the root-mean-square norm of each query or key head, which `RotateAndStore` computes.

    Args:
        head_dim: Size of a head.
        eps: Number that is added to the mean square.
        unit_offset: Whether the scale is `1 + weight`. The sum is stored, in float32, because 16 bits would round it.
        dtype: Number type of the weight of a norm without offset.
        device: Device of the weight. Its memory is not initialised.
    """

    def __init__(
        self, head_dim: int, *, eps: float, unit_offset: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        stored = torch.empty(head_dim, dtype=torch.float32 if unit_offset else dtype, device=device)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields `weight` and its weight slot, which adds 1 to the checkpoint's weight if the norm has an offset."""
        encode = functools.partial(_plus_one, dtype=self.weight.dtype)
        yield "weight", WeightSlot((self.weight,), encode) if self.unit_offset else WeightSlot((self.weight,))


def _plus_one(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (weight.to(dtype) + 1,)


class ProjectionNorm(nn.Module):
    """Divides the heads of a token by the root mean square of the numbers of all of them, and scales each number.

    Ranks that share out the heads gather them, so that the result has the bits of a single rank, in any batch.

    Args:
        heads: The heads of this rank among those of the model.
        head_dim: Size of a head.
        eps: Number that is added to the mean square.
        dtype: Number type of `weight`.
        device: Device of `weight`. Its memory is not initialised.
        gather: Joins the heads of all ranks; None if this rank has them all.
    """

    def __init__(
        self,
        heads: Shard,
        head_dim: int,
        *,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        gather: Gather | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.gather = gather
        self._own = heads.times(head_dim)
        self.weight = nn.Parameter(torch.empty(self._own.size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, heads: Tensor) -> None:
        """Norms `heads` `[num_tokens, num_heads, head_dim]` in place; the heads of a token are consecutive memory."""
        own = heads.flatten(1)
        rows = own if self.gather is None else self._all_heads(self.gather(own))
        normed, _ = rms_norm(rows, self.weight, self.eps)
        own.copy_(normed[:, self._own.start : self._own.start + self._own.length])

    def _all_heads(self, gathered: Tensor) -> Tensor:
        """Returns the heads of the model in order, `[num_tokens, size]`; neighbouring ranks may have the same ones."""
        parts = gathered.unflatten(1, (-1, self._own.length))
        return parts[:, :: parts.shape[1] // self._own.count].flatten(1)


class HeadLayerNorm(nn.Module):
    """Computes a layer norm of each head; all heads have one weight and one bias.

    Args:
        head_dim: Size of a head.
        eps: Number that is added to the variance.
        dtype: Number type of weight and bias.
        device: Device of weight and bias. Their memory is not initialised.
    """

    def __init__(self, head_dim: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(head_dim, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(head_dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, heads: Tensor) -> None:
        """Norms `heads` `[num_tokens, num_heads, head_dim]` in place."""
        normed, _ = layer_norm(heads, self.weight, self.bias, self.eps)
        heads.copy_(normed)


class LayerNormPerHead(nn.Module):
    """Computes a layer norm of each head, with a weight of its own and without a bias.

    Args:
        heads: The heads of this rank among those of the model.
        head_dim: Size of a head.
        eps: Number that is added to the variance.
        dtype: Number type of the weights.
        device: Device of the weights. Their memory is not initialised.
    """

    def __init__(self, heads: Shard, head_dim: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self._first = heads.start
        weights = torch.empty(heads.length, head_dim, dtype=dtype, device=device)
        self.weight = nn.Parameter(weights, requires_grad=False)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields `norms.I.weight` and its weight slot for each head I, numbered as in the model."""
        for index, weight in enumerate(self.weight, self._first):
            yield f"norms.{index}.weight", WeightSlot((weight,))

    def forward(self, heads: Tensor) -> None:
        """Norms `heads` `[num_tokens, num_heads, head_dim]` in place."""
        normed, _ = layer_norm(heads, None, None, self.eps)
        torch.mul(normed, self.weight, out=heads)


class NoNorm(nn.Module):
    """Takes the place of a norm in models without one: adds the residual and does not norm the sum.

    Args:
        reduce: As in `RMSNorm`.
    """

    def __init__(self, *, reduce: Reduce | None = None) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (sum, sum) of `hidden` and `residual` (None counts as zeros), both `[..., size]`."""
        if self.reduce is not None:
            hidden = self.reduce(hidden)
        total = hidden if residual is None else hidden + residual
        return total, total


Norm: TypeAlias = RMSNorm | LayerNorm | NoNorm
"""Any norm, or the module in place of one."""

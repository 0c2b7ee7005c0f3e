"""`Grid`: the numbers that a quantised weight can hold; `round_to_grid` rounds each weight to the nearest of them.

A weight of row n and group g is stored as a code q, which stands for `(q - zero[n, g]) * scale[n, g]`. The scale
decides which numbers there are. One that lets the largest weight of a group fit exactly makes the steps between the
numbers wide for all others, so the scales are searched: of some that clip the largest weights more and more, the one
with the least sum of squared errors is taken, for each group by itself. Floats have small steps for small numbers, so
for them nothing is clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Grid", "QuantisedWeight", "as_stored", "pieces", "round_to_grid"]

CLIPPED_TO = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""The shares of a group's largest weight that are tried as its largest number."""

PIECE_NUMBERS = 1 << 19
"""Weights whose scales are searched at once, which bounds the temporary memory."""

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers of a format.

    Attributes:
        bits: Bits of a code.
        group_size: Consecutive weights of a row that share a scale; None for one scale for each row.
        symmetric: Whether the grid has no zero points, so that code 0 is the number 0.
        is_float: Whether codes are e4m3 floats, and not integers.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    is_float: bool = False

    @property
    def lowest(self) -> float:
        """The lowest code."""
        return -torch.finfo(E4M3).max if self.is_float else -float(1 << (self.bits - 1))

    @property
    def highest(self) -> float:
        """The highest code."""
        return torch.finfo(E4M3).max if self.is_float else float((1 << (self.bits - 1)) - 1)

    def groups(self, weight: Tensor) -> Tensor:
        """Returns the view `[num_rows, num_groups, group_size]` of a matrix."""
        return weight.unflatten(1, (-1, self.group_size or weight.shape[1]))

    def round(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Returns the nearest codes as float32; all tensors broadcast."""
        codes = weight / scales
        codes = codes if zeros is None else codes + zeros
        codes = codes.clamp(self.lowest, self.highest)
        return codes.to(E4M3).float() if self.is_float else codes.round_()

    def scales(
        self, weight: Tensor, dtype: torch.dtype, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Searches the scales and zero points of a matrix.

        Args:
            weight: `[num_rows, num_columns]` float32.
            dtype: Number type in which the scales will be stored, to which they are rounded.
            importance: `[num_columns]` float32, factors on the squared errors of columns; None for 1.

        Returns:
            The scales, `[num_rows, num_groups]` float32, and the zero points, of the same shape; None if the grid is
            symmetric.
        """
        found = [self._search(rows, dtype, importance) for rows in pieces(weight)]
        zeros = None if self.symmetric else torch.cat([zeros for _, zeros in found if zeros is not None])
        return torch.cat([scales for scales, _ in found]), zeros

    def _search(self, rows: Tensor, dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        groups = self.groups(rows)
        factors = None if importance is None else self.groups(importance[None])
        best: Tensor | None = None
        for share in CLIPPED_TO[: 1 if self.is_float else None]:
            tried = self._clipped(groups, share, dtype)
            scales, zeros = tried[0], None if self.symmetric else tried[1]
            codes = self.round(groups, scales, zeros)
            errors = ((codes if zeros is None else codes - zeros) * scales).sub_(groups).square_()
            error = (errors if factors is None else errors * factors).sum(2, keepdim=True)
            if best is None:
                best, least = tried, error
            else:
                is_better = error < least
                best, least = torch.where(is_better, tried, best), torch.where(is_better, error, least)
        assert best is not None
        return best[0, ..., 0], None if self.symmetric else best[1, ..., 0]

    def _clipped(self, groups: Tensor, share: float, dtype: torch.dtype) -> Tensor:
        """Returns the scale and the zero point of each group, stacked, whose largest number is a share of its own."""
        if self.symmetric:
            scales = _stored(groups.abs().amax(2, keepdim=True) * (share / self.highest), dtype)
            return torch.stack((scales, torch.zeros_like(scales)))
        lows, highs = (edge.unsqueeze(2) * share for edge in (groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)))
        scales = _stored((highs - lows) / (self.highest - self.lowest), dtype)
        return torch.stack((scales, (self.lowest - lows / scales).round().clamp(self.lowest, self.highest)))


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns scales as they will be read back; a group of zeros has the scale 1."""
    scales = scales.to(dtype).float()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """The codes of a matrix.

    Attributes:
        grid: The grid.
        codes: `[num_rows, num_columns]` int8 or float8_e4m3fn.
        scales: `[num_rows, num_groups]` in the number type in which they are stored.
        zeros: `[num_rows, num_groups]` int8; None if the grid is symmetric.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def dequantise(self) -> Tensor:
        """Returns the matrix that the codes stand for, `[num_rows, num_columns]` float32."""
        codes = self.grid.groups(self.codes.float())
        if self.zeros is not None:
            codes = codes - self.zeros.float().unsqueeze(2)
        return (codes * self.scales.float().unsqueeze(2)).flatten(1)

    def rows(self, start: int, stop: int) -> QuantisedWeight:
        """Returns some rows."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=zeros)

    def relative_error(self, weight: Tensor) -> float:
        """Returns the norm of the difference from the exact matrix, as a share of the norm of that."""
        wrong, total, start = 0.0, 0.0, 0
        for rows in pieces(weight):
            exact, stop = rows.float(), start + len(rows)
            wrong += float((self.rows(start, stop).dequantise() - exact).square_().sum())
            total, start = total + float(exact.square().sum()), stop
        return math.sqrt(wrong / total) if total else 0.0


def round_to_grid(weight: Tensor, grid: Grid) -> QuantisedWeight:
    """Rounds each weight of a matrix to the nearest number of a grid.

    Args:
        weight: `[num_rows, num_columns]`, whose number type the scales will have.
        grid: The grid; its group size divides the number of columns.
    """
    found = []
    for rows in pieces(weight):
        numbers = rows.float()
        scales, zeros = grid.scales(numbers, weight.dtype)
        codes = grid.round(
            grid.groups(numbers), scales.unsqueeze(2), None if zeros is None else zeros.unsqueeze(2)
        ).flatten(1)
        found.append(as_stored(grid, codes, scales, zeros, weight.dtype))
    zeros = None if grid.symmetric else torch.cat([piece.zeros for piece in found if piece.zeros is not None])
    codes, scales = (torch.cat(parts) for parts in zip(*((piece.codes, piece.scales) for piece in found), strict=True))
    return QuantisedWeight(grid, codes, scales, zeros)


def as_stored(grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> QuantisedWeight:
    """Returns codes, scales and zero points, which are float32, in the number types in which they are stored."""
    kind = E4M3 if grid.is_float else torch.int8
    return QuantisedWeight(grid, codes.to(kind), scales.to(dtype), None if zeros is None else zeros.to(torch.int8))


def pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows of a matrix in parts, of each of which a few temporary copies are small."""
    return weight.split(max(1, PIECE_NUMBERS // weight.shape[1]))

"""`Recipe`: the schemes that `millrace quantize` knows, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .grid import Grid

__all__ = ["HEAD_BITS", "RECIPES", "Recipe", "find_recipe"]

GROUP_SIZES = (128, 64, 32)
"""Group sizes in the order in which they are tried: readers have kernels for these."""

HEAD_BITS = (4, 8)
"""Bits that the output head can be stored in."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A scheme of a quantised checkpoint.

    Attributes:
        grid: The grid of the weights; its group size is 0 as long as it is not chosen for a model.
        format: Name of compressed-tensors for the layout of the tensors.
        activation_grid: The grid to which the inputs of a layer are rounded when it runs, with a scale for each token;
            None if they stay as they are.
    """

    grid: Grid
    format: str
    activation_grid: Grid | None = None

    @property
    def activations(self) -> Mapping[str, Any] | None:
        """What config.json says about the inputs of the layers."""
        if self.activation_grid is None:
            return None
        return {
            "num_bits": self.activation_grid.bits,
            "type": "float" if self.activation_grid.is_float else "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }

    def round_input(self, rows: Tensor) -> Tensor:
        """Returns inputs of a layer `[num_tokens, num_columns]` as the layer will see them, in the same dtype."""
        if self.activation_grid is None:
            return rows
        numbers = rows.float()
        scales = (numbers.abs().amax(1, keepdim=True) / self.activation_grid.highest).clamp(min=torch.finfo().tiny)
        return (self.activation_grid.round(numbers, scales, None) * scales).to(rows.dtype)


INT8, E4M3 = Grid(8), Grid(8, is_float=True)

RECIPES = {
    "w4a16": Recipe(Grid(4, 0), "pack-quantized"),
    "w8a16": Recipe(Grid(8), "pack-quantized"),
    "w8a8": Recipe(INT8, "int-quantized", INT8),
    "fp8": Recipe(E4M3, "float-quantized", E4M3),
}
"""Name of a scheme -> the scheme."""


def find_recipe(scheme: str, group_size: int | None, *, symmetric: bool) -> Recipe:
    """Returns a scheme with the user's choices.

    Args:
        scheme: One of `RECIPES`.
        group_size: The group size; None to choose it for the model.
        symmetric: Whether the grid has no zero points.

    Raises:
        ConfigError: The scheme is unknown, or has no such choice.
    """
    if scheme not in RECIPES:
        raise ConfigError(f"scheme must be one of {', '.join(RECIPES)}; got {scheme!r}")
    recipe = RECIPES[scheme]
    has_groups, has_zeros = recipe.grid.group_size is not None, recipe.format == "pack-quantized"
    if group_size is not None and not (has_groups and group_size in GROUP_SIZES):
        allowed = f"one of {', '.join(map(str, GROUP_SIZES))}" if has_groups else "left out: rows have one scale each"
        raise ConfigError(f"group_size of scheme {scheme!r} must be {allowed}; got {group_size!r}")
    if not symmetric and not has_zeros:
        raise ConfigError(f"scheme {scheme!r} has no zero points; use w4a16 or w8a16, or leave 'asymmetric' out")
    grid = replace(recipe.grid, symmetric=symmetric)
    return replace(recipe, grid=grid if group_size is None else replace(grid, group_size=group_size))

"""How compressed-tensors stores a quantised matrix (`stored_tensors`), and what config.json says (`group_config`).

The package compressed-tensors 0.20.1 is the reference; the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .grid import Grid, QuantisedWeight, pieces

__all__ = ["group_config", "pack_words", "stored_tensors"]

WORD_BITS = 32


def stored_tensors(weight: QuantisedWeight, *, packed: bool) -> Mapping[str, Tensor]:
    """Returns the tensors of a matrix by the last part of their names.

    Args:
        weight: The matrix.
        packed: Whether several codes of a row share a word of 32 bits (`pack-quantized`); otherwise each code is an
            8-bit number of its own (`int-quantized`, `float-quantized`).
    """
    if not packed:
        assert weight.zeros is None
        return {"weight": weight.codes, "weight_scale": weight.scales}
    bits, shape = weight.grid.bits, torch.tensor(weight.codes.shape)
    found = {"weight_packed": pack_words(weight.codes, bits), "weight_scale": weight.scales, "weight_shape": shape}
    if weight.zeros is not None:
        # The zero points of a column of groups are packed, not those of a row.
        found["weight_zero_point"] = pack_words(weight.zeros.t(), bits).t().contiguous()
    return found


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs the codes of each row into words of 32 bits, the first code in the lowest bits.

    Args:
        codes: `[num_rows, num_columns]` int8; the words hold `code + 2 ** (bits - 1)`, which is not negative.
        bits: 4 or 8.

    Returns:
        `[num_rows, ceil(num_columns * bits / 32)]` int32.
    """
    return torch.cat([_packed(rows, bits) for rows in pieces(codes)])


def _packed(codes: Tensor, bits: int) -> Tensor:
    per_word, half = WORD_BITS // bits, 1 << (bits - 1)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word), value=-half)
    words = torch.zeros(len(codes), padded.shape[1] // per_word, dtype=torch.int32, device=codes.device)
    for place, column in enumerate(padded.unflatten(1, (-1, per_word)).unbind(2)):
        words |= (column.to(torch.int32) + half) << (bits * place)
    return words


def group_config(grid: Grid, format: str, targets: list[str], activations: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the entry of `config_groups` for the layers with one grid.

    Args:
        grid: The grid of their weights.
        format: Name of the format of their tensors.
        targets: Names of the layers, or the name of their class.
        activations: What the format does to the inputs of the layers; None for nothing.
    """
    weights = {
        "num_bits": grid.bits,
        "type": "float" if grid.is_float else "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": format,
    }

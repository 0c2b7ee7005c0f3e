"""`read_stored_forms`: finds out how each matrix of a quantised checkpoint is stored, from the headers of its files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..device import Device
from ..models.hf_config import quantization_settings
from ..quantization.checkpoint_format import CheckpointFormat
from ..quantization.registry import find_format
from ..quantization.stored import StoredForms
from ..storage import Location
from ..weights.checkpoint import WeightMap, iter_tensors
from ..weights.codes import QuantForm
from ..weights.tensor_view import form_of

__all__ = ["plan_stored_forms", "read_stored_forms"]


def read_stored_forms(
    place: Location, weights: WeightMap, hf_config: Any, quantization: str | None, device: Device
) -> StoredForms | None:
    """Returns how the matrices of a checkpoint are quantised; None for an unquantised checkpoint. No numbers are read.

    Args:
        place: The folder of the weights.
        weights: The names of the model's weights in the checkpoint.
        hf_config: The transformers config of the model.
        quantization: The setting of this name.
        device: Device of the model.

    Raises:
        ConfigError: The setting contradicts the checkpoint.
        UnsupportedModelError: The format, or a value of a field of its config, is not implemented.
        CheckpointError: A tensor of a quantised matrix is missing or misshapen.
    """
    checkpoint_format = find_format(quantization_settings(hf_config), quantization)
    if checkpoint_format is None:
        return None
    return StoredForms(device, checkpoint_format, dict(_forms(place, weights, checkpoint_format)))


def plan_stored_forms(hf_config: Any, quantization: str | None, device: Device) -> StoredForms | None:
    """Returns how the matrices of a checkpoint are likely quantised, by the config alone.

    Args:
        hf_config: As in `read_stored_forms`, and so are the other arguments and the errors.
        quantization: The setting of this name.
        device: Device of the model.
    """
    checkpoint_format = find_format(quantization_settings(hf_config), quantization)
    if checkpoint_format is None:
        return None
    return StoredForms(device, checkpoint_format, planned=checkpoint_format.planned_form)


def _forms(place: Location, weights: WeightMap, checkpoint_format: CheckpointFormat) -> Iterator[tuple[str, QuantForm]]:
    """Yields our name of each layer or fused part whose matrix is quantised, and its form."""
    for name, tensor in checkpoint_format.join(iter_tensors(place)):
        form = form_of(tensor)
        if form is None:
            continue
        try:
            names = weights.all_ours(name)
        except KeyError:
            continue  # The loader says that the model has no such tensor.
        yield from ((ours.rpartition(".")[0], form) for ours in names)

"""`StoredForms`: how the matrices of a checkpoint are quantised; `StoredScheme`: makes the layers for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..device import Device
from ..layers import Experts, ExpertsLayer, LinearBase
from ..weights.codes import QuantForm
from .checkpoint_format import CheckpointFormat
from .coded_experts import CodedExperts
from .full_precision import FullPrecision
from .group_linear import GroupLinear
from .registry import find_scheme, scheme_names
from .scheme import LinearSpec, QuantizationScheme
from .split_linear import SplitLinear

__all__ = ["StoredForms", "StoredScheme"]

EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class StoredForms:
    """How the matrices of a checkpoint are quantised, by our names of their layers.

    Attributes:
        device: Device of the model.
        checkpoint_format: The format of the checkpoint.
        forms: Our name of a layer, or of a fused part -> the form of its matrix. Others are plain.
        planned: The form of all layers but output heads, if the weights are not there yet; None if they are.
    """

    device: Device
    checkpoint_format: CheckpointFormat
    forms: Mapping[str, QuantForm] = field(default_factory=dict)
    planned: QuantForm | None = None

    def of(self, name: str) -> QuantForm | None:
        """Returns the form of a layer's matrix, or of that of a fused part or an expert; None for a plain one."""
        if self.planned is not None and self.checkpoint_format.plans(name):
            return self.planned
        # The matrices of all experts may be one tensor, whose name has a star in the place of the expert.
        return self.forms.get(name) or self.forms.get(EXPERT.sub(".experts.*.", name))


class StoredScheme(QuantizationScheme):
    """Makes the layers of a quantised checkpoint: each by the scheme that multiplies by matrices of its form.

    A matrix that no scheme takes is dequantised at load. A fused layer whose parts are stored in different ways becomes
    several layers.

    Args:
        stored: How the matrices are stored.
        deterministic: Whether each row of a batch must get the same bits whatever the other rows are.
    """

    def __init__(self, stored: StoredForms, *, deterministic: bool = False) -> None:
        super().__init__(deterministic=deterministic)
        self._stored = stored
        self._plain = FullPrecision(deterministic=deterministic)
        self._schemes = [find_scheme(name) for name in scheme_names()]
        self._dequantised: dict[str, list[str]] = {}  # Reason -> names of layers.
        self._plain_inputs: list[str] = []

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Accepts every device and dtype: what cannot be multiplied as it is stored is dequantised."""

    def applies_to(self, layer: LinearSpec) -> bool:
        """Returns whether a part of the layer is quantised in the checkpoint."""
        return any(self._stored.of(part) for part in layer.part_names)

    def supports_sizes(self, layer: LinearSpec) -> bool:
        """Returns True for every layer."""
        return True

    def make_linear(self, layer: LinearSpec) -> LinearBase:
        """Makes a layer, or one for each fused part if the parts are stored in different ways."""
        forms = [self._stored.of(part) for part in layer.part_names]
        if len(set(forms)) == 1 and not (len(forms) > 1 and forms[0] and forms[0].act_order):
            return self._make(layer, forms[0])
        parts = {
            block: self._make(replace(layer, name=name, blocks={"": rows}), form)
            for (block, rows), name, form in zip(layer.blocks.items(), layer.part_names, forms, strict=True)
        }
        return SplitLinear(parts)

    def make_experts(self, layer: ExpertsLayer) -> Experts:
        """Makes the experts of a layer as they are stored, or in full precision if no kernel multiplies by them so.

        Raises:
            ConfigError: A rank's part of an expert does not end with a group of columns.
        """
        inner, down = (self._expert_forms(layer, parts) for parts in (layer.projections, ("down",)))
        if inner | down == {None}:
            return self._plain.make_experts(layer)
        (first, *others), (second, *more) = inner, down
        reason = ": the experts of a layer are stored in different ways"
        if first and second and not others and not more:
            declined = CodedExperts.declines(layer, first, second, self._stored.device)
            if declined is None:
                return CodedExperts(layer, first, second, deterministic=self.deterministic)
            reason = declined
        self._dequantised.setdefault(reason, []).append(layer.name)
        return self._plain.make_experts(layer)

    def _expert_forms(self, layer: ExpertsLayer, parts: tuple[str, ...]) -> set[QuantForm | None]:
        """Returns the forms of some matrices of all experts, which multiply plain activations whatever is asked for."""
        names = (f"{layer.name}.{expert}.{part}" for expert in range(layer.own.size) for part in parts)
        return {form and replace(form, inputs=None) for form in map(self._stored.of, names)}

    def _make(self, layer: LinearSpec, form: QuantForm | None) -> LinearBase:
        if form is None:
            return self._plain.make_linear(layer)
        reasons = []
        for scheme in self._schemes:
            reason = scheme.declines(form, layer, self._stored.device, deterministic=self.deterministic)
            if reason is None:
                return scheme.make_stored(layer, form)
            reasons.append(reason)
        if form.inputs is not None:
            self._plain_inputs.append(layer.name)
            return self._make(layer, replace(form, inputs=None))
        self._dequantised.setdefault(next(filter(None, reasons), ""), []).append(layer.name)
        return self._plain.make_linear(layer)

    def table_form(self, layer: LinearSpec) -> QuantForm | None:
        """Returns the form that the table has in the checkpoint, if it is integers in groups."""
        form = self._stored.of(layer.name)
        if form is None:
            return None
        reason = GroupLinear.declines(form, layer, self._stored.device, deterministic=self.deterministic)
        if reason is None and not form.act_order:
            return form
        self._dequantised.setdefault(reason or "", []).append(layer.name)
        return None

    def notes(self) -> Iterator[str]:
        """Yields what the format has to say, and a sentence about the layers that are dequantised, for each reason."""
        yield from self._stored.checkpoint_format.notes()
        if self._plain_inputs:
            yield (
                f"the inputs of {_and_more(self._plain_inputs)} are not quantised as the checkpoint asks, which is "
                "more exact: no layer does that on this device"
            )
        for reason, names in self._dequantised.items():
            yield f"{_and_more(names)} are dequantised at load, so they take the memory of full precision{reason}"


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")

"""`Calibration`: rounds a model layer by layer, each for the inputs that the rounded layers before it make of rows.

Of the weights, one layer is in memory at a time, besides the embedding and the head. Two more streams of rows, which
are not used to round, go along: through the exact layers, and through the rounded ones. Their perplexities say what
rounding has cost.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...layers import LinearBase, WeightSlot
from ...models.decoder import Decoder
from ...weights.checkpoint import Sources, StoredTensor, WeightMap, fill_slots, match_tensor, read_part
from ...weights.model_slots import weight_slots
from .grid import QuantisedWeight
from .plan import HEAD, WEIGHT, QuantizationPlan, our_names
from .row_stream import RowStream

__all__ = ["Calibration"]

Write = Callable[[str, Tensor, Tensor | None], QuantisedWeight | None]
"""Rounds a tensor, for the inputs with the given sum of outer products if there is one, and writes it."""


class Calibration:
    """Rounds the layers of a model for the inputs that rows give them.

    Args:
        model: The model, whose weights are not loaded.
        sources: The tensors of the checkpoint for each weight of the model.
        weights: The names of the model's weights in the checkpoint.
        plan: Which matrices are quantised.
        rows: Token ids of the rows by which weights are rounded.
        held_out: Token ids of the rows of the perplexities.

    Attributes:
        perplexity_before: Perplexity of the model on the held-out rows.
        perplexity_after: Perplexity of the rounded model on them.
    """

    perplexity_before: float
    perplexity_after: float

    def __init__(
        self,
        model: Decoder,
        sources: Sources,
        weights: WeightMap,
        plan: QuantizationPlan,
        rows: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
    ) -> None:
        self._model, self._weights, self._plan = model, weights, plan
        self._slots, self._sources = weight_slots(model), dict(sources)
        self._rows, self._held_out = rows, held_out

    @torch.inference_mode()
    def round_all(self, tensors: Mapping[str, StoredTensor], write: Write, bar: Callable[..., Iterator[int]]) -> None:
        """Rounds and writes all tensors of the checkpoint.

        Args:
            tensors: The tensors by name.
            write: Rounds and writes one tensor.
            bar: Makes the progress bar of the layers.
        """
        by_layer: dict[str, list[str]] = {}
        for name in tensors:
            by_layer.setdefault(self._layer_of(name), []).append(name)
        head = None
        for name in by_layer.get("", ()):
            head = write(name, _read(tensors[name]), None) or head
        self._fill("")
        fit, exact, rounded = (RowStream(self._model, rows) for rows in (self._rows, self._held_out, self._held_out))
        for layer in bar(range(self._model.spec.num_layers)):
            names, slots = by_layer[f"layers.{layer}."], self._fill(f"layers.{layer}.")
            exact.run(layer)
            self._round_layer(layer, names, tensors, slots, fit, write)
            with self._rounded_inputs(layer, names):
                fit.run(layer)
                rounded.run(layer)
            slots.clear()
            self._model.layers[layer].to("meta")
        self.perplexity_before = exact.perplexity()
        if head is not None:
            self._slots[HEAD + WEIGHT].fill(head.dequantise())
        self.perplexity_after = rounded.perplexity()

    def _layer_of(self, name: str) -> str:
        """Returns the beginning of our names of the layer's weights to which a tensor belongs; empty if to none."""
        return _layer((our_names(self._weights, name) or [""])[0])

    def _fill(self, layer: str) -> dict[str, WeightSlot]:
        """Loads the weights of a layer, or of all that is in none, and returns their weight slots.

        Those of a layer are forgotten here, so that its memory is free when the caller forgets them too.
        """
        names = [name for name in self._slots if _layer(name) == layer]
        slots = {name: self._slots.pop(name) if layer else self._slots[name] for name in names}
        fill_slots(slots, {name: self._sources.pop(name) for name in names if name in self._sources})
        return slots

    def _round_layer(
        self,
        layer: int,
        names: Sequence[str],
        tensors: Mapping[str, StoredTensor],
        slots: Mapping[str, WeightSlot],
        fit: RowStream,
        write: Write,
    ) -> None:
        """Rounds and writes the tensors of a layer, and loads what they have become."""
        products: dict[str, Tensor] = {}
        with self._rounded_inputs(layer, names, products):
            fit.run(layer, keeps=False)
        for name in names:
            tensor = _read(tensors[name])
            if self._plan.grid_of(name) is None:
                write(name, tensor, None)
                continue
            own = our_names(self._weights, name)[0]
            path = next((path for path in products if own.startswith(f"{path}.")), "")
            rounded = write(name, tensor, products.get(path))  # The inputs of an expert are not known.
            assert rounded is not None
            for ours, part in match_tensor(slots, self._weights, name, rounded.dequantise().cpu()):
                slots[ours].fill(read_part(slots[ours], part))

    @contextlib.contextmanager
    def _rounded_inputs(
        self, layer: int, names: Sequence[str], products: dict[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Rounds the inputs of a layer's quantised linear layers as the scheme says, and adds up their products."""
        planned = {ours for name in names if self._plan.grid_of(name) for ours in our_names(self._weights, name)}
        handles: list[RemovableHandle] = []
        for path, module in self._model.layers[layer].named_modules(prefix=f"layers.{layer}"):
            if isinstance(module, LinearBase) and any(f"{path}.{name}" in planned for name, _ in module.slots()):
                handles.append(module.register_forward_pre_hook(self._hook(path, products)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str, products: dict[str, Tensor] | None) -> Callable[..., tuple[Tensor]]:
        def before(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            rows = self._plan.recipe.round_input(inputs[0])
            if products is not None:
                numbers = rows.float()
                found = numbers.t() @ numbers
                products[path] = products[path] + found if path in products else found
            return (rows,)

        return before


def _layer(name: str) -> str:
    """Returns the beginning of our name of a layer's weight, such as `layers.3.`; empty for other weights."""
    found = re.match(r"layers\.\d+\.", name)
    return found[0] if found else ""


def _read(tensor: StoredTensor) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.read()

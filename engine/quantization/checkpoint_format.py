"""`CheckpointFormat`: the interface of a format of quantised checkpoints.

A format reads the settings of its config, and joins the tensors of each quantised matrix to one (`QuantisedMatrix`).
The formats are files of `formats/`. The tensors that are there decide which matrices are quantised, because many
checkpoints do not say which layers they leave plain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from ..weights.codes import QuantForm
from ..weights.tensor_view import StoredTensor

__all__ = ["CheckpointFormat"]

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointFormat(ABC):
    """A format of quantised checkpoints.

    Args:
        config: The `quantization_config` of the checkpoint.

    Attributes:
        leaves: Endings of the names of the tensors of a quantised matrix, after the name of its module and a dot.

    Raises:
        UnsupportedModelError: A field has a value that is not implemented; the message names it.
    """

    leaves: ClassVar[tuple[str, ...]]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @property
    @abstractmethod
    def planned_form(self) -> QuantForm | None:
        """The form of most matrices, by the config alone; used to plan before the weights are there."""

    def plans(self, name: str) -> bool:
        """Returns whether a matrix likely has `planned_form`: every matrix but output heads and the token embedding."""
        return name not in ("embed_tokens", "lm_head", "score")

    @abstractmethod
    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields the tensors of a module as the loader takes them, with names relative to the module.

        Args:
            module: The checkpoint's name of the module.
            tensors: Its tensors with a name in `leaves`, by this name. A plain matrix alone does not come here.

        Raises:
            CheckpointError: A tensor is missing or misshapen; the message names the module and the tensor.
        """

    def notes(self) -> Iterator[str]:
        """Yields a sentence about each thing that the checkpoint asks for and that is not done, for the log."""
        return iter(())

    def join(self, tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[tuple[str, StoredTensor]]:
        """Yields the tensors of a checkpoint; those of a quantised matrix become one, named `weight`.

        Args:
            tensors: The name and the tensor of each.

        Raises:
            CheckpointError: A tensor of a quantised matrix is missing or misshapen.
        """
        modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in tensors:
            module, leaf = self.split(name)
            if leaf:
                modules.setdefault(module, {})[leaf] = tensor
            else:
                yield name, tensor
        for module, found in modules.items():
            joined: Iterable[tuple[str, StoredTensor]] = found.items()
            if found.keys() != {"weight"} or found["weight"].dtype not in PLAIN:
                joined = self.join_module(module, found)
            yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in joined)

    def split(self, name: str) -> tuple[str, str]:
        """Returns the module and the leaf of a tensor's name; an empty leaf if it belongs to no quantised matrix."""
        for leaf in self.leaves:
            if name.endswith(f".{leaf}"):
                return name.removesuffix(f".{leaf}"), leaf
        return name, ""

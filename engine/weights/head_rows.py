"""`HeadRows`: fills the head of a classifier with rows of the output head of a model that generates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Join, StoredTensor, Tensors, WeightMap
from .quantised_matrix import numbers_of

__all__ = ["HeadRows"]

CLASS_HEAD = "score.weight"


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of a checkpoint's output head that are the classes of a classifier.

    Attributes:
        source: Our name of the matrix: of the output head, or of the token embedding that it is tied to. In a module of
            transformers, the name may have a prefix.
        token_ids: Ids of the tokens whose rows are taken.
        subtracts: As in `TokenClasses`.
        scale: Factor on the logits of tokens, which the rows take over.
    """

    source: str
    token_ids: tuple[int, ...]
    subtracts: bool
    scale: float = 1.0

    def after(self, join: Join, weights: WeightMap) -> Join:
        """Returns a function that adds the head of the classifier to the tensors that `join` returns.

        Args:
            join: As in `match_weights`.
            weights: The names of the model's weights in the checkpoint.
        """
        return lambda tensors: self._added(join(tensors), weights)

    def _added(self, tensors: Tensors, weights: WeightMap) -> Iterator[tuple[str, StoredTensor]]:
        is_found = False
        for name, tensor in tensors:
            ours = _ours(weights, name)
            if CLASS_HEAD in ours:
                raise CheckpointError(f"{name} is a head for classes of its own; leave classifier_from_token out")
            yield name, tensor
            if not is_found and any(f".{one}".endswith(f".{self.source}") for one in ours):
                is_found = True
                yield weights.theirs(CLASS_HEAD), self._rows(name, tensor)
        if not is_found:
            raise CheckpointError(
                f"the checkpoint has no {self.source.removesuffix('.weight')}, of whose rows classifier_from_token "
                "makes the classes; use a checkpoint that has it, or leave the field out"
            )

    def _rows(self, name: str, tensor: StoredTensor) -> Tensor:
        """Returns the weights of the classes, `[num_labels, embedding_size]` float32."""
        if len(tensor.shape) != 2 or max(self.token_ids) >= tensor.shape[0]:
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}, without a row {max(self.token_ids)}")
        rows = torch.cat([numbers_of(tensor.narrow(0, token_id, 1)).float() for token_id in self.token_ids])
        rows = rows[1:] - rows[:1] if self.subtracts else rows
        return rows * self.scale


def _ours(weights: WeightMap, name: str) -> list[str]:
    try:
        return weights.all_ours(name)
    except KeyError:  # `match_weights` reports names that the family does not have.
        return []

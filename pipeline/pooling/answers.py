"""`Answers`: the columns that a pooling task makes of the output of a row, and their types in a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine import PoolingOutput, PoolingRequestOutput
from ...engine.errors import PoolingParamsError
from .. import columns
from .vectors import VectorForm

if TYPE_CHECKING:
    import pyarrow as pa

Pooled = PoolingRequestOutput[PoolingOutput]


class Answers(ABC):
    """Makes the columns of a row of the output of a pooling engine."""

    @abstractmethod
    def of(self, output: Pooled, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns of the answer.

        Args:
            output: The output of the row's request, which has no error.
            row: Columns of the row.

        Raises:
            PoolingParamsError: The vector cannot be written as the settings say.
        """

    @abstractmethod
    def types(self, size: int) -> dict[str, pa.DataType]:
        """Returns the Arrow types of the columns in the result of a job.

        Args:
            size: Number of elements of a vector.
        """


@dataclass(frozen=True, slots=True)
class VectorAnswers(Answers):
    """The vector of a prompt, or of each of its tokens.

    Attributes:
        form: Type of the numbers; None for lists of 32-bit floats whose length may differ from row to row.
        is_by_token: Whether each token has a vector.
    """

    form: VectorForm | None = None
    is_by_token: bool = False

    def of(self, output: Pooled, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the vectors, and their scales where the form has them. See `Answers.of`."""
        data = _data_of(output)
        if self.form is None:
            return {columns.EMBEDDINGS: data.tolist() if data.ndim == 1 else list(data)}
        if not self.is_by_token:
            vector, scale = self.form.encode(data)
            return {columns.EMBEDDINGS: vector, columns.EMBEDDING_SCALE: scale}
        encoded = [self.form.encode(vector) for vector in data]
        scales = [scale for _, scale in encoded] if self.form.has_scale else None
        return {columns.EMBEDDINGS: [vector for vector, _ in encoded], columns.EMBEDDING_SCALE: scales}

    def types(self, size: int) -> dict[str, pa.DataType]:
        """Returns lists of fixed size, and of scales where the form has them. See `Answers.types`."""
        import pyarrow as pa

        assert self.form is not None, "a job names the type of its vectors"
        types = {columns.EMBEDDINGS: self.form.arrow_type(size)}
        if self.form.has_scale:
            types[columns.EMBEDDING_SCALE] = pa.float32()
        return {name: pa.list_(kind) for name, kind in types.items()} if self.is_by_token else types


@dataclass(frozen=True, slots=True)
class ClassAnswers(Answers):
    """The probabilities of the classes for a prompt, or for each of its tokens, and the most probable class.

    Attributes:
        labels: Names of the classes, as far as the model's config has them.
        is_by_token: Whether each token has probabilities.
    """

    labels: Sequence[str] = ()
    is_by_token: bool = False

    def of(self, output: Pooled, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the probabilities, under Ray Data LLM's name and vLLM's, and the label. See `Answers.of`."""
        data = _data_of(output)
        best, highest = data.argmax(-1), data.max(-1).tolist()
        named = self._label(int(best)) if data.ndim == 1 else [self._label(int(one)) for one in best]
        probs = data.tolist() if data.ndim == 1 else list(data)
        return {
            columns.EMBEDDINGS: probs,
            columns.PROBS: probs,
            columns.LABEL: named,
            columns.LABEL_PROBABILITY: highest,
        }

    def types(self, size: int) -> dict[str, pa.DataType]:
        """Returns a list of fixed size for the probabilities. See `Answers.types`."""
        import pyarrow as pa

        types = {
            columns.PROBS: pa.list_(pa.float32(), size),
            columns.LABEL: pa.string(),
            columns.LABEL_PROBABILITY: pa.float32(),
        }
        return {name: pa.list_(kind) for name, kind in types.items()} if self.is_by_token else types

    def _label(self, index: int) -> str:
        """Returns the name of a class; transformers gives this name to a class without one."""
        return self.labels[index] if index < len(self.labels) else f"LABEL_{index}"


class RewardAnswers(Answers):
    """The number that a reward model gives a prompt: the logit of its only class."""

    def of(self, output: Pooled, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the reward, and the vector under Ray Data LLM's name. See `Answers.of`."""
        data = _data_of(output)
        self.check(data.size)
        return {columns.EMBEDDINGS: data.tolist(), columns.REWARD: float(data[0])}

    def types(self, size: int) -> dict[str, pa.DataType]:
        """Returns the type of a number. See `Answers.types`."""
        import pyarrow as pa

        self.check(size)
        return {columns.REWARD: pa.float32()}

    @staticmethod
    def check(size: int) -> None:
        """Raises a `PoolingParamsError` if a model has several classes, of which none is the reward."""
        if size != 1:
            raise PoolingParamsError(f"reward takes a model of one class; this one has {size}: use classify")


def _data_of(output: Pooled) -> np.ndarray:
    assert output.outputs is not None
    return output.outputs.data

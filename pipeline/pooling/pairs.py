"""`Pairs`: the texts of a row whose pairs get a score, and `ScoreAnswers`, the score or scores of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...engine import PoolingOutput, PoolingRequestOutput
from ...engine.errors import ConfigError, PromptTypeError
from .. import columns
from ..arrow_values import quoted
from .answers import Answers, Pooled

if TYPE_CHECKING:
    import pyarrow as pa

    from ...engine.pooling.scoring import Pair, Scoring

USUAL_COLUMNS = (
    (columns.TEXT_1, columns.TEXT_2),
    (columns.QUERY, columns.DOCUMENT),
    (columns.QUERY, columns.DOCUMENTS),
)
"""Pairs of columns in which the texts of a row are looked for, in this order, if the settings name none."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of texts of a row.

    Attributes:
        texts: The pairs.
        are_listed: Whether the row holds a list, so that its answer is a list of scores.
    """

    texts: Sequence[Pair]
    are_listed: bool

    @classmethod
    def of(cls, row: Mapping[str, Any], names: tuple[str, str] | None = None) -> Pairs:
        """Reads the pairs of a row.

        Args:
            row: Columns of the row.
            names: Columns of the first and of the second texts; None for the usual ones.

        Raises:
            PromptTypeError: The row lacks a text, or the numbers of texts do not match.
        """
        from ...engine.pooling.scoring import pair_up  # It loads torch.

        first, second = (_texts(row, name) for name in names or pair_columns(row))
        are_listed = isinstance(first, list) or isinstance(second, list)
        try:
            return cls(pair_up(first, second), are_listed)
        except ConfigError as error:
            raise PromptTypeError(str(error)) from None


def pair_columns(known: Mapping[str, Any] | Sequence[str]) -> tuple[str, str]:
    """Returns the columns of the texts of pairs: the first of `USUAL_COLUMNS` that are known.

    Args:
        known: Columns of a row or of a dataset.

    Raises:
        PromptTypeError: None is known.
    """
    found = next((names for names in USUAL_COLUMNS if all(name in known for name in names)), None)
    if found is None:
        usual = ", or ".join(" and ".join(map(repr, names)) for names in USUAL_COLUMNS)
        raise PromptTypeError(
            f"score needs two columns of texts: {usual}, or two that score_columns names; the columns are: "
            f"{', '.join(map(str, known)) or 'none'}"
        )
    return found


def _texts(row: Mapping[str, Any], name: str) -> str | list[str]:
    if name not in row:
        raise PromptTypeError(f"the row has no column {name!r}; its columns are: {', '.join(map(str, row)) or 'none'}")
    value = row[name]
    given = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PromptTypeError(f"column {name!r} must be a text or a list of texts, at least one; got {quoted(value)}")
    return given


@dataclass(frozen=True, slots=True)
class ScoreAnswers(Answers):
    """The score of the pair of a row, or the scores of its pairs.

    Attributes:
        scoring: Scoring of the engine; None where only types are asked for.
        names: Columns of the texts, as in `Pairs.of`.
        are_listed: Whether every answer is a list, also of rows with one pair.
    """

    scoring: Scoring | None = None
    names: tuple[str, str] | None = None
    are_listed: bool = False

    def of(self, output: Pooled, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the score, or the list of scores where the row holds a list of texts. See `Answers.of`."""
        assert self.scoring is not None
        assert output.outputs is not None
        vectors = output.outputs.data
        each = [vectors] if vectors.ndim == 1 else list(vectors)
        pooled = [PoolingRequestOutput(output.request_id, PoolingOutput(vector), []) for vector in each]
        pairs = Pairs.of(row, self.names)
        outputs = self.scoring.outputs(pairs.texts, pooled)
        scores = [one.outputs.score for one in outputs if one.outputs is not None]
        return {columns.SCORE: scores if self.are_listed or pairs.are_listed else scores[0]}

    def types(self, size: int) -> dict[str, pa.DataType]:
        """Returns the type of a score, or of a list of scores. See `Answers.types`."""
        import pyarrow as pa

        return {columns.SCORE: pa.list_(pa.float64()) if self.are_listed else pa.float64()}

"""`QuantizationReport`: what `quantize_model` has done to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["QuantizationReport"]

MAX_WORST = 10
"""Number of the layers with the largest errors that a report names."""


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What has been done to a model.

    Attributes:
        model: Where the model is.
        scheme: Name of the scheme.
        method: `"nearest"` if weights were rounded to the nearest number, `"gptq"` if with calibration rows.
        group_size: Weights that share a scale; None for the weights of a row.
        num_layers: Number of quantised matrices.
        declined: Reason -> names of the layers that are not quantised for it.
        bytes_before: Bytes of all tensors of the model.
        bytes_after: Bytes of all tensors of the new checkpoint.
        errors: Name of a quantised layer -> its error as a share: of its outputs on the calibration rows, or of its
            weights where it was rounded without such rows (norm of the difference by norm).
        num_calibration_tokens: Number of tokens of the rows by which weights were rounded.
        num_evaluation_tokens: Number of tokens of the rows of the perplexities, which were not used to round.
        perplexity_before: Perplexity of the model on these rows; None without rows.
        perplexity_after: Perplexity of the quantised model on these rows; None without rows.
    """

    model: str
    scheme: str
    method: str
    group_size: int | None
    num_layers: int
    declined: Mapping[str, list[str]]
    bytes_before: int
    bytes_after: int
    errors: Mapping[str, float]
    num_calibration_tokens: int = 0
    num_evaluation_tokens: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The names and the errors of the layers with the largest errors, the largest first."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:MAX_WORST]

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {**asdict(self), "worst": [name for name, _ in self.worst]}

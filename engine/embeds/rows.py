"""The embedded spans of the running sequences, by row: `SpanRows` finds what a step computes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..batch import GivenEmbeddings
from ..device import to_device
from ..step_plan import NewRow, StepPlan
from .span import EmbeddedSpan


class SpanRows:
    """Keeps the spans of each row until they are computed.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[int, Sequence[EmbeddedSpan]] = {}

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Takes over the spans of the sequences that enter."""
        for new in new_rows:
            self._spans.pop(new.row, None)
            if new.sequence.spans:
                self._spans[new.row] = new.sequence.spans

    def find(self, plan: StepPlan) -> GivenEmbeddings | None:
        """Returns the embeddings of the positions that a step computes; None if it computes none of any span."""
        if not self._spans:
            return None
        indices, rows = [], []
        for offset, span, positions in self._computed(plan):
            indices.append(torch.arange(positions.start, positions.stop) + offset)
            rows.append(span.rows(positions))
        if not rows:
            return None
        values = torch.cat(rows)
        return GivenEmbeddings(
            to_device(torch.cat(indices), torch.int64, self._device), to_device(values, values.dtype, self._device)
        )

    def _computed(self, plan: StepPlan) -> Iterator[tuple[int, EmbeddedSpan, range]]:
        """Yields each span that a step computes some of, its positions, and what makes them indices of the step."""
        num_before = 0
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            spans = self._spans.get(row, ())
            for span in spans:
                if positions := span.within(start, start + count):
                    yield num_before - start, span, positions
            if spans and start + count >= spans[-1].end:
                del self._spans[row]  # Whatever is computed again has entered again.
            num_before += count

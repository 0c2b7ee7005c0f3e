"""`SpanRows`: the embedded spans of the running sequences, and the embeddings of them that a step computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..batch import GivenEmbeddings
from ..device import to_device
from ..step_plan import NewRow, StepPlan
from .span import EmbeddedSpan


class SpanRows:
    """Keeps the embedded spans of the sequence in each row of the tables, until steps have computed them.

    Args:
        device: Device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[int, Sequence[EmbeddedSpan]] = {}

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Stores the spans of the sequences that enter the tables, in place of earlier spans of their rows."""
        for new in new_rows:
            self._spans.pop(new.row, None)
            if new.sequence.spans:
                self._spans[new.row] = new.sequence.spans

    def find(self, plan: StepPlan) -> GivenEmbeddings | None:
        """Returns the given embeddings of the positions that a step computes; None if no such position is in a span."""
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
        """Yields (offset, span, positions) for each span of which a step computes positions.

        Position p has the index p + offset in the flat tensors of the step. Spans that are computed to their end are
        removed.
        """
        num_before = 0
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            spans = self._spans.get(row, ())
            for span in spans:
                if positions := span.within(start, start + count):
                    yield num_before - start, span, positions
            if spans and start + count >= spans[-1].end:
                del self._spans[row]  # A preempted sequence enters again, with its spans.
            num_before += count

"""What one step computes: `StepPlan`, which the scheduler makes and the runner executes."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from .sequence import Sequence
from .structured.token_masks import TokenMasks


@dataclass(slots=True)
class NewRow:
    """A sequence that enters a row of the runner's tables.

    Attributes:
        row: The row; whatever it held before is over.
        sequence: The sequence; the runner reads its tokens and its parameters, and changes nothing.
        num_tokens: Known tokens.
    """

    row: int
    sequence: Sequence
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """What one step computes; entry i of every list belongs to sequence i of the batch.

    Attributes:
        sequences: Whose sequences they are.
        rows: Their rows in the runner's tables.
        starts: First position to compute.
        counts: Number of positions to compute.
        samples: Whether the last of them yields a new token.
        new_rows: Rows to fill before the step.
        new_blocks: (group of layers, row, index of the first, block ids) to append to block tables before the step.
        new_tokens: (row, first position, token ids) to enter before the step, where not every stage draws the tokens.
        token_masks: Of the sequences that sample, those that follow a grammar, and what it allows them.
        published: Blocks that others may find from now on, though this step is what fills them.
        num_decodes: This many sequences at the front compute one token each; all others compute more.
        num_shared_blocks: This many leading blocks those at the front have in common, if it pays to know.
    """

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    new_tokens: list[tuple[int, int, list[int]]] = field(default_factory=list)
    token_masks: TokenMasks | None = None
    published: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_shared_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.counts)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that yield a new token, in order."""
        return [sequence for sequence, samples in zip(self.sequences, self.samples, strict=True) if samples]

    def owners(self, num_drawn: abc.Sequence[int] | None) -> list[Sequence]:
        """Returns the sequence of each token that the step has drawn.

        Args:
            num_drawn: How many each sequence that samples has drawn; None where each has drawn one.
        """
        if num_drawn is None:
            return self.sampled
        return [sequence for sequence, count in zip(self.sampled, num_drawn, strict=True) for _ in range(count)]

    def put_decodes_first(self) -> None:
        """Orders the sequences: those that compute one token, then the others, as attention wants them."""
        self.num_decodes = self.counts.count(1)
        if self.counts[: self.num_decodes].count(1) < self.num_decodes:
            order = sorted(range(len(self.counts)), key=lambda i: self.counts[i] > 1)
            self.sequences = [self.sequences[i] for i in order]
            self.rows = [self.rows[i] for i in order]
            self.starts = [self.starts[i] for i in order]
            self.counts = [self.counts[i] for i in order]
            self.samples = [self.samples[i] for i in order]

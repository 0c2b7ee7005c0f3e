"""`StepPlan`: the sequences and tokens that one step computes. The scheduler makes it and the runner executes it."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from .lora.slots import NewAdapter
from .sequence import Sequence
from .structured.token_masks import TokenMasks


@dataclass(slots=True)
class NewRow:
    """A sequence that enters a row of the runner's tables.

    Attributes:
        row: Index of the row. The sequence that owned the row before has left it.
        sequence: The sequence. The runner reads its tokens and its parameters, and does not change them.
        num_tokens: Number of tokens in `sequence.token_ids` when the sequence enters.
    """

    row: int
    sequence: Sequence
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """The sequences and tokens that one step computes.

    Entry i of `sequences`, `rows`, `starts`, `counts` and `samples` belongs to sequence i of the batch.

    Attributes:
        sequences: Sequences that the step computes.
        rows: Row of each sequence in the runner's tables.
        starts: First position to compute, of each sequence.
        counts: Number of positions to compute, of each sequence.
        samples: Whether the last computed position of the sequence yields a new token.
        new_rows: Sequences that enter the tables before the step.
        new_blocks: Tuples (group of layers, row, index of the first block, block ids): blocks that are appended to the
            block tables before the step.
        new_tokens: Tuples (row, first position, token ids): tokens that are written to the tables before the step. They
            are needed only if another pp stage has drawn the tokens.
        new_adapters: Adapters that enter adapter slots before the step.
        token_masks: Token masks of the sequences that sample and follow a grammar; None if there are none.
        published: Ids of blocks that this step fills. Later steps may already find them in the prefix cache.
        num_decodes: Number of sequences at the front that compute one token each; all others compute more.
        num_shared_blocks: Number of leading blocks that the first `num_decodes` sequences have in common; 0 if they are
            too few to make attention faster.
    """

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    new_tokens: list[tuple[int, int, list[int]]] = field(default_factory=list)
    new_adapters: list[NewAdapter] = field(default_factory=list)
    token_masks: TokenMasks | None = None
    published: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_shared_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the step computes."""
        return sum(self.counts)

    @property
    def longest_prompt(self) -> int:
        """Number of tokens of the longest sequence after the decodes if all of these begin here; else 0."""
        is_whole = not any(self.starts[self.num_decodes :])
        return max(self.counts[self.num_decodes :], default=0) if is_whole else 0

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences of the plan that yield a new token, in the order of the plan."""
        return [sequence for sequence, samples in zip(self.sequences, self.samples, strict=True) if samples]

    def owners(self, num_drawn: abc.Sequence[int] | None) -> list[Sequence]:
        """Returns a list with the sequence of each drawn token, in the order of the tokens.

        Args:
            num_drawn: Number of tokens that each sampling sequence has drawn; None if each has drawn one.
        """
        if num_drawn is None:
            return self.sampled
        return [sequence for sequence, count in zip(self.sampled, num_drawn, strict=True) for _ in range(count)]

    def put_decodes_first(self) -> None:
        """Moves the sequences that compute one token to the front, the longest first, and sets `num_decodes`.

        Attention needs them at the front. It takes as long as its last sequence, so a long one must not begin last.
        """
        self.num_decodes = self.counts.count(1)
        keys = [-start if count == 1 else 1 for start, count in zip(self.starts, self.counts, strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        if order != list(range(len(keys))):
            self.sequences = [self.sequences[i] for i in order]
            self.rows = [self.rows[i] for i in order]
            self.starts = [self.starts[i] for i in order]
            self.counts = [self.counts[i] for i in order]
            self.samples = [self.samples[i] for i in order]

"""Tokens back to text, away from the engine: `generated_tokens` -> `generated_text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...engine import Tokenizer
from .. import columns
from .base import Stage


class DetokenizeStage(Stage):
    """Makes the text of the rows whose text the generate stage left to this one.

    Those are rows that did not stop at a string and want no log-probabilities; `GenerateStage` decides.

    Args:
        tokenizer: The model's tokenizer.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "detokenize"

    def __init__(self, tokenizer: Tokenizer, *, stop_on_error: bool = False) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._tokenizer = tokenizer

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes the row's tokens, and those of every further sequence it has."""
        if row.get(columns.GENERATED_TEXT) is not None:
            return {}
        prompt_token_ids = row[columns.PROMPT_TOKEN_IDS]
        text = self._decode(prompt_token_ids, row[columns.GENERATED_TOKENS], row[columns.FINISH_REASON])
        sequences = row.get(columns.OUTPUTS)
        if sequences is not None:
            sequences = [
                {**one, "text": self._decode(prompt_token_ids, one["token_ids"], one["finish_reason"])}
                for one in sequences
            ]
        return {columns.GENERATED_TEXT: text, columns.OUTPUTS: sequences}

    def _decode(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], finish_reason: str) -> str:
        # Without stop strings, only a token can have stopped the sequence, and its text is not part of the answer.
        shown = token_ids[:-1] if finish_reason == "stop" else token_ids
        return self._tokenizer.decode(prompt_token_ids, shown)

"""Prompts to tokens: `prompt` -> `tokenized_prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...engine import Tokenizer
from .. import columns
from .base import BatchStage
from .prompts import checked_prompt


class TokenizeStage(BatchStage):
    """Tokenises the prompts of a block in one call. Rows that bring `tokenized_prompt` pass by.

    Args:
        tokenizer: The model's tokenizer.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "tokenize"

    def __init__(self, tokenizer: Tokenizer, *, stop_on_error: bool = False) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._tokenizer = tokenizer

    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Tokenises the prompts that are still text."""
        results: list[dict[str, Any]] = [{} for _ in rows]
        texts = [index for index, row in enumerate(rows) if row.get(columns.TOKENIZED_PROMPT) is None]
        token_ids = self._tokenizer.encode_batch([checked_prompt(rows[index]) for index in texts])
        for index, ids in zip(texts, token_ids, strict=True):
            results[index] = {columns.TOKENIZED_PROMPT: ids}
        return results

"""`TokenizeStage`: tokenises the column `prompt` to `tokenized_prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....engine import Tokenizer
from ... import columns
from ..base import BatchStage
from ..declaration import ProcessorSettings, Side, StageDeclaration
from ..prompts import checked_prompt
from ..stage_config import StageConfig
from ..tokenizers import tokenizer_of
from .chat_template import chosen_template


class TokenizerStageConfig(StageConfig):
    """Settings of the stage that tokenises `prompt`."""


class TokenizeStage(BatchStage):
    """A stage that tokenises the prompts of a block in one call. Rows that have `tokenized_prompt` stay unchanged.

    Args:
        tokenizer: The model's tokenizer.
    """

    name = "tokenize"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns the tokens of each prompt, and no columns for rows that have tokens already."""
        results: list[dict[str, Any]] = [{} for _ in rows]
        texts = [index for index, row in enumerate(rows) if row.get(columns.TOKENIZED_PROMPT) is None]
        token_ids = self._tokenizer.encode_batch([checked_prompt(rows[index]) for index in texts])
        for index, ids in zip(texts, token_ids, strict=True):
            results[index] = {columns.TOKENIZED_PROMPT: ids}
        return results


def _make(settings: ProcessorSettings, config: TokenizerStageConfig) -> TokenizeStage:
    # With the template of the chat template stage, both stages share one tokenizer.
    return TokenizeStage(tokenizer_of(settings, config, chosen_template(settings)))


STAGE = StageDeclaration(
    TokenizeStage,
    config=TokenizerStageConfig(),
    make=_make,
    side=Side.BEFORE_ENGINE,
    order=20,
    field="tokenize_stage",
    required=(columns.PROMPT,),
    optional=(columns.TOKENIZED_PROMPT,),
)

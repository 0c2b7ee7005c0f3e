"""`DetokenizeStage`: decodes the column `generated_tokens` to `generated_text`, outside of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....engine import Tokenizer
from ... import columns
from ..base import Stage
from ..declaration import ProcessorSettings, Side, StageDeclaration
from ..stage_config import StageConfig
from ..tokenizers import tokenizer_of


class DetokenizeStageConfig(StageConfig):
    """Settings of the stage that decodes `generated_tokens`."""


class DetokenizeStage(Stage):
    """A stage that decodes the tokens of rows for which the engine made no text.

    `GenerateStage` asks the engine for no text if a row has no stop string, asks for no log-probabilities, and leaves
    special tokens and stop tokens out of the text.

    Args:
        tokenizer: The model's tokenizer.
    """

    name = "detokenize"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the text of the row, and `outputs` with the text of each sequence; ``{}`` if the row has text."""
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


def _make(settings: ProcessorSettings, config: DetokenizeStageConfig) -> DetokenizeStage:
    return DetokenizeStage(tokenizer_of(settings, config))


STAGE = StageDeclaration(
    DetokenizeStage,
    config=DetokenizeStageConfig(),
    make=_make,
    side=Side.AFTER_ENGINE,
    order=10,
    field="detokenize_stage",
    required=(columns.GENERATED_TOKENS,),
)

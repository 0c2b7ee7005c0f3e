"""Stages that take a model's text apart, and what they share: the format, and the stages of this kind around them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import model_validator

from ...engine import Tokenizer
from ...engine.errors import ConfigError, unknown_key_message
from .. import columns
from .base import Stage
from .declaration import ProcessorSettings
from .stage_config import StageConfig
from .tokenizers import tokenizer_of


class AnswerFormat(Protocol):
    """How the models of a family mark a part of their text."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks, some of which a tokenizer may count as special tokens."""


Format = TypeVar("Format", bound=AnswerFormat)


class AnswerStageConfig(StageConfig):
    """Settings of a stage that takes the text apart.

    Attributes:
        parser: Name of the format in which the model writes.
        field: Field of the processor's config that holds these settings.
        formats: The formats that there are, by name.
    """

    parser: str = ""
    field: ClassVar[str]
    formats: ClassVar[Mapping[str, Any]]

    @property
    def format(self) -> Any:
        """The format that the parser reads.

        Raises:
            ConfigError: No format has this name.
        """
        if self.parser not in self.formats:
            raise ConfigError(unknown_key_message(self.field, self.parser, self.formats).replace("field", "parser", 1))
        return self.formats[self.parser]

    @model_validator(mode="after")
    def _check_parser(self) -> AnswerStageConfig:
        if self.enabled:
            _ = self.format
        return self


class AnswerStage(Stage, Generic[Format]):
    """Reads the text of a row, and of each of its sequences where it has several.

    `generated_text` holds no special tokens. Where a mark is one, the stage decodes the text anew from the tokens.

    Args:
        tokenizer: The model's tokenizer.
        kind: How the model writes.
        later_marks: Marks that stages after this one look for in the text that this one leaves.
        reads_content: Whether a stage before this one has read the text, so that this one reads what is left of it in
            `content`.
    """

    def __init__(
        self, tokenizer: Tokenizer, kind: Format, later_marks: Collection[str] = (), *, reads_content: bool = False
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._format = kind
        self._reads_content = reads_content
        self._needs_special_tokens = not tokenizer.special_tokens.isdisjoint([*kind.marks, *later_marks])

    @abstractmethod
    def read(self, text: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns that a text makes.

        Args:
            text: The model's text; None if an earlier stage left nothing of it.
            row: The row, for its prompt.
        """

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the text of the row, and of each of its sequences."""
        first = self._text(row, row, columns.GENERATED_TEXT, columns.GENERATED_TOKENS)
        sequences = row.get(columns.OUTPUTS)
        if sequences is None:
            return self.read(first, row)
        read = [{**one, **self.read(self._text(row, one, "text", "token_ids"), row)} for one in sequences]
        return {**self.read(first, row), columns.OUTPUTS: read}

    def _text(self, row: Mapping[str, Any], sequence: Mapping[str, Any], text: str, token_ids: str) -> str | None:
        if self._reads_content:
            return sequence[columns.CONTENT]
        if sequence[text] is not None and not self._needs_special_tokens:
            return sequence[text]
        tokens = sequence[token_ids]
        shown = tokens[:-1] if sequence[columns.FINISH_REASON] == "stop" else tokens
        return self._tokenizer.decode(row[columns.PROMPT_TOKEN_IDS], shown, not self._needs_special_tokens)


def make_answer_stage(
    kind: type[AnswerStage[Any]], settings: ProcessorSettings, config: AnswerStageConfig
) -> AnswerStage[Any]:
    """Makes a stage that takes the text apart.

    Args:
        kind: Class of the stage.
        settings: Settings of the processor.
        config: Settings of the stage.
    """
    running = [settings.stage_config(one) for one in settings.declared_stages if one.runs_with(settings)]
    answering = [one for one in running if isinstance(one, AnswerStageConfig)]
    place = answering.index(config)
    later_marks = [mark for one in answering[place + 1 :] for mark in one.format.marks]
    return kind(tokenizer_of(settings, config), config.format, later_marks, reads_content=place > 0)

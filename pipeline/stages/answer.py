"""`AnswerStage`: the base of the stages that parse a model's text, such as its reasoning and its tool calls."""

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
    """The interface of a format in which the models of a family write, with marks such as `<think>` around a part."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The strings that mark a part of the text. A tokenizer may have special tokens for some of them."""


Format = TypeVar("Format", bound=AnswerFormat)


class AnswerStageConfig(StageConfig):
    """Settings of a stage that parses the text which the model generated.

    Attributes:
        parser: Name of the format in which the model writes.
        field: Field of the processor's config that holds these settings.
        formats: Name of a format -> the format.
    """

    parser: str = ""
    field: ClassVar[str]
    formats: ClassVar[Mapping[str, Any]]

    @property
    def format(self) -> Any:
        """The format that `parser` names.

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
    """A stage that parses the generated text of a row, and of each of its sequences if it has several.

    `generated_text` holds no special tokens. If a mark is a special token, the stage decodes the tokens again with
    special tokens.

    Args:
        tokenizer: The model's tokenizer.
        kind: Format in which the model writes.
        later_marks: Marks that later stages look for in the text that this stage leaves.
        reads_content: Whether an earlier stage has parsed the text, so that this stage reads the rest, the column
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
        """Parses a text, and returns the columns to add.

        Args:
            text: Text of the model; None if an earlier stage has left no text.
            row: Row that the text belongs to. A parser may read the prompt of the row.
        """

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns parsed from the row's text, and `outputs` with the columns parsed from each sequence."""
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
    """Makes a stage that parses the text which the model generated.

    The stage keeps the marks of the answer stages that run after it in the text, even if they are special tokens. It
    reads the column `content` if an answer stage runs before it, else the generated text.

    Args:
        kind: Class of the stage.
        settings: Settings of the processor, which say which other stages run.
        config: Settings of the stage.

    Returns:
        The stage with the model's tokenizer and the format that `config` names.
    """
    running = [settings.stage_config(one) for one in settings.declared_stages if one.runs_with(settings)]
    answering = [one for one in running if isinstance(one, AnswerStageConfig)]
    place = answering.index(config)
    later_marks = [mark for one in answering[place + 1 :] for mark in one.format.marks]
    return kind(tokenizer_of(settings, config), config.format, later_marks, reads_content=place > 0)

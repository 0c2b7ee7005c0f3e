"""Loads the tokenizer of a stage, once in each process."""

from __future__ import annotations

import functools

from ...engine import Tokenizer, resolve_model
from .declaration import ProcessorSettings
from .stage_config import StageConfig


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str, chat_template: str | None = None) -> Tokenizer:
    """Returns the tokenizer of a folder, loaded once for all stages of a process; `chat_template` replaces its own."""
    return Tokenizer(resolve_model(folder), chat_template)


def tokenizer_of(settings: ProcessorSettings, config: StageConfig, chat_template: str | None = None) -> Tokenizer:
    """Returns the tokenizer of a stage: the tokenizer that its settings name, or else the model's.

    Args:
        settings: Settings of the processor.
        config: Settings of the stage.
        chat_template: Jinja text or file that replaces the template of the tokenizer.
    """
    return load_tokenizer(config.model_source or settings.tokenizer_source, chat_template)

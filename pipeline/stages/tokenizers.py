"""Loads the tokenizer of a stage, once in each process."""

from __future__ import annotations

import functools

from ...engine import Tokenizer
from ...engine.loading.model_source import locate_model, resolve_tokenizer
from ...engine.text.tokenizer import TextSettings
from .declaration import ProcessorSettings
from .stage_config import StageConfig


@functools.lru_cache(maxsize=4)
def load_tokenizer(
    folder: str,
    chat_template: str | None = None,
    embedding_model: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Returns the tokenizer of a folder, loaded once for all stages of a process.

    Args:
        folder: Folder of the tokenizer.
        chat_template: Jinja text or file that replaces the template of the tokenizer.
        embedding_model: Folder of a model that embeds and may have a prompt and a length limit for texts; else None.
        trust_remote_code: Whether code in the folder may run.
    """
    from ...engine.pooling.sentence_transformer import read_text_settings  # It loads torch.

    texts = TextSettings() if embedding_model is None else read_text_settings(locate_model(embedding_model))
    return Tokenizer(resolve_tokenizer(folder), chat_template, texts, trust_remote_code=trust_remote_code)


def tokenizer_of(settings: ProcessorSettings, config: StageConfig, chat_template: str | None = None) -> Tokenizer:
    """Returns the tokenizer of a stage: the tokenizer that its settings name, or else the model's.

    Args:
        settings: Settings of the processor.
        config: Settings of the stage.
        chat_template: Jinja text or file that replaces the template of the tokenizer.
    """
    engine = settings.engine_config
    embedding_model = engine.model if engine.task == "embed" else None
    folder, trusts = config.model_source or settings.tokenizer_source, engine.trust_remote_code
    return load_tokenizer(folder, chat_template, embedding_model, trust_remote_code=trusts)

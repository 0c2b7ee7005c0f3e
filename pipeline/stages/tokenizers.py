"""Loads the tokenizer of a stage, once in each process."""

from __future__ import annotations

import functools

from ...engine import Tokenizer
from ...engine.loading.hub import HubSettings
from ...engine.loading.model_source import NEWEST, locate_model, resolve_tokenizer
from ...engine.text.tokenizer import TextSettings
from .declaration import ProcessorSettings
from .stage_config import StageConfig

TASKS_OF_TEXTS = ("embed", "token_embed", "classify", "token_classify")
"""The tasks of engines whose models may change or cut texts."""


@functools.lru_cache(maxsize=4)
def load_tokenizer(
    source: str,
    chat_template: str | None = None,
    model: str | None = None,
    task: str | None = None,
    hub: HubSettings = NEWEST,
    model_hub: HubSettings = NEWEST,
    *,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Returns a tokenizer, loaded once for all stages of a process.

    Args:
        source: Folder, file, URL or name of the tokenizer.
        chat_template: Jinja text or file that replaces the template of the tokenizer.
        model: The model, if it pools and may have a prompt and a length limit for texts; else None.
        task: The task of its engine.
        hub: Settings with which the tokenizer is downloaded from a hub.
        model_hub: Settings with which the model is downloaded from a hub.
        trust_remote_code: Whether code in the folder may run.
    """
    from ...engine.pooling.sentence_transformer import read_cross_encoder_texts, read_text_settings  # They load torch.

    texts = TextSettings()
    if model is not None:
        embeds = task is not None and task.endswith("embed")
        read = read_text_settings if embeds else read_cross_encoder_texts
        texts = read(locate_model(model, model_hub, with_weights=False))
    folder = resolve_tokenizer(source, hub, "tokenizer")
    return Tokenizer(folder, chat_template, texts, trust_remote_code=trust_remote_code)


def tokenizer_of(settings: ProcessorSettings, config: StageConfig, chat_template: str | None = None) -> Tokenizer:
    """Returns the tokenizer of a stage: the tokenizer that its settings name, or else the model's.

    Args:
        settings: Settings of the processor.
        config: Settings of the stage.
        chat_template: Jinja text or file that replaces the template of the tokenizer.
    """
    engine = settings.engine_config
    model = engine.model if engine.task in TASKS_OF_TEXTS else None
    source, hub, trusts = settings.tokenizer_source, engine.tokenizer_hub, engine.trust_remote_code
    if config.model_source is not None:
        source, hub = config.model_source, HubSettings(download_dir=engine.download_dir)
    return load_tokenizer(source, chat_template, model, engine.task, hub, engine.hub, trust_remote_code=trusts)

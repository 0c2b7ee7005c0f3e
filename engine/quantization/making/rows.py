"""`read_rows`: the token ids of the rows with which a model is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from ...config import EngineConfig
from ...errors import ConfigError, quote
from ...loading.model_source import resolve_tokenizer
from ...models.model_code import model_code
from ...text.conversation import Messages
from ...text.tokenizer import Tokenizer

__all__ = ["Row", "read_rows"]

Row: TypeAlias = str | Messages
"""A text, or the messages of a conversation."""

MAX_ROWS = 640
MAX_TOKENS = 2048
"""Most tokens of a row that are used."""


def read_rows(config: EngineConfig, hf_config: Any, rows: Sequence[Row]) -> list[list[int]]:
    """Returns the token ids of rows.

    Args:
        config: The settings of the model and its tokenizer.
        hf_config: The transformers config of the model.
        rows: Texts or conversations.

    Raises:
        ConfigError: There are too few rows, or the model cannot be calibrated.
    """
    if model_code(hf_config).fallback is not None or not hf_config.architectures[0].endswith(("CausalLM", "HeadModel")):
        raise ConfigError(
            f"{hf_config.architectures[0]} cannot be calibrated: rows run through models that generate, of a family "
            "that Millrace has; leave the rows out, so that weights are rounded to the nearest number"
        )
    what = "model" if config.tokenizer is None else "tokenizer"
    folder = resolve_tokenizer(config.tokenizer or config.model, config.tokenizer_hub, what)
    tokenizer = Tokenizer(folder, config.chat_template, trust_remote_code=config.trust_remote_code)
    most = min(MAX_TOKENS, config.max_model_len or hf_config.get_text_config().max_position_embeddings or MAX_TOKENS)
    found = [_encode(tokenizer, row)[:most] for row in rows[:MAX_ROWS]]
    usable = [row for row in found if len(row) > 1]
    if len(usable) < 2:
        raise ConfigError(f"calibration needs two rows of two tokens or more; got {len(usable)} of {len(rows)} rows")
    return usable


def _encode(tokenizer: Tokenizer, row: Row) -> list[int]:
    if isinstance(row, str):
        return tokenizer.encode_batch([row])[0]
    if not isinstance(row, Sequence):  # A file of rows may hold anything.
        raise ConfigError(f"a calibration row is a text or a list of messages; got {quote(row)}")
    text = tokenizer.render_chat(cast("Messages", row), add_generation_prompt=False)
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]

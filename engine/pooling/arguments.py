"""The arguments of a call of `LLM` that pools: the prompt in front of texts, the length that they are cut to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, PoolingParamsError, PromptTypeError, quote
from ..inputs import Parsed, ParsedPrompt, describe
from ..text.tokenizer import Tokenizer
from .params import CUT_TO_LIMIT, PoolingParams

__all__ = ["check_is_text", "complete_params", "find_prefix", "take_cut"]


def find_prefix(tokenizer: Tokenizer | None, name: Any, text: Any) -> str | None:
    """Returns the text that a call puts in front of all texts; None for the model's default prompt.

    Args:
        tokenizer: Tokenizer of the engine, which knows the prompts of the model's folder.
        name: Name of one of these prompts, or None.
        text: The text of a prompt itself, or None.

    Raises:
        ConfigError: Both are given, or the folder has no prompt of this name.
    """
    if name is None and text is None:
        return None
    if name is not None and text is not None:
        raise ConfigError("prompt and prompt_name are given; prompt is the text itself, so keep one of the two")
    if tokenizer is None:
        raise ConfigError("the engine has no tokenizer (skip_tokenizer_init), so no prompt precedes its token ids")
    if text is not None:
        if not isinstance(text, str):
            raise ConfigError(f"prompt must be the text that precedes all texts; got {quote(text)}")
        return text
    prompts = tokenizer.texts.prompts
    if not isinstance(name, str) or name not in prompts:
        known = ", ".join(map(repr, prompts)) or "no prompts"
        raise ConfigError(f"prompt_name={quote(name)}, but the model's folder has {known}; give the text as prompt")
    return prompts[name]


def check_is_text(parsed: Parsed) -> Parsed:
    """Returns a prompt that a text can precede.

    Raises:
        PromptTypeError: The prompt is token ids or embeddings.
    """
    if isinstance(parsed, ParsedPrompt) and not parsed.is_text:
        raise PromptTypeError("prompt and prompt_name precede texts, and a prompt is token ids or embeddings")
    return parsed


def take_cut(arguments: dict[str, Any]) -> int | None:
    """Removes the length that prompts are cut to from the arguments of a call, and returns it; None for no cut.

    Args:
        arguments: Arguments of vLLM: `truncate_prompt_tokens`, or `tokenization_kwargs` that hold it, or that hold
            `truncation` and `max_length` as transformers has them.

    Raises:
        ConfigError: `tokenization_kwargs` hold something else.
    """
    cut, more = arguments.pop("truncate_prompt_tokens", None), arguments.get("tokenization_kwargs")
    if not isinstance(more, Mapping) or not more:
        return cut
    left = dict(more)
    named = left.pop("truncate_prompt_tokens", None)
    truncates, longest = left.pop("truncation", None), left.pop("max_length", None)
    if left or truncates not in (None, True, False) or (longest is not None and not truncates):
        raise ConfigError(
            f"tokenization_kwargs={quote(more)}: implemented are truncate_prompt_tokens, and truncation=True with "
            "max_length"
        )
    del arguments["tokenization_kwargs"]
    if truncates:
        named = (CUT_TO_LIMIT if longest is None else longest) if named is None else named
    return named if cut is None else cut


def complete_params(params: Any, asked: PoolingParams) -> PoolingParams:
    """Returns the parameters of a prompt, completed by the task and the cut that the call asks for.

    Raises:
        PoolingParamsError: They are no `PoolingParams`, or name another task.
    """
    if not isinstance(params, PoolingParams):
        raise PoolingParamsError(f"pooling_params must be PoolingParams; got {describe(params)}")
    if None not in (params.task, asked.task) and params.task != asked.task:
        raise PoolingParamsError(f"pooling_task={asked.task!r} and task={params.task!r} differ; keep one of the two")
    if params.truncate_prompt_tokens is None and asked.truncate_prompt_tokens is not None:
        params = replace(params, truncate_prompt_tokens=asked.truncate_prompt_tokens)
    return params if params.task is not None else replace(params, task=asked.task)

"""Text to tokens and back: one face over the model's Hugging Face tokenizer.

Importing this module is cheap; transformers is loaded when a `Tokenizer` is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ChatTemplateError, ConfigError
from .detokenizer import decode_continuation

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
"""A tokenizer's folder holds at least one of these."""

INSTEAD = "pass tokenizer=FOLDER, or skip_tokenizer_init=True to work with token ids only"


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: A folder with tokenizer files.
        chat_template: Jinja text, or the path of a file with it, that replaces the tokenizer's own template.

    Raises:
        ConfigError: The folder holds no tokenizer that can be loaded.
    """

    def __init__(self, folder: str | Path, chat_template: str | None = None) -> None:
        from transformers import AutoTokenizer

        if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
            # Some tokenizer classes load from an empty folder, and know no word.
            raise ConfigError(f"{folder} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); {INSTEAD}")
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # Each tokenizer class raises its own kinds for missing or broken files.
            raise ConfigError(f"no tokenizer could be loaded from {folder}: {_first_line(error)}; {INSTEAD}") from error
        self._chat_template = _read_template(chat_template)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token."""
        return self.hf.eos_token_id

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.hf)

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the tokens that `decode` leaves out unless told otherwise."""
        return frozenset(str(token) for token in self.hf.added_tokens_decoder.values() if token.special)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenises texts together, in parallel where the tokenizer can.

        Args:
            texts: The texts.
            add_special_tokens: Whether to add what the model expects around a plain text, e.g. a beginning-of-sequence
                token. A rendered chat has it already.

        Returns:
            Token ids of each text.
        """
        if not texts:
            return []
        return self.hf(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Tokenises pairs of texts, each as one sequence with whatever the model expects between the two."""
        return [self.hf(first, second, return_attention_mask=False)["input_ids"] for first, second in pairs]

    def decode_ids(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens on their own."""
        return self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def decode(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """Returns the text of an output as it continues its prompt."""
        return decode_continuation(self, prompt_token_ids, output_token_ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token; for a token id without text, an empty string."""
        return self.hf.decode([token_id]) if token_id < self.vocab_size else ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Renders a conversation as the prompt the model was trained on.

        Args:
            messages: Each with `role` and `content`.
            add_generation_prompt: Whether to open the assistant's turn at the end.
            continue_final_message: Whether the last message is the beginning of the answer.
            chat_template: Jinja text that replaces the template for this call.
            tools: Descriptions of tools, for templates that take them.
            **template_kwargs: Further variables of the template.

        Returns:
            The prompt. Tokenise it with `add_special_tokens=False`.

        Raises:
            ChatTemplateError: There is no template, or it refuses the conversation.
        """
        template = chat_template or self._chat_template
        if template is None and self.hf.chat_template is None:
            raise ChatTemplateError(
                "the tokenizer has no chat template; pass chat_template=..., or give a plain prompt instead of messages"
            )
        try:
            _check_messages(messages)
            return self.hf.apply_chat_template(
                [_with_plain_text(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                chat_template=template,
                tools=tools,
                **template_kwargs,
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # Templates raise whatever Jinja and their own code raise.
            raise ChatTemplateError(f"the chat template refuses the conversation: {_first_line(error)}") from error

    def bad_word_ids(self, word: str) -> list[list[int]]:
        """Returns the token sequences that spell a word, at the start of a text and after a space."""
        spellings = self.encode_batch([word, " " + word.lstrip()], add_special_tokens=False)
        return [ids for index, ids in enumerate(spellings) if ids and ids not in spellings[:index]]


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError(
            f"messages must be a non-empty list of {{'role': ..., 'content': ...}}; got {_shorten(messages)}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ChatTemplateError(
                f"message {index} must be a dict with 'role' and 'content'; got {_shorten(message)}"
            )


def _with_plain_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Joins content that comes in parts, as OpenAI's clients send it, into the one text that templates expect."""
    parts = message.get("content")
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        return message
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"this release takes text only; a message holds the part {_shorten(part)}")
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read_template(template: str | None) -> str | None:
    """Takes Jinja text as it is and reads anything else as a file."""
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template {template!r} is neither Jinja text nor a readable file: {error}") from error

"""`Tokenizer`: turns text and conversations into tokens and tokens into text, with a Hugging Face tokenizer.

An import of this module does not import transformers; the constructor of `Tokenizer` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ChatTemplateError, CheckpointError, ConfigError, quote
from ..storage import Location, read_json_object
from .chat_templates import ChatTemplates
from .content_forms import ContentForms, Forms
from .conversation import CONTENT_FORMATS, ContentFormat, Messages, as_read, check_messages, plain_data
from .detokenizer import INCOMPLETE, decode_continuation, split_text
from .pair_encoder import PairEncoder
from .spellings import Speller

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
"""Names of tokenizer files. The folder of a tokenizer holds at least one of them."""

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
"""Names of JSON files that a tokenizer is made from besides the `TOKENIZER_FILES`."""

MAX_NAMED_TOKENS = 1 << 18
"""Most tokens whose spellings are remembered, which is about the largest vocabulary there is."""

MAX_REASON_CHARS = 300
"""Most characters of an error message of a library that are shown."""

BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
"""Name of a byte in the name of a token."""

MAX_SHORT_CHARS = 32
"""Longest text that tells calls of a chat template apart; the form in which it reads contents may depend on it."""

OWN_NAMES = frozenset({"messages", "conversations", "self"})
"""Names that stand for other things where a template is rendered, so that no variable can have them."""

INSTEAD = "pass tokenizer=FOLDER, or skip_tokenizer_init=True to work with token ids only"


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How plain texts become prompts; only embedding models change them.

    Attributes:
        prefix: Text in front of every text: the default prompt of the model.
        max_tokens: Number of tokens, special tokens included, that longer texts are cut to; None for no cut.
        lowers: Whether texts are changed to small letters.
        prompts: The model's prompts by name, which callers can put in front of texts.
    """

    prefix: str = ""
    max_tokens: int | None = None
    lowers: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)


PLAIN = TextSettings()
"""Texts are prompts as they are."""


class Tokenizer:
    """The tokenizer of a model: turns text into token ids and back, and renders conversations as text.

    Args:
        folder: Folder with the tokenizer files.
        chat_template: Jinja text, or path of a file with it, that replaces the tokenizer's chat template.
        texts: How plain texts become prompts; rendered conversations are left as they are.
        trust_remote_code: Whether code in the folder may run, where only that has the tokenizer's class.

    Attributes:
        texts: The argument.

    Raises:
        ConfigError: The folder holds no tokenizer that can be loaded.
    """

    def __init__(
        self,
        folder: str | Path,
        chat_template: str | None = None,
        texts: TextSettings = PLAIN,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
            # Some tokenizer classes load without an error from an empty folder, and then have an empty vocabulary.
            raise ConfigError(f"{folder} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); {INSTEAD}")
        try:
            # Without the last argument, transformers would ask on the terminal whether to run a model's code.
            self.hf: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # Each tokenizer class raises other errors for broken files.
            raise ConfigError(
                f"no tokenizer could be loaded from {_find_damaged(Path(folder))}: {_first_line(error)}; {INSTEAD}"
            ) from error
        self._chat_template = _read_template(chat_template)
        self.texts = texts
        self._cut = {} if texts.max_tokens is None else {"truncation": True, "max_length": texts.max_tokens}
        self._speller = Speller(lambda texts: self.encode_batch(texts, add_special_tokens=False), self._all_bytes)
        self._templates, self._content_forms = ChatTemplates(), ContentForms()
        self.spellings_of_token = lru_cache(MAX_NAMED_TOKENS)(self._list_spellings_of_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end-of-sequence token; None if it has none."""
        return self.hf.eos_token_id

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""
        return len(self.hf)

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the special tokens, which `decode` leaves out by default."""
        return frozenset(str(token) for token in self.hf.added_tokens_decoder.values() if token.special)

    @property
    def own_template(self) -> str | None:
        """The chat template that replaces that of the tokenizer; None if none was given."""
        return self._chat_template

    @property
    def templates(self) -> list[str]:
        """The chat templates by which conversations are rendered."""
        given = self.hf.chat_template if self._chat_template is None else self._chat_template
        return list(given.values()) if isinstance(given, dict) else [given] if given else []

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, prefix: str | None = None
    ) -> list[list[int]]:
        """Tokenises several texts, in parallel if the tokenizer can.

        Args:
            texts: The texts.
            add_special_tokens: Whether to add the special tokens that the model expects around a plain text, e.g. a
                beginning-of-sequence token. A rendered conversation already has them. A text that begins with the
                beginning-of-sequence token gets no second one.
            prefix: Text in front of every text, if special tokens are added; None for the model's default prompt.

        Returns:
            A list of token ids for each text.
        """
        if not texts:
            return []
        if not add_special_tokens:
            return self.hf(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        prefix = self.texts.prefix if prefix is None else prefix
        texts = [prefix + text for text in texts] if prefix else list(texts)
        texts = [text.lower() for text in texts] if self.texts.lowers else texts
        encoded = self.hf(texts, return_attention_mask=False, **self._cut)["input_ids"]
        if not self.hf.bos_token:
            return encoded
        begin = [self.hf.bos_token_id] * 2
        return [
            ids[1:] if ids[:2] == begin and text.startswith(self.hf.bos_token) else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    @cached_property
    def pairs(self) -> PairEncoder:
        """Encoder of pairs of texts."""
        return PairEncoder(self.hf)

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token by its name in the vocabulary, or by its text; None if there is no such token."""
        token_ids = [self.hf.get_vocab().get(token)]
        if token_ids == [None]:
            token_ids = self.encode_batch([token], add_special_tokens=False)[0]
        return token_ids[0] if len(token_ids) == 1 and token_ids[0] != self.hf.unk_token_id else None

    def prefix_tokens(self, prefix: str | None) -> list[int]:
        """Returns the tokens in front of a text that belong to its prefix, special tokens included.

        Args:
            prefix: The prefix; None for the model's default prompt.
        """
        prefix = self.texts.prefix if prefix is None else prefix
        if not prefix:
            return []
        (ids,) = self.encode_batch([""], prefix=prefix)
        return ids[:-1] if ids and ids[-1] in self.hf.all_special_ids else ids

    @cached_property
    def edges(self) -> tuple[list[int], list[int]]:
        """The special tokens that are added before every text, and those after it."""
        (with_text,), (plain,) = self.hf(["a"])["input_ids"], self.hf(["a"], add_special_tokens=False)["input_ids"]
        starts = [i for i in range(len(with_text) - len(plain) + 1) if with_text[i : i + len(plain)] == plain]
        first = starts[0] if plain and starts else 0
        return with_text[:first], with_text[first + len(plain) :] if starts else []

    def cut(self, token_ids: list[int], most: int) -> list[int]:
        """Returns the tokens of a text, cut to `most` as the tokenizer cuts: its special tokens at both edges stay."""
        if len(token_ids) <= most:
            return token_ids
        before, after = self.edges
        head = before if token_ids[: len(before)] == before else []
        tail = after if token_ids[len(token_ids) - len(after) :] == after else []
        room = most - len(head) - len(tail)
        if room < 0:
            return token_ids[:most]
        inner = token_ids[len(head) : len(token_ids) - len(tail)]
        return [*head, *(inner[len(inner) - room :] if self.hf.truncation_side == "left" else inner[:room]), *tail]

    def decode_ids(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens, decoded without the tokens before them."""
        return self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def decode(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """Returns the text of an output, decoded as the continuation of its prompt; see `decode_continuation`."""
        return decode_continuation(self, prompt_token_ids, output_token_ids, skip_special_tokens)

    def split(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], text: str, skip_special_tokens: bool
    ) -> list[str]:
        """Returns the part of an output's text that each of its tokens adds, see `split_text`."""
        return split_text(self, prompt_token_ids, output_token_ids, text, skip_special_tokens)

    def _list_spellings_of_token(self, token_id: int) -> tuple[str, ...]:
        """Returns the spellings of a token by itself: its text, if it has one, its name, and its number."""
        number = f"<token {token_id}>"
        if token_id >= self.vocab_size:
            return (number,)
        text, name = self.inner_text(token_id, skip_special_tokens=False), self._token_name(token_id)
        return (text, name, number) if text and INCOMPLETE not in text else (name, number)

    def _token_name(self, token_id: int) -> str:
        """Returns the name of a token in the vocabulary; bytes in the alphabet of GPT-2 are spelled as ``<0xE2>``."""
        name = str(self.hf.convert_ids_to_tokens(token_id))
        if INCOMPLETE not in self.decode_ids([token_id], False) or not all(char in self._byte_of for char in name):
            return name
        return "".join(f"<0x{self._byte_of[char]:02X}>" for char in name)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Character -> the byte that it stands for in the names of byte-level tokens."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {char: byte for byte, char in bytes_to_unicode().items()}

    def render_chat(
        self,
        messages: Messages,
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        content_format: ContentFormat = "auto",
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Renders a conversation as the text of a prompt, with a chat template.

        Args:
            messages: Messages of the conversation, each a dictionary with `role` and `content`. Arguments of tool calls
                that are JSON text reach the template as dictionaries.
            add_generation_prompt: Whether the prompt ends with the opening of the assistant's turn.
            continue_final_message: Whether the last message is the beginning of the answer, which the model continues.
            chat_template: Jinja text, or name of one of the tokenizer's templates, for this call.
            content_format: Form in which a content reaches the template: ``"string"`` joins parts with line breaks,
                ``"openai"`` makes a list of parts of a text, ``"auto"`` converts only what the template does not read.
            tools: Descriptions of tools, for templates that use them.
            **template_kwargs: Further variables of the template.

        Returns:
            The prompt. Tokenise it with `add_special_tokens=False`.

        Raises:
            ChatTemplateError: There is no chat template, or the template raises an error for the conversation.
        """
        template = self._chat_template if chat_template is None else chat_template
        if template is None and self.hf.chat_template is None:
            raise ChatTemplateError(
                "the tokenizer has no chat template; pass chat_template=..., or give a plain prompt instead of messages"
            )
        if template is not None and not self._is_template(template):
            raise ChatTemplateError(f"chat_template must be Jinja text; got {quote(template)}")
        if not isinstance(content_format, str) or content_format not in CONTENT_FORMATS:
            raise ConfigError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}; got {quote(content_format)}"
            )
        for name, switch in (
            ("add_generation_prompt", add_generation_prompt),
            ("continue_final_message", continue_final_message),
        ):
            if not isinstance(switch, bool | int | None):
                raise ChatTemplateError(f"{name} must be True or False; got {quote(switch)}")
        if not OWN_NAMES.isdisjoint(template_kwargs):
            raise ChatTemplateError(f"no variable of a template can be named {', '.join(sorted(OWN_NAMES))}")
        check_messages(messages)
        variables = {
            **self.hf.special_tokens_map,
            **plain_data("chat_template_kwargs", template_kwargs),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "tools": _plain_tools(tools),
        }
        messages = plain_data("messages", messages)
        try:
            text = self.hf.get_chat_template(template, variables["tools"])
            read = as_read(messages, self._forms(text, messages, content_format, variables))
            return self._templates.render(text, read, continue_final_message=continue_final_message, **variables)
        except Exception as error:  # A template can raise any error of Jinja and of its own code.
            raise ChatTemplateError(f"the chat template refuses the conversation: {_first_line(error)}") from error

    def _forms(self, template: str, messages: Messages, given: ContentFormat, variables: Mapping[str, Any]) -> Forms:
        """Returns the forms of contents that a template reads, which the caller may have given."""
        if given != "auto":
            return dict.fromkeys([message["role"] for message in messages], frozenset({given}))
        names = frozenset((name, value is None, _short(value)) for name, value in variables.items())
        parsed = as_read(messages, {})
        return self._content_forms.find(
            lambda tried: self._templates.render(template, tried, **variables), template, parsed, names
        )

    def _is_template(self, template: Any) -> bool:
        """Returns whether a value is Jinja text, or the name of one of the tokenizer's templates."""
        named = self.hf.chat_template if isinstance(self.hf.chat_template, dict) else ()
        return isinstance(template, str) and ("{" in template or template in named)

    def read_template(self, template: Any) -> Any:
        """Returns the Jinja text of a chat template that the caller of an `LLM` gives to a call.

        Args:
            template: Jinja text, name of a template of the tokenizer, or path of a file with Jinja text.

        Raises:
            ConfigError: The file cannot be read.
        """
        is_path = isinstance(template, str) and template and not self._is_template(template)
        return _read_template(template) if is_path else template

    def bad_word_edges(self, words: Sequence[str]) -> np.ndarray:
        """Returns all the spellings of bad words as the edges of a graph, see `Speller`.

        A word is known at the start of a text, after a space, and inside of a text after the end of another token. It
        is not known where it begins in the middle of a token with other letters: ``own`` in ``down``.
        """
        return self._speller.edges(tuple(words))

    def _all_bytes(self) -> Iterator[tuple[int, bytes]]:
        """Yields the bytes that each token adds inside of a text; special tokens are left out."""
        for token_id in sorted(set(range(self.vocab_size)) - set(self.hf.all_special_ids)):
            text = self.inner_text(token_id)
            if INCOMPLETE not in text:
                yield token_id, text.encode()
            else:
                yield token_id, bytes.fromhex("".join(BYTE_NAME.findall(self._token_name(token_id))))

    def inner_text(self, token_id: int, skip_special_tokens: bool = True) -> str:
        """Returns the text that a token adds inside of a text, where no leading space is stripped."""
        first, both = (self.decode_ids([token_id] * times, skip_special_tokens) for times in (1, 2))
        return both.removeprefix(first)


def _find_damaged(folder: Path) -> Path:
    """Returns the file that keeps a tokenizer from being loaded; the folder if no file by itself does."""
    from tokenizers import Tokenizer as RustTokenizer

    for file in (folder / name for name in SETTINGS_FILES):
        try:
            read_json_object(Location.at(file))
        except CheckpointError:
            return file
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            RustTokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001  # The library raises plain Exception.
        return file
    return folder


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON_CHARS] if lines else type(error).__name__


def _plain_tools(tools: Any) -> list[Any] | None:
    """Returns descriptions of tools as plain data; a function is left to transformers, which describes it."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise ChatTemplateError(f"tools must be a list of descriptions; got {quote(tools)}")
    return [tool if callable(tool) else plain_data("tools", tool) for tool in tools]


def _short(value: Any) -> Any:
    """Returns a value if it is a number or a short text, else None."""
    is_short = len(value) <= MAX_SHORT_CHARS if isinstance(value, str) else isinstance(value, int | float)
    return value if is_short else None


def _read_template(template: str | None) -> str | None:
    """Returns the Jinja text of a template; an argument without a brace is the path of a file with the text."""
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template {quote(template)} is neither Jinja text nor a readable file: {error!s:.200}"
        ) from error

"""`MillraceError` and its subclasses: every error that Millrace raises, and `RequestError`, which describes one.

    MillraceError
    ├── UserError (also ValueError)           the caller gave a value that cannot be used
    │   ├── ConfigError                       a setting of an engine, pool, processor or job is wrong
    │   │   └── OutputInUseError              another run writes to the output
    │   ├── SamplingParamsError               a field of SamplingParams is wrong
    │   ├── PoolingParamsError                a field of PoolingParams is wrong
    │   ├── PromptError                       a prompt cannot be run
    │   │   ├── EmptyPromptError
    │   │   ├── PromptTooLongError
    │   │   ├── TokenOutOfVocabularyError
    │   │   └── PromptTypeError (also TypeError)
    │   ├── ChatTemplateError                 a conversation cannot be rendered
    │   ├── CheckpointError                   a model folder cannot be read
    │   ├── AdapterError                      a LoRA adapter cannot be used
    │   └── UnsupportedModelError             a model is not implemented
    ├── StorageError (also OSError)           a file behind a URL cannot be read or written, even after retries
    ├── DamagedOutputError                    a file of an unfinished output is missing or damaged, or rows are
    └── EngineError (also RuntimeError)       the engine failed to run a request
        ├── NumericalError                    the model's results for one request hold NaN
        ├── ModelExecutionError               the forward pass raised an error
        ├── OutOfBlocksError                  the KV cache cannot hold one request
        ├── ReplicaDiedError                  too many replicas died while they ran this request
        ├── PlacementError                    the cluster has no room for a replica
        └── EngineDeadError                   no engine is left that could run the request

A message says what was given, what is allowed and what to do. Errors are sent between processes, so all of them can be
pickled: an error holds only its message (`args`), and no subclass has a constructor.
"""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .shown import HIDDEN, is_secret_name, without_secrets


class MillraceError(Exception):
    """Base class of all errors of this package. The message of an error holds no secrets, see `without_secrets`."""

    def __init__(self, *args: object) -> None:
        super().__init__(*map(without_secrets, args))


class UserError(MillraceError, ValueError):
    """A value that the caller gave cannot be used."""


class ConfigError(UserError):
    """A setting of the engine, the pool, the processor or the job is wrong."""


class OutputInUseError(ConfigError):
    """Another run writes to the output, or has taken it over from this one."""


class SamplingParamsError(UserError):
    """A field of `SamplingParams` is wrong, or does not fit the model."""


class PoolingParamsError(UserError):
    """A field of `PoolingParams` is wrong, or does not fit the model."""


class PromptError(UserError):
    """A prompt cannot be run."""


class EmptyPromptError(PromptError):
    """A prompt has no token."""


class PromptTooLongError(PromptError):
    """A prompt does not fit into the model's length limit, together with one new token if tokens are generated."""


class TokenOutOfVocabularyError(PromptError):
    """A token id does not exist in the model's vocabulary."""


class PromptTypeError(PromptError, TypeError):
    """A prompt is not a string, a list of token ids or one of the prompt dictionaries."""


class ChatTemplateError(UserError):
    """A conversation cannot be rendered by the chat template."""


class CheckpointError(UserError):
    """A model folder is missing, incomplete or corrupt."""


class AdapterError(UserError):
    """A LoRA adapter is missing, damaged or hostile, does not fit the model, or asks for what is not implemented."""


class UnsupportedModelError(UserError):
    """The model's architecture, or a feature that the model's config asks for, is not implemented."""


class StorageError(MillraceError, OSError):
    """A read or write of a file behind a URL failed, and so did its retries."""


class DamagedOutputError(MillraceError):
    """A file that a job keeps in its output folder is missing or damaged, or rows of the job are missing."""


class EngineError(MillraceError, RuntimeError):
    """The engine failed to run a request."""


class NumericalError(EngineError):
    """The model's logits or hidden states for a request hold NaN."""


class ModelExecutionError(EngineError):
    """The forward pass raised an error for a request."""


class OutOfBlocksError(EngineError):
    """A single request needs more KV cache blocks than the engine has."""


class ReplicaDiedError(EngineError):
    """Replicas died while they ran the request, more often than the settings allow."""


class PlacementError(EngineError):
    """The cluster did not place a replica within the time limit."""


class EngineDeadError(EngineError):
    """No engine is left that could run the request."""


@dataclass(frozen=True, slots=True)
class RequestError:
    """The error of a failed request, as plain data in the output of the request.

    Attributes:
        kind: Class name of the error, e.g. ``"PromptTooLongError"``.
        message: Message of the error: what was given, what is allowed, what to do.
        retryable: Whether the same request may succeed when it is run again, because the request is not the cause.
    """

    kind: str
    message: str
    retryable: bool

    @classmethod
    def from_exception(cls, error: BaseException) -> RequestError:
        """Makes the description of an exception.

        Args:
            error: The exception that ended the request.

        Returns:
            The description. It is retryable if the exception is an `EngineError` or a `StorageError`.
        """
        message = without_secrets(str(error) or repr(error))
        return cls(type(error).__name__, message, isinstance(error, EngineError | StorageError))

    def to_exception(self) -> MillraceError:
        """Returns an exception of the class `kind` with the message; `ModelExecutionError` if the class is unknown."""
        kind = globals().get(self.kind)
        if isinstance(kind, type) and issubclass(kind, MillraceError):
            return kind(self.message)
        return ModelExecutionError(f"{self.kind}: {self.message}")


MAX_KEY_CHARS = 100
"""Most characters of an unknown key that are compared with the known keys and shown."""

MAX_CLEANED_CHARS = 10_000
"""Most characters of a text that are searched for secrets before it is cut."""


class _Quoter(reprlib.Repr):
    """Cuts values after it has hidden the secrets in them: a part of an address no longer looks like one."""

    def repr_str(self, value: str, level: int) -> str:
        return super().repr_str(without_secrets(value[:MAX_CLEANED_CHARS]), level)

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        first = itertools.islice(value.items(), self.maxdict + 1)
        named = {key: HIDDEN if is_secret_name(key) and one is not None else one for key, one in first}
        return super().repr_dict(named, level)


_QUOTER = _Quoter()
_QUOTER.maxlist = _QUOTER.maxtuple = _QUOTER.maxdict = 10
_QUOTER.maxstring = _QUOTER.maxother = 150


def quote(value: object, max_chars: int = 200) -> str:
    """Returns the beginning of a value's repr for an error message, at most `max_chars` characters; it never raises.

    Secrets are hidden. The cost does not grow with the value: only the first elements of a list or a mapping are read.
    """
    try:
        text = _QUOTER.repr(value)
    except Exception:  # noqa: BLE001  # A repr can raise anything, and so does the repr of an integer of 5,000 digits.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def unknown_key_message(what: str, key: object, known: Iterable[str], accepted: Iterable[str] = ()) -> str:
    """Returns the message of an error about an unknown key.

    Args:
        what: Name of the object that the key was given to, e.g. ``"SamplingParams"``.
        key: The unknown key, of any type.
        known: All known keys.
        accepted: Further keys that are taken, of which only one that is similar is named.

    Returns:
        One line with the unknown key and the most similar known key; with all known keys if none is similar.
    """
    names = sorted(known)
    all_names = [*names, *accepted]
    near = difflib.get_close_matches(key[:MAX_KEY_CHARS], all_names, n=1) if isinstance(key, str) else []
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return f"{what} has no field {quote(key, MAX_KEY_CHARS)}; {hint}"

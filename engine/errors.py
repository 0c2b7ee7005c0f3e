"""Every error Millrace raises, in one tree.

    MillraceError
    ├── UserError (also ValueError)           something given to us cannot be used
    │   ├── ConfigError                       an engine, pool, processor or job setting
    │   ├── SamplingParamsError               a field of SamplingParams
    │   ├── PoolingParamsError                a field of PoolingParams
    │   ├── PromptError                       one prompt
    │   │   ├── EmptyPromptError
    │   │   ├── PromptTooLongError
    │   │   ├── TokenOutOfVocabularyError
    │   │   └── PromptTypeError (also TypeError)
    │   ├── ChatTemplateError                 a conversation that cannot be rendered
    │   ├── CheckpointError                   a model folder that cannot be read
    │   └── UnsupportedModelError             a model we do not implement
    ├── StorageError (also OSError)           a file behind a URL cannot be read or written, retries included
    └── EngineError (also RuntimeError)       the engine failed at its work
        ├── NumericalError                    the model's logits for one request are not numbers
        ├── ModelExecutionError               the forward pass raised
        ├── OutOfBlocksError                  the KV cache cannot hold one request
        ├── ReplicaDiedError                  the process died with this request on board, too often
        ├── PlacementError                    the cluster has no room for a replica
        └── EngineDeadError                   no engine is left to run on

A message says what was given, what is allowed and what to do. Errors cross process borders, so each one pickles: an
error is its message (`args`), and a subclass adds no constructor of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class MillraceError(Exception):
    """Base of every error of this package."""


class UserError(MillraceError, ValueError):
    """Something given by the caller cannot be used."""


class ConfigError(UserError):
    """A setting of the engine, the pool, the processor or the job is wrong."""


class SamplingParamsError(UserError):
    """A field of `SamplingParams` is wrong, alone or together with the model."""


class PoolingParamsError(UserError):
    """A field of `PoolingParams` is wrong, alone or together with the model."""


class PromptError(UserError):
    """A prompt cannot be run."""


class EmptyPromptError(PromptError):
    """A prompt has no token."""


class PromptTooLongError(PromptError):
    """A prompt leaves no room for a single new token."""


class TokenOutOfVocabularyError(PromptError):
    """A token id does not exist in the model's vocabulary."""


class PromptTypeError(PromptError, TypeError):
    """A prompt is not a string, a list of token ids or one of the prompt dictionaries."""


class ChatTemplateError(UserError):
    """A conversation cannot be rendered by the chat template."""


class CheckpointError(UserError):
    """A model folder is missing, incomplete or corrupt."""


class UnsupportedModelError(UserError):
    """The model's architecture, or a feature its config asks for, is not implemented."""


class StorageError(MillraceError, OSError):
    """A store of files failed, and kept failing when asked again."""


class EngineError(MillraceError, RuntimeError):
    """The engine failed at its work."""


class NumericalError(EngineError):
    """The model's logits for a request hold NaN."""


class ModelExecutionError(EngineError):
    """The forward pass raised for a request."""


class OutOfBlocksError(EngineError):
    """A single request needs more KV cache than there is."""


class ReplicaDiedError(EngineError):
    """The replica died with the request on board more often than allowed."""


class PlacementError(EngineError):
    """The cluster had no room for a replica in the time it was given."""


class EngineDeadError(EngineError):
    """No engine is left that could run the request."""


@dataclass(frozen=True, slots=True)
class RequestError:
    """What a failed request carries instead of text.

    Attributes:
        kind: Class name of the error, e.g. ``"PromptTooLongError"``.
        message: What was given, what is allowed, what to do.
        retryable: Whether the same request may succeed when run again (the fault was not its own).
    """

    kind: str
    message: str
    retryable: bool

    @classmethod
    def from_exception(cls, error: BaseException) -> RequestError:
        """Describes an exception; only faults of an engine or a store are worth a retry.

        Args:
            error: The exception that ended the request.

        Returns:
            Its kind, its message, and whether to try again.
        """
        return cls(type(error).__name__, str(error) or repr(error), isinstance(error, EngineError | StorageError))

    def to_exception(self) -> MillraceError:
        """Returns the typed error this describes, for callers that want it raised."""
        kind = globals().get(self.kind)
        if isinstance(kind, type) and issubclass(kind, MillraceError):
            return kind(self.message)
        return ModelExecutionError(f"{self.kind}: {self.message}")


def unknown_key_message(what: str, key: str, known: Iterable[str]) -> str:
    """Says that a key is unknown and which known one is nearest.

    Args:
        what: What the key was given to, e.g. ``"SamplingParams"``.
        key: The unknown key.
        known: All keys that would have been right.

    Returns:
        One line: the key, the nearest known key if any is near, else all of them.
    """
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return f"{what} has no field {key!r}; {hint}"

"""`ModelCode`: whose code runs a model, ours or that of transformers, and whether code of its folder may run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .family import Family

__all__ = ["ModelCode", "model_code"]

ATTRIBUTE = "millrace_code"
"""Attribute of a transformers config that holds its `ModelCode`."""


@dataclass(slots=True)
class ModelCode:
    """Whose code runs a model.

    Attributes:
        impl: A value of `EngineConfig.model_impl`.
        trust_remote_code: Whether code of the model's folder may run.
        folder: The model's folder; None if the config came from no folder.
        fallback: The family of the model as a module of transformers, once it was made: that takes a trial.
    """

    impl: str = "auto"
    trust_remote_code: bool = False
    folder: Path | None = None
    fallback: Family | None = field(default=None, compare=False)

    def attach(self, hf_config: Any) -> None:
        """Makes this the code of a config."""
        object.__setattr__(hf_config, ATTRIBUTE, self)


def model_code(hf_config: Any) -> ModelCode:
    """Returns the `ModelCode` of a config; one that was not read from a folder gets the default."""
    code = getattr(hf_config, ATTRIBUTE, None)
    if code is None:
        code = ModelCode()
        code.attach(hf_config)
    return code

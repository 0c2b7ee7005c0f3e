"""`ModelCode`: whose code runs a model, ours or that of transformers, and whether code of its folder may run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .family import Family

__all__ = ["ModelCode", "model_code"]

ATTRIBUTE = "millrace_code"
"""Attribute of a transformers config that holds its `ModelCode`."""


class ModelCode(dict[str, Any]):
    """Whose code runs a model. It is a mapping because transformers writes the attributes of a config as JSON.

    Args:
        impl: A value of `EngineConfig.model_impl`.
        trust_remote_code: Whether code of the model's folder may run.
        folder: The model's folder; None if the config came from no folder.

    Attributes:
        fallback: The family of the model as a module of transformers, once it was made: that takes a trial.
    """

    fallback: Family | None = None

    def __init__(
        self, impl: str = "auto", *, trust_remote_code: bool = False, folder: str | Path | None = None
    ) -> None:
        super().__init__(impl=impl, trust_remote_code=trust_remote_code, folder=None if folder is None else str(folder))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCode:
        return self  # The code of a copied config is the same, and the family need not be copied with it.

    @property
    def impl(self) -> str:
        """A value of `EngineConfig.model_impl`."""
        return str(self["impl"])

    @property
    def trust_remote_code(self) -> bool:
        """Whether code of the model's folder may run."""
        return bool(self["trust_remote_code"])

    @property
    def folder(self) -> Path | None:
        """The model's folder; None if the config came from no folder."""
        return None if self["folder"] is None else Path(self["folder"])

    def attach(self, hf_config: Any) -> None:
        """Makes this the code of a config."""
        setattr(hf_config, ATTRIBUTE, self)


def model_code(hf_config: Any) -> ModelCode:
    """Returns the `ModelCode` of a config; a config that was not read from a folder gets the default."""
    code = getattr(hf_config, ATTRIBUTE, None)
    if not isinstance(code, ModelCode):
        code = ModelCode()
        code.attach(hf_config)
    return code

"""`find_module_class`: the class of transformers, or of the model folder's own code, that an architecture names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UnsupportedModelError, quote

__all__ = ["AUTO_CLASSES", "find_module_class", "folder_class"]

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
}
"""Ending of an architecture's name -> the key of `auto_map` in config.json under which a folder names its own class."""


def find_module_class(architecture: str, auto_map: Any, folder: Path | None, *, trust_remote_code: bool) -> Any:
    """Returns the class of an architecture: that of transformers, or else that of the folder's own code.

    Args:
        architecture: Name of the class.
        auto_map: The field `auto_map` of config.json: the names in `AUTO_CLASSES` -> classes of the folder.
        folder: The model folder; None if the config came from no folder.
        trust_remote_code: Whether code of the folder may be run.

    Returns:
        A subclass of transformers' `PreTrainedModel`; None if there is no such class.

    Raises:
        UnsupportedModelError: Only the folder's own code has the class, and it may not be run, or fails.
    """
    import transformers

    found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    key = next((auto for ending, auto in AUTO_CLASSES.items() if architecture.endswith(ending)), None)
    reference = auto_map.get(key) if isinstance(auto_map, dict) else None
    if reference is None or folder is None:
        return None
    return folder_class(reference, folder, trust_remote_code=trust_remote_code)


def folder_class(reference: Any, folder: Path, *, trust_remote_code: bool) -> Any:
    """Returns a class of the Python code in a model folder, which is run to define it.

    Args:
        reference: The class as `auto_map` names it, e.g. `"modeling_mine.MineForCausalLM"`.
        folder: The model folder.
        trust_remote_code: Whether the code may be run.

    Raises:
        UnsupportedModelError: The code may not be run, or fails, or is not in the folder.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if not trust_remote_code:
        raise UnsupportedModelError(
            f"only the code in {folder} can run this model (auto_map names {quote(reference)}), and code that comes "
            "with a model is not run unless you allow it; read it, and pass trust_remote_code=True"
        )
    if not isinstance(reference, str) or "--" in reference or reference.count(".") != 1:
        raise UnsupportedModelError(
            f"auto_map names {quote(reference)}; it must be MODULE.CLASS, of a Python file in {folder}"
        )
    try:
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except Exception as error:  # The code of a folder raises anything.
        raise UnsupportedModelError(f"{reference} in {folder} cannot be loaded: {error!r:.300}") from error

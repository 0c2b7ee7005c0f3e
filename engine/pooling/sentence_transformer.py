"""`SentenceTransformer`: what a model's folder with the files of sentence-transformers says about embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ..errors import CheckpointError, quote
from ..storage import Location, read_json, read_json_object
from ..text.tokenizer import TextSettings
from .config import PoolerConfig
from .dense import Dense, read_dense
from .pooler import normalize

__all__ = ["SentenceTransformer", "read_sentence_transformer", "read_text_settings"]

POOLING_MODES = {
    "lasttoken": "LAST",
    "mean": "MEAN",
    "mean_tokens": "MEAN",
    "cls": "CLS",
    "cls_token": "CLS",
    "max": "MAX",
    "max_tokens": "MAX",
}
"""Names of pooling modes in sentence-transformers -> `PoolerConfig.pooling_type`."""

KINDS = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
"""The modules that are implemented; dropout does nothing outside of training."""

TEXT_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the file with the settings of the Transformer module; it has one of them."""

MAX_TOKENS = 2**31 - 1

Module = tuple[str, Location]
"""The kind of a module and its folder."""


@dataclass(frozen=True, slots=True)
class SentenceTransformer:
    """The modules after the transformer.

    Attributes:
        pooling: Pooling type, and whether the last module normalises.
        steps: Functions that are applied to the pooled vector, in order, before it is shortened and normalised.
    """

    pooling: PoolerConfig = field(default_factory=PoolerConfig)
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()

    def embedding_size(self, hidden_size: int) -> int:
        """Returns the number of elements of an embedding, from that of the hidden states."""
        sizes = [step.weight.shape[0] for step in self.steps if isinstance(step, Dense)]
        return sizes[-1] if sizes else hidden_size


def read_sentence_transformer(place: Location, size: int) -> SentenceTransformer:
    """Reads the modules of a model from its `modules.json` and the folders that it names.

    Args:
        place: Folder of the model.
        size: Number of elements of the transformer's hidden states.

    Returns:
        The modules; none of them if there is no `modules.json`.

    Raises:
        CheckpointError: A file is damaged, or asks for a module or a kind of pooling that this release does not have.
    """
    modules = _read_modules(place)
    if not modules:
        return SentenceTransformer()
    kinds = [kind for kind, _ in modules if kind != "Dropout"]
    pooling_type, after = None, modules
    if "Pooling" in kinds:
        if kinds.count("Pooling") > 1 or kinds.index("Pooling") != kinds.count("Transformer"):
            raise CheckpointError(f"{place}: modules.json must have one Pooling, after the Transformer; got {kinds}")
        index = next(i for i, (kind, _) in enumerate(modules) if kind == "Pooling")
        pooling_type, after = _read_pooling(modules[index][1]), modules[index + 1 :]
    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    for kind, folder in after:
        if kind == "Normalize":
            steps.append(normalize)
        elif kind == "Dense":
            dense = _fitting_dense(folder, size)
            size = len(dense.weight)
            steps.append(dense)
    normalizes = bool(steps) and steps[-1] is normalize
    return SentenceTransformer(PoolerConfig(pooling_type, normalizes), tuple(steps[:-1] if normalizes else steps))


def read_text_settings(place: Location) -> TextSettings:
    """Reads the default prompt and the length limit of a model of sentence-transformers.

    Args:
        place: Folder of the model.

    Returns:
        The settings; those of `TextSettings()` if there is no `modules.json`.

    Raises:
        CheckpointError: A file is damaged, or a setting is wrong or not implemented.
    """
    modules = _read_modules(place)
    if not modules:
        return TextSettings()
    folders = [folder for kind, folder in modules if kind == "Transformer"]
    files = [folder / name for folder in (*folders, place) for name in TEXT_CONFIGS]
    file = next((file for file in files if file.exists()), place / TEXT_CONFIGS[0])
    config = read_json_object(file)
    if config.get("do_lower_case"):
        raise CheckpointError(f"{file} asks for do_lower_case, which is not implemented")
    max_tokens = config.get("max_seq_length")
    if max_tokens is not None and (type(max_tokens) is not int or not 1 <= max_tokens <= MAX_TOKENS):
        raise CheckpointError(
            f"{file}: max_seq_length must be an integer of at least 1, at most {MAX_TOKENS}; got {quote(max_tokens)}"
        )
    return TextSettings(_default_prompt(place), max_tokens)


def _default_prompt(place: Location) -> str:
    config = read_json_object(place / "config_sentence_transformers.json")
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    prompt = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise CheckpointError(
            f"{place}/config_sentence_transformers.json: default_prompt_name is {quote(name)}, and prompts have no "
            f"text of that name: {quote(prompts)}"
        )
    return prompt


def _fitting_dense(folder: Location, size: int) -> Dense:
    dense = read_dense(folder, _read_config(folder))
    if dense.weight.shape[1] != size:
        raise CheckpointError(f"{folder} takes vectors of {dense.weight.shape[1]} elements; before it they have {size}")
    return dense


def _read_config(folder: Location) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}, which modules.json names, has no config.json; fetch it again")
    return read_json_object(folder / "config.json")


def _read_modules(place: Location) -> list[Module]:
    """Returns the modules of `modules.json`; an empty list if the file does not exist."""
    found = read_json(place / "modules.json")
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(module, Mapping) for module in found):
        raise CheckpointError(f"{place}/modules.json must hold a list of modules; got {quote(found)}")
    modules = []
    for module in found:
        kind, path = str(module.get("type", "")).rpartition(".")[2], module.get("path", "")
        if kind not in KINDS:
            raise CheckpointError(
                f"{place}/modules.json names the module {quote(kind)}; implemented are {', '.join(KINDS)}"
            )
        if not isinstance(path, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise CheckpointError(
                f"{place}/modules.json: a path must lie in the folder of the model; got {quote(path)}"
            )
        if kind in ("Pooling", "Dense") and not PurePosixPath(path).parts:
            raise CheckpointError(
                f"{place}/modules.json: the path of {kind} must name its own folder; got {quote(path)}"
            )
        modules.append((kind, place / path if path else place))
    return modules


def _read_pooling(folder: Location) -> str:
    """Returns the pooling type that the config of a pooling module asks for, in the new form or the old one."""
    config = _read_config(folder)
    flags = {name.removeprefix("pooling_mode_"): on for name, on in config.items() if name.startswith("pooling_mode_")}
    modes = [name for name, on in flags.items() if on is True]
    if config.get("pooling_mode") is not None:
        given = config["pooling_mode"]
        modes = given if isinstance(given, list) else [given]
    elif not flags:
        modes = ["mean"]  # This is the default of sentence-transformers.
    if len(modes) != 1 or not isinstance(modes[0], str) or modes[0] not in POOLING_MODES:
        asked = " and ".join(map(str, modes))[:100] or "no mode, all are off"
        raise CheckpointError(f"{folder} is to be pooled by {asked}; this release does lasttoken, mean, cls, max")
    if config.get("include_prompt") is False and POOLING_MODES[modes[0]] != "LAST":
        raise CheckpointError(f"{folder}: include_prompt=false, pooling without the prompt, is not implemented")
    return POOLING_MODES[modes[0]]

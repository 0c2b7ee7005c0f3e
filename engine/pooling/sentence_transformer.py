"""`SentenceTransformer`: what a model's folder with the files of sentence-transformers says about embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ..errors import CheckpointError, quote
from ..storage import Location, read_json, read_json_object
from ..text.tokenizer import TextSettings
from .config import POOLING_TYPES, PoolerConfig
from .dense import Dense, read_dense
from .layer_norm import read_layer_norm
from .pooler import normalize
from .scoring import SIMILARITIES

__all__ = [
    "SIMILARITIES",
    "SentenceTransformer",
    "read_cross_encoder_activation",
    "read_cross_encoder_texts",
    "read_sentence_transformer",
    "read_text_settings",
]

POOLING_MODES = {
    "cls": "CLS",
    "max": "MAX",
    "mean": "MEAN",
    "mean_sqrt_len": "MEAN_SQRT_LEN",
    "weightedmean": "WEIGHTEDMEAN",
    "lasttoken": "LAST",
}
"""Names of pooling modes in sentence-transformers, without their last part -> `PoolerConfig.pooling_type`."""

KINDS = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
"""The modules that are implemented; dropout does nothing outside of training."""

TEXT_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the file with the settings of the Transformer module; it has one of them."""

MAX_TOKENS = 2**31 - 1

SETTINGS = "config_sentence_transformers.json"
"""Name of the file with the prompts and the similarity function."""

Module = tuple[str, Location]
"""The kind of a module and its folder."""

Step = Callable[[np.ndarray], np.ndarray]
"""What a module does to vectors."""


@dataclass(frozen=True, slots=True)
class SentenceTransformer:
    """The modules after the transformer.

    Attributes:
        pooling: Pooling types, and whether the last module normalises.
        steps: Functions that are applied to the pooled vector, in order, before it is shortened and normalised.
        token_steps: Functions that are applied to the vectors of tokens; all modules, if none of them pools.
        size: Number of elements of the vector of a prompt.
        includes_prompt: Whether the tokens of a prompt in front of a text count in means.
        similarity: How embeddings are compared: one of `SIMILARITIES`.
    """

    size: int
    pooling: PoolerConfig = field(default_factory=PoolerConfig)
    steps: tuple[Step, ...] = ()
    token_steps: tuple[Step, ...] = ()
    includes_prompt: bool = True
    similarity: str = "cosine"


def read_sentence_transformer(place: Location, size: int, types: Sequence[str] = ()) -> SentenceTransformer:
    """Reads the modules of a model from its `modules.json` and the folders that it names.

    Args:
        place: Folder of the model.
        size: Number of elements of the transformer's hidden states.
        types: Pooling types that replace those of the folder; empty for those of the folder.

    Returns:
        The modules; none of them if there is no `modules.json`.

    Raises:
        CheckpointError: A file is damaged, or asks for a module or a kind of pooling that this release does not have.
    """
    modules = _read_modules(place)
    num_vectors = max(1, len(types))
    if not modules:
        return SentenceTransformer(size * num_vectors)
    kinds = [kind for kind, _ in modules if kind != "Dropout"]
    pools = "Pooling" in kinds
    own: tuple[str, ...] | None = None
    includes_prompt, after = True, modules
    if pools:
        if kinds.count("Pooling") > 1 or kinds.index("Pooling") != kinds.count("Transformer"):
            raise CheckpointError(f"{place}: modules.json must have one Pooling, after the Transformer; got {kinds}")
        index = next(i for i, (kind, _) in enumerate(modules) if kind == "Pooling")
        (own, includes_prompt), after = _read_pooling(modules[index][1]), modules[index + 1 :]
        num_vectors = len(types or own)
    steps, size = _read_steps(after, size * num_vectors, of_tokens=not pools)
    normalizes = bool(steps) and steps[-1] is normalize
    done = tuple(steps[:-1] if normalizes else steps)
    return SentenceTransformer(
        size,
        PoolerConfig(own, normalizes, _own_dimensions(place, size)),
        done,
        () if pools else done,
        includes_prompt,
        _similarity(place),
    )


def _read_steps(modules: Sequence[Module], size: int, *, of_tokens: bool) -> tuple[list[Step], int]:
    """Returns the functions that modules compute, and the number of elements that vectors have after them."""
    steps: list[Step] = []
    for kind, folder in modules:
        if kind == "Normalize":
            steps.append(normalize)
        elif kind == "LayerNorm":
            steps.append(read_layer_norm(folder, size))
        elif kind == "Dense":
            dense = _fitting_dense(folder, size, of_tokens=of_tokens)
            size = len(dense.weight)
            steps.append(dense)
    return steps, size


def read_text_settings(place: Location) -> TextSettings:
    """Reads what a model of sentence-transformers does to texts: prompts, small letters, and the length limit.

    Args:
        place: Folder of the model.

    Returns:
        The settings; those of `TextSettings()` if there is no `modules.json`.

    Raises:
        CheckpointError: A file is damaged, or a setting is wrong.
    """
    modules = _read_modules(place)
    if not modules:
        return TextSettings()
    folders = [folder for kind, folder in modules if kind == "Transformer"]
    files = [folder / name for folder in (*folders, place) for name in TEXT_CONFIGS]
    file = next((file for file in files if file.exists()), place / TEXT_CONFIGS[0])
    config = read_json_object(file)
    lowers = config.get("do_lower_case")
    if not isinstance(lowers, bool | None):
        raise CheckpointError(f"{file}: do_lower_case must be true or false; got {quote(lowers)}")
    max_tokens = config.get("max_seq_length")
    if max_tokens is None:
        max_tokens = _tokenizer_limit([*folders, place])
    elif type(max_tokens) is not int or not 1 <= max_tokens <= MAX_TOKENS:
        raise CheckpointError(
            f"{file}: max_seq_length must be an integer of at least 1, at most {MAX_TOKENS}; got {quote(max_tokens)}"
        )
    prompts = _read_prompts(place)
    return TextSettings(_default_prompt(place, prompts), max_tokens, bool(lowers), prompts)


def read_cross_encoder_activation(place: Location) -> Any:
    """Returns the name of the activation that a folder of a cross-encoder has in its own file; None if it has none.

    Raises:
        CheckpointError: The file is damaged, or has a default prompt, which is not implemented.
    """
    settings = _cross_encoder_settings(place)
    if settings.get("default_prompt_name") is not None:
        raise CheckpointError(
            f"{place}/{SETTINGS}: default_prompt_name, a text in front of pairs, is not implemented; make it null, and "
            "put the text in front of the queries"
        )
    return settings.get("activation_fn")


def read_cross_encoder_texts(place: Location) -> TextSettings:
    """Reads the length limit of a cross-encoder of sentence-transformers, which cuts texts and pairs.

    Raises:
        CheckpointError: A file is damaged.
    """
    return TextSettings(max_tokens=_tokenizer_limit([place])) if _cross_encoder_settings(place) else TextSettings()


def _cross_encoder_settings(place: Location) -> dict[str, Any]:
    settings = read_json_object(place / SETTINGS)
    return settings if settings.get("model_type") == "CrossEncoder" else {}


def _tokenizer_limit(folders: Sequence[Location]) -> int | None:
    """Returns the limit in the tokenizer's own file, where sentence-transformers keeps it since version 5.

    Tokenizers without a limit have a huge number there.
    """
    file = next((file for file in (folder / "tokenizer_config.json" for folder in folders) if file.exists()), None)
    limit = None if file is None else read_json_object(file).get("model_max_length")
    return limit if type(limit) is int and 1 <= limit <= MAX_TOKENS else None


def _read_prompts(place: Location) -> dict[str, str]:
    """Returns the prompts of a model by name."""
    prompts = read_json_object(place / SETTINGS).get("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise CheckpointError(f"{place}/{SETTINGS}: prompts must map names to texts; got {quote(prompts)}")
    return {str(name): text for name, text in prompts.items() if text is not None}


def _default_prompt(place: Location, prompts: Mapping[str, str]) -> str:
    name = read_json_object(place / SETTINGS).get("default_prompt_name")
    if name is None:
        return ""
    if not isinstance(name, str) or name not in prompts:
        raise CheckpointError(
            f"{place}/{SETTINGS}: default_prompt_name is {quote(name)}, and prompts have no text of that name: "
            f"{quote(dict(prompts))}"
        )
    return prompts[name]


def _own_dimensions(place: Location, size: int) -> int | None:
    """Returns the number of elements that the folder has embeddings cut to; None if they stay whole."""
    dimensions = read_json_object(place / SETTINGS).get("truncate_dim")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise CheckpointError(
            f"{place}/{SETTINGS}: truncate_dim must be an integer of at least 1; got {quote(dimensions)}"
        )
    return dimensions if dimensions is None else min(dimensions, size)


def _similarity(place: Location) -> str:
    name = read_json_object(place / SETTINGS).get("similarity_fn_name")
    if name is None:
        return "cosine"
    if not isinstance(name, str) or name not in SIMILARITIES:
        raise CheckpointError(
            f"{place}/{SETTINGS}: similarity_fn_name is {quote(name)}; implemented are {', '.join(SIMILARITIES)}"
        )
    return name


def _fitting_dense(folder: Location, size: int, *, of_tokens: bool) -> Dense:
    dense = read_dense(folder, _read_config(folder), of_tokens=of_tokens)
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
        if kind in ("Pooling", "Dense", "LayerNorm") and not PurePosixPath(path).parts:
            raise CheckpointError(
                f"{place}/modules.json: the path of {kind} must name its own folder; got {quote(path)}"
            )
        modules.append((kind, place / path if path else place))
    return modules


def _read_pooling(folder: Location) -> tuple[tuple[str, ...], bool]:
    """Returns the pooling types that the config of a pooling module asks for, in the new form or the old one.

    Also returns whether the tokens of a prompt in front of a text are pooled too.
    """
    config = _read_config(folder)
    flags = {name.removeprefix("pooling_mode_"): on for name, on in config.items() if name.startswith("pooling_mode_")}
    modes: list[Any] = [name for name, on in flags.items() if on is True]
    if config.get("pooling_mode") is not None:
        given = config["pooling_mode"]
        modes = given if isinstance(given, list) else [given]
    elif not flags:
        modes = ["mean"]  # This is the default of sentence-transformers.
    named = [POOLING_MODES.get(_stem(mode), "") for mode in modes]
    if not all(named) or not named:
        asked = " and ".join(map(str, modes))[:100] or "no mode, all are off"
        raise CheckpointError(f"{folder} is to be pooled by {asked}; implemented are {', '.join(POOLING_MODES)}")
    # A list has its own order; the older flags have none.
    types = tuple(named) if "pooling_mode" in config else tuple(name for name in POOLING_TYPES if name in named)
    return types, config.get("include_prompt") is not False


def _stem(mode: Any) -> str:
    return str(mode).removesuffix("_tokens").removesuffix("_token")

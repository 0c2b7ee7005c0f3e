"""From a config to a model: finds the family of an architecture, builds its decoder, loads its weights."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..parallel.context import SINGLE, ParallelContext
from ..storage import Location
from ..weights.checkpoint import load_dummy_weights, load_weights
from ..weights.model_slots import weight_slots
from ..weights.sharded_state import load_sharded_state
from . import families
from .decoder import Decoder
from .family import Family
from .hf_config import load_hf_config, positive_int
from .options import DEFAULT_OPTIONS, ModelOptions
from .spec import DecoderSpec

__all__ = [
    "build_model",
    "describe_model",
    "find_family",
    "load_hf_config",
    "load_model",
    "names_in_checkpoint",
    "supported_architectures",
]

CAUSAL, CLASSIFIER, BARE = "ForCausalLM", "ForSequenceClassification", "Model"
"""How the names of architectures end: a family's model with a head that generates, one that classifies, with none."""


def supported_architectures() -> list[str]:
    """Returns the names that the `architectures` of a config may hold, those of models that generate."""
    return sorted(name for name in _families() if name.endswith(CAUSAL))


def describe_model(hf_config: Any) -> DecoderSpec:
    """Returns the spec of the model that a config describes.

    Raises:
        UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
    """
    spec = find_family(hf_config).spec(hf_config)
    if hf_config.architectures[0].endswith(CLASSIFIER):
        return replace(spec, num_labels=positive_int(hf_config, "num_labels"))
    return spec


def build_model(
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    options: ModelOptions = DEFAULT_OPTIONS,
    parallel: ParallelContext = SINGLE,
) -> Decoder:
    """Builds the model a config describes, without weights: their memory is not initialised.

    Args:
        hf_config: A transformers config, as `load_hf_config` returns it.
        dtype: Of weights and activations.
        device: Where to build it.
        options: What the user chooses about it.
        parallel: This rank, which gets its part.

    Raises:
        UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
    """
    spec = describe_model(hf_config)
    build = find_family(hf_config).build
    return build(spec, dtype=dtype, device=torch.device(device), options=options, parallel=parallel)


def load_model(
    folder: str | Path | Location,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    options: ModelOptions = DEFAULT_OPTIONS,
    parallel: ParallelContext = SINGLE,
) -> Decoder:
    """Builds the decoder a config describes, on its device, and streams the folder's weights into it.

    Args:
        folder: Holds the weights, here or behind a URL; not read if they are to be dummies.
        hf_config: A transformers config, as `load_hf_config` returns it.
        dtype: Of weights and activations; the checkpoint's tensors are cast.
        device: Where to build it.
        options: What the user chooses about it.
        parallel: This rank, which gets its part and reads no other.

    Raises:
        UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
        CheckpointError: The weights are missing, damaged, or do not match the config.
    """
    model = build_model(hf_config, dtype, device, options, parallel)
    if options.load_format == "dummy":
        load_dummy_weights(model)
    elif options.load_format == "sharded_state":
        load_sharded_state(model, folder, parallel)
    else:
        elsewhere = names_in_checkpoint(hf_config, dtype, options) if parallel.num_ranks > 1 else set()
        load_weights(model, folder, find_family(hf_config).weights, elsewhere | options.unused_weights)
    model.pack()
    return model.eval()


def names_in_checkpoint(hf_config: Any, dtype: torch.dtype, options: ModelOptions = DEFAULT_OPTIONS) -> set[str]:
    """Returns our names of all weights of a model, whatever rank has them: those of the whole, made without memory."""
    return set(weight_slots(build_model(hf_config, dtype, "meta", options)))


def find_family(hf_config: Any) -> Family:
    """Returns the family of a config's architecture.

    Raises:
        UnsupportedModelError: There is none.
    """
    names = getattr(hf_config, "architectures", None) or []
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "config field 'quantization_config' is set; quantised checkpoints cannot be loaded yet, use the "
            "unquantised model"
        )
    known = _families()
    family = known.get(names[0]) if names else None
    if family is None:
        near = difflib.get_close_matches(names[0], known, n=1, cutoff=0.4) if names else []
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UnsupportedModelError(
            f"architectures={list(names)} is not supported; supported are {', '.join(supported_architectures())}, and "
            f"their kin that end in {CLASSIFIER} and {BARE}{hint}"
        )
    return family


def _variants(family: Family) -> list[str]:
    stems = [architecture.removesuffix(CAUSAL) for architecture in family.architectures]
    return [stem + ending for stem in stems for ending in (CAUSAL, CLASSIFIER, BARE)]


@functools.cache
def _families() -> Mapping[str, Family]:
    """Collects `FAMILIES` of every module in `families/`, by architecture."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        for family in module.FAMILIES:
            for architecture in _variants(family):
                if architecture in found:
                    raise ValueError(f"{architecture} is described twice; the second time in {module.__name__}")
                found[architecture] = family
    return found

"""`load_model`: finds the family of a config's architecture, builds its decoder, and loads its weights."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..device import memory_bytes, return_freed_memory
from ..errors import MAX_KEY_CHARS, ConfigError, UnsupportedModelError, quote
from ..gguf.files import find_gguf
from ..gguf.header import read_headers
from ..gguf.names import gguf_weight_map
from ..gguf.tensors import log_dequantisation
from ..parallel.context import SINGLE, ParallelContext
from ..quantization.registry import find_format
from ..storage import Location
from ..weights.checkpoint import Join, WeightMap, fill_slots, load_dummy_weights, match_weights
from ..weights.model_slots import weight_slots
from ..weights.sharded_state import load_sharded_state
from . import families
from .decoder import Decoder
from .family import CLASSIFIER, NUM_REWARDS, TOKEN_CLASSIFIER, Family
from .hf_config import load_hf_config, positive_int, quantization_settings
from .model_code import model_code
from .options import DEFAULT_OPTIONS, ModelOptions
from .spec import DecoderSpec

__all__ = [
    "build_model",
    "describe_model",
    "find_family",
    "iter_families",
    "load_hf_config",
    "load_model",
    "names_in_checkpoint",
    "supported_architectures",
    "weight_map",
]

logger = logging.getLogger(__name__)

CAUSAL, BARE = ("ForCausalLM", "LMHeadModel"), "Model"
"""Endings of the names of architectures: with a head that generates, and without a head."""

CLASSIFIERS = (CLASSIFIER, TOKEN_CLASSIFIER)
"""Endings of the names of architectures with a head that classifies."""

PRETRAINED = ("ForMaskedLM", "ForPreTraining")
"""Endings of the names of encoders that still have the head of their training, which nothing uses."""

ALONE = ("EncoderModel", *CLASSIFIERS)
"""Endings of the names of architectures that stand for themselves in a family: none has a name with another ending."""

CAUSAL_VALUES = {"is_causal": True, "use_bidirectional_attention": False}
"""Fields of configs that may turn causal attention off -> the value that leaves it on, as null and absence do."""


def supported_architectures() -> list[str]:
    """Returns the names of the supported architectures as families give them: decoders that generate, and encoders."""
    return sorted(name for _, family in iter_families() for name in family.architectures)


def describe_model(hf_config: Any) -> DecoderSpec:
    """Returns the spec of the model that a config describes.

    Raises:
        UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
    """
    family = find_family(hf_config)
    spec = family.spec(hf_config)
    if _is_bidirectional(hf_config) and not spec.is_encoder:
        spec = replace(spec, attention=replace(spec.attention, causal=False), windows=_both_ways(hf_config, spec))
    ending = next((ending for ending in family.heads if hf_config.architectures[0].endswith(ending)), None)
    if ending is None:
        return spec
    num_labels = NUM_REWARDS.get(ending) or positive_int(hf_config, "num_labels")
    return replace(spec, num_labels=num_labels, class_head=family.head(ending, hf_config))


def build_model(
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    options: ModelOptions = DEFAULT_OPTIONS,
    parallel: ParallelContext = SINGLE,
) -> Decoder:
    """Builds the model that a config describes; the memory of its weights is not initialised.

    Args:
        hf_config: A transformers config, as `load_hf_config` returns it.
        dtype: Number type of weights and activations.
        device: Device of the model.
        options: The user's options for the model.
        parallel: The place of this rank among all ranks; only its part of the model is built.

    Raises:
        UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
        ConfigError: The device has too little memory for the model.
    """
    spec = describe_model(hf_config)
    build = find_family(hf_config).build
    try:
        return build(spec, dtype=dtype, device=torch.device(device), options=options, parallel=parallel)
    except RuntimeError as error:  # A size overflows, or the memory is full.
        raise ConfigError(
            f"the model that config.json describes cannot be built on {device}: {str(error)[:200]}; check the sizes in "
            "config.json, or use a smaller model"
        ) from error


def load_model(
    folder: str | Path | Location,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    options: ModelOptions = DEFAULT_OPTIONS,
    parallel: ParallelContext = SINGLE,
) -> Decoder:
    """Builds the decoder that a config describes, on its device, and fills it with the weights of a folder.

    Args:
        folder: Folder of the weights, or a GGUF file, on this machine or behind a URL; not read if `load_format` is
            `"dummy"`.
        hf_config: A transformers config, as `load_hf_config` returns it.
        dtype: Number type of weights and activations; the checkpoint's tensors are cast to it.
        device: Device of the model.
        options: The user's options for the model.
        parallel: The place of this rank among all ranks; only its part of the model is built and read.

    Raises:
        UnsupportedModelError: The architecture, or a value of a config field, is not implemented.
        ConfigError: The model does not fit into the memory of the device.
        CheckpointError: The weights are missing, damaged, or do not match the config. Their shapes are compared before
            the memory of the model is allocated.
    """
    sketch = build_model(hf_config, dtype, "meta", options, parallel)
    _check_memory(sketch, torch.device(device))
    if options.load_format == "auto":
        elsewhere = names_in_checkpoint(hf_config, dtype, options) if parallel.num_ranks > 1 else set()
        names = elsewhere | options.unused_weights
        join: Join = options.stored.checkpoint_format.join if options.stored else iter
        weights = weight_map(folder, hf_config, dtype)
        if options.head_rows is not None:
            join = options.head_rows.after(join, weights)
        sources = match_weights(weight_slots(sketch), folder, weights, names, join)
    model = build_model(hf_config, dtype, device, options, parallel)
    if options.load_format == "dummy":
        load_dummy_weights(model)
    elif options.load_format == "sharded_state":
        load_sharded_state(model, folder, parallel)
    else:
        fill_slots(weight_slots(model), sources)
    if torch.device(device).type == "cpu":
        return_freed_memory()
    model.pack()
    return model.eval()


def _check_memory(sketch: Decoder, device: torch.device) -> None:
    """Raises if a model, which is on the meta device, cannot fit into the memory of a device."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*sketch.parameters(), *sketch.buffers())}
    needed, most = sum(tensors.values()), memory_bytes(device)
    if needed > most:
        raise ConfigError(
            f"the model that config.json describes takes {needed / 2**20:,.0f} MiB, and {device} has "
            f"{most / 2**20:,.0f} MiB; check the sizes in config.json (max_position_embeddings too, for which a table "
            "is made), or use a smaller model or more ranks"
        )


def names_in_checkpoint(hf_config: Any, dtype: torch.dtype, options: ModelOptions = DEFAULT_OPTIONS) -> set[str]:
    """Returns our names of all weights of a model, including the weights that other ranks load."""
    return set(weight_slots(build_model(hf_config, dtype, "meta", options)))


def weight_map(folder: str | Path | Location, hf_config: Any, dtype: torch.dtype) -> WeightMap:
    """Returns the names of a model's weights in a folder or a GGUF file.

    Args:
        folder: As in `load_model`.
        hf_config: As in `load_model`.
        dtype: As in `load_model`; a line of log names it for a GGUF file.

    Raises:
        UnsupportedModelError: The architecture is not implemented.
        CheckpointError: The GGUF file is damaged.
    """
    weights = find_family(hf_config).weight_map(describe_model(hf_config))
    files = find_gguf(folder if isinstance(folder, Location) else Location.at(folder))
    if not files:
        return weights
    if model_code(hf_config).fallback is not None:
        raise UnsupportedModelError(
            f"{hf_config.architectures[0]} would run as a module of transformers, and a GGUF file is read for our own "
            "families only; use the model's folder of safetensors, or model_impl='auto'"
        )
    header = read_headers(files)
    log_dequantisation(header, dtype)
    return gguf_weight_map(header.architecture, weights)


def find_family(hf_config: Any) -> Family:
    """Returns the family of a config's architecture.

    Raises:
        UnsupportedModelError: The architecture or the format of the checkpoint is not supported.
    """
    names = getattr(hf_config, "architectures", None) or []
    impl = model_code(hf_config).impl
    family = _families().get(names[0]) if names and impl != "transformers" else None
    find_format(quantization_settings(hf_config))  # Raises if the format of a quantised checkpoint is not implemented.
    if family is None and impl != "millrace":
        family = _fallback(names, hf_config)
    if family is None:
        raise _unsupported(names, impl)
    return family


def _fallback(names: Sequence[str], hf_config: Any) -> Family | None:
    """Returns the family of a model that runs as a module of transformers, or of its folder; None if there is none."""
    from .fallback import find_module_class

    code = model_code(hf_config)
    endings = (CAUSAL[0], *CLASSIFIERS, *PRETRAINED, BARE)
    if code.fallback is None and names and names[0].endswith(endings) and not _is_old_decoder(names[0]):
        auto_map = getattr(hf_config, "auto_map", None)
        trusts = code.trust_remote_code
        module_class = find_module_class(names[0], auto_map, code.folder, trust_remote_code=trusts)
        if module_class is not None:
            code.fallback = _try_module(module_class, hf_config, code.impl)
            is_encoder = code.fallback.spec(hf_config).is_encoder
            how = "text by text" if is_encoder else "on the paged attention of this engine"
            logger.info("%s runs as a module of transformers, %s", names[0], how)
    return code.fallback


def _is_old_decoder(architecture: str) -> bool:
    """Returns whether a name is that of a decoder whose class is not called ForCausalLM; encoders have another one."""
    return architecture.endswith(CAUSAL[1]) and not architecture.endswith("WithLMHeadModel")


def _try_module(module_class: Any, hf_config: Any, impl: str) -> Family:
    """Returns the family of a module, or raises why it cannot run; the error also names our own families."""
    from .fallback import fallback_family

    try:
        return fallback_family(module_class, hf_config)
    except UnsupportedModelError as error:
        raise _unsupported(hf_config.architectures, impl, reason=str(error)) from error


def _unsupported(names: Sequence[str], impl: str, reason: str = "") -> UnsupportedModelError:
    """Returns the error about an architecture that nothing here can run; it names those that run, and the nearest."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as OTHERS

    known = [*_families(), *(name for name in OTHERS.values() if name.endswith(CAUSAL[0]) and impl != "millrace")]
    near = difflib.get_close_matches(names[0][:MAX_KEY_CHARS], known, n=1, cutoff=0.4) if names else []
    hint = f"; the nearest is {near[0]}" if near else ""
    more = "" if impl == "millrace" else ", and models of transformers whose layers use its attention interface"
    return UnsupportedModelError(
        f"{reason or f'architectures={quote(list(names))} is not supported with model_impl={impl!r}'}; supported are "
        f"{', '.join(supported_architectures())}, and the same names with the endings {CLASSIFIER} and {BARE}"
        f"{more}{hint}"
    )


def _is_bidirectional(hf_config: Any) -> bool:
    """Returns whether the config asks for attention to later tokens, under either name that configs have for it."""
    fields = {name: getattr(hf_config, name, None) for name in CAUSAL_VALUES}
    for name, value in fields.items():
        if value is not None and not isinstance(value, bool):
            raise UnsupportedModelError(f"config field {name!r} is {quote(value)}; it must be true or false")
    return any(value is not None and value is not CAUSAL_VALUES[name] for name, value in fields.items())


def _both_ways(hf_config: Any, spec: DecoderSpec) -> tuple[int, ...]:
    """Returns the windows of a decoder that attends to later tokens, as transformers understands them.

    `sliding_window` counts the token itself in the configs of Gemma, which have halved it, and not in others.
    """
    more = 0 if getattr(hf_config, "use_bidirectional_attention", None) else 1
    return tuple(window + more if window else 0 for window in spec.windows)


def _variants(family: Family) -> list[str]:
    found = []
    for architecture in family.architectures:
        if architecture.endswith(ALONE):
            found.append(architecture)
            continue
        ending = next(ending for ending in (*CAUSAL, BARE) if architecture.endswith(ending))
        others = PRETRAINED if ending == BARE else (BARE,)
        found += [architecture.removesuffix(ending) + each for each in (ending, *family.heads, *others)]
    return found


def iter_families() -> Iterator[tuple[str, Family]]:
    """Yields each family with the name of its file, from the constants `FAMILIES` of all modules in `families/`."""
    for info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        yield from ((info.name, family) for family in module.FAMILIES)


@functools.cache
def _families() -> Mapping[str, Family]:
    """Returns architecture name -> family."""
    found: dict[str, Family] = {}
    for name, family in iter_families():
        for architecture in _variants(family):
            if architecture in found:
                raise ValueError(f"{architecture} is described twice; the second time in {name}.py")
            found[architecture] = family
    return found

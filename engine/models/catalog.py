"""`model_catalog`: all families with their architectures and what runs for each, derived from the registry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError
from ..quantization.registry import scheme_names
from .family import Family
from .registry import iter_families
from .spec import DecoderSpec

__all__ = ["CatalogEntry", "model_catalog"]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One family of models.

    Attributes:
        name: Name of the file of the family, e.g. `qwen`.
        architectures: Its architectures, as `architectures` of a config.json names them.
        layers: What its layers are made of, in the default config of transformers, if that can be used.
        runs: Name of each feature -> whether or how it runs.
    """

    name: str
    architectures: tuple[str, ...]
    layers: str
    runs: dict[str, str]


def model_catalog() -> list[CatalogEntry]:
    """Returns an entry for each family, sorted by name and architecture."""
    entries = [_entry(name, family) for name, family in iter_families()]
    return sorted(entries, key=lambda entry: (entry.name, entry.architectures))


def _entry(name: str, family: Family) -> CatalogEntry:
    spec = _default_spec(family)
    layers = "as config.json says" if spec is None else ", ".join(_traits(spec))
    return CatalogEntry(name, family.architectures, layers, _features(family, spec))


def _default_spec(family: Family) -> DecoderSpec | None:
    """Returns the spec of a family's default config; None if transformers has no usable default for it."""
    config = _default_config(family.architectures[0])
    if config is None:
        return None
    try:
        return family.spec(config)
    except UnsupportedModelError:
        return None


def _default_config(architecture: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    decoders, encoders = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_MAPPING_NAMES
    # Of two model types with one architecture, the last is that of the text model alone.
    for model_type, name in reversed([*encoders.items(), *decoders.items()]):
        if name == architecture:
            # The default token ids may lie outside of the default vocabulary, of which transformers would warn.
            return AutoConfig.for_model(model_type, bos_token_id=0, eos_token_id=0)
    return None


def _traits(spec: DecoderSpec) -> Iterator[str]:
    """Yields a few words for each part in which models differ most."""
    if spec.is_encoder:
        yield "encoder"
    if spec.state is not None:
        yield "states"
    if spec.latent is not None:
        yield "latents"
    elif any(spec.windows):
        yield "windows" if all(spec.windows) else "full attention and windows"
    else:
        yield "full attention"
    if spec.attention.sinks:
        yield "sinks"
    if any(spec.rope_of(layer) is not None for layer in range(spec.num_layers)):
        yield "rotary positions"
    if spec.position_offset is not None:
        yield "learned positions"
    if spec.attention.alibi_slopes:
        yield "ALiBi"
    if spec.attention.relative_bias is not None:
        yield "relative bias"
    if spec.experts is not None:
        router = spec.experts.router
        yield f"{router.num_choices} of {router.num_experts} experts"


def _features(family: Family, spec: DecoderSpec | None) -> dict[str, str]:
    has_classifier = spec is None or spec.is_encoder or "score" in family.weight_map(spec).modules.values()
    return {
        "TP": "yes",
        "PP": "yes",
        "prefix cache": _prefix_cache(spec),
        "quantization": ", ".join(scheme_names()),
        "LoRA": _adapters(spec),
        "pooling": "embed, classify" if has_classifier else "embed",
    }


def _adapters(spec: DecoderSpec | None) -> str:
    """Returns which layers adapters can change."""
    if spec is None:
        return "yes, except experts"
    parts = [("experts", spec.experts), ("keys and values of latents", spec.latent)]
    excepted = [name for name, has_it in parts if has_it is not None]
    return f"yes, except {' and '.join(excepted)}" if excepted else "yes"


def _prefix_cache(spec: DecoderSpec | None) -> str:
    if spec is None:
        return "yes, unless layers keep states"
    if spec.is_encoder:
        return "no, encoder"
    return "yes" if spec.state is None else "no, states"

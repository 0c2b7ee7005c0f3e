"""`load_reference`: the model with which the check compares, as transformers loads it, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config import EngineConfig
from ..device import Device
from ..errors import ConfigError, MillraceError, UnsupportedModelError, quote
from ..gguf.files import find_gguf
from ..loading.hub import HubSettings
from ..loading.model_source import locate_model, resolve_model, resolve_tokenizer
from ..models import load_hf_config
from ..storage import Location

__all__ = ["load_reference", "local_file_or_folder", "reference_hub"]

MAX_REASON_CHARS = 500
"""Most characters of an error message of transformers that are shown."""


def local_file_or_folder(model: str, hub: HubSettings) -> Location:
    """Returns where a model is, with its weights: a folder, or a GGUF file.

    Raises:
        ConfigError: The model is behind a URL, or a GGUF model of several files: transformers reads neither.
    """
    place = locate_model(model, hub)
    if not place.is_local:
        raise ConfigError(f"{quote(model)} is behind a URL, and transformers reads local folders; copy the model first")
    if len(find_gguf(place)) > 1:
        raise ConfigError(f"{quote(model)} is split, and transformers reads GGUF models of one file; merge its parts")
    return place


def reference_hub(config: EngineConfig, reference: str | None) -> HubSettings:
    """Returns the settings of the download of a reference; None is the model itself."""
    return config.hub if reference is None else HubSettings(None, config.download_dir)


def load_reference(config: EngineConfig, reference: str | None) -> tuple[Any, Any]:
    """Loads a causal language model in float32, with the overrides and the trust of the engine's settings.

    Args:
        config: The settings of the engine.
        reference: The model, where it is not that of the settings.

    Returns:
        The model and the tokenizer of transformers.

    Raises:
        UnsupportedModelError: transformers cannot load the model.
    """
    model, hub = reference or config.model, reference_hub(config, reference)
    place = local_file_or_folder(model, hub)
    hf_config = load_hf_config(resolve_model(model, hub), config.hf_overrides, **config.model_code)
    # Falcon's eager attention in transformers adds ALiBi twice, to the mask and to the scores.
    attention = "sdpa" if getattr(hf_config, "alibi", False) else "eager"
    options = {"dtype": torch.float32, "attn_implementation": attention, "trust_remote_code": config.trust_remote_code}
    try:
        load = _load_gguf if find_gguf(place) else _load_folder
        loaded = load(place, hf_config, options).eval()
        tokenizer = _load_tokenizer(config, model, hub, place)
    except MillraceError:
        raise
    except Exception as error:  # Models and tokenizers raise errors of many types.
        raise UnsupportedModelError(
            f"transformers cannot load {quote(model)}, so there is nothing to compare with: "
            f"{type(error).__name__}: {str(error)[:MAX_REASON_CHARS]}"
        ) from error
    return loaded.to(Device.choose(config.device).torch_device), tokenizer


def _load_folder(place: Location, hf_config: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place.url, config=hf_config, **options)


def _load_gguf(place: Location, hf_config: Any, options: dict[str, Any]) -> Any:
    """Loads a GGUF file as `from_pretrained` does, which asks for the package accelerate and does not need it here."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_config(hf_config, **options)
    tensors = load_gguf_checkpoint(place.url, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    if unexpected or not tied.issuperset(missing):
        raise ValueError(f"it reads no {sorted(set(missing) - tied)[:3]}, and does not know {unexpected[:3]}")
    model.tie_weights()
    return model


def _load_tokenizer(config: EngineConfig, model: str, hub: HubSettings, place: Location) -> Any:
    from transformers import AutoTokenizer

    trust = {"trust_remote_code": config.trust_remote_code}
    if config.tokenizer is not None:
        return AutoTokenizer.from_pretrained(resolve_tokenizer(config.tokenizer, config.tokenizer_hub), **trust)
    if find_gguf(place):
        path = Path(place.url)
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **trust)
    return AutoTokenizer.from_pretrained(resolve_model(model, hub), **trust)

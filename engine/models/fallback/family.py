"""`fallback_family`: the family of one model that runs as a module of transformers, described by a trial."""

from __future__ import annotations

import functools
from typing import Any

from ...errors import UnsupportedModelError, quote
from ..family import Family
from ..hf_config import positive_int
from ..spec import DecoderSpec
from .attention import register
from .build import build_trial_module
from .encoder import POSITION_FIELDS, encoder_family
from .layer_form import Survey
from .model import TransformersModel
from .text_row import MOVING_ROPES
from .trial import survey_module
from .weights import ModuleWeights, declare_slots

__all__ = ["fallback_family"]


def fallback_family(module_class: Any, hf_config: Any) -> Family:
    """Returns the family of one model that runs as a module of transformers.

    A module runs with a paged cache if it can. Others that generate no text run as encoders, which compute texts whole.

    Args:
        module_class: Class of the module.
        hf_config: The transformers config of the model.

    Raises:
        UnsupportedModelError: The module can run in neither way.
    """
    try:
        return _family(module_class, hf_config)
    except UnsupportedModelError:
        if _generates(module_class.__name__):
            raise
        return encoder_family(module_class, hf_config)
    except Exception as error:  # The classes of configs and modules raise anything.
        raise UnsupportedModelError(
            f"{module_class.__name__} of transformers cannot run here: {error!r:.300}"
        ) from error


def _generates(name: str) -> bool:
    """Returns whether a class makes the logits of next tokens; `WithLMHeadModel` is also the ending of encoders."""
    return name.endswith(("ForCausalLM", "LMHeadModel")) and not name.endswith("WithLMHeadModel")


def _family(module_class: Any, hf_config: Any) -> Family:
    _check_rope(hf_config.get_text_config())
    _check_classifier(module_class)
    register()
    module: Any = build_trial_module(module_class, hf_config)
    declare_slots(module)
    weights = ModuleWeights.of(module, module.base_model)
    survey = survey_module(module, positive_int(hf_config.get_text_config(), "num_hidden_layers"))
    spec = _spec(hf_config.get_text_config(), survey)
    build = functools.partial(TransformersModel, module_class=module_class, hf_config=hf_config, survey=survey)
    return Family((module_class.__name__,), lambda _: spec, weights, build)


def _spec(config: Any, survey: Survey) -> DecoderSpec:
    """Returns what the engine needs to know of a model; the fields of which only a `Decoder` is made are neutral."""
    return DecoderSpec(
        vocab_size=survey.vocab_size,
        hidden_size=survey.hidden_size,
        intermediate_size=survey.hidden_size,
        num_layers=len(survey.layers),
        num_heads=max(layer.num_heads // layer.num_kv_heads for layer in survey.layers) * _most_kv_heads(survey),
        num_kv_heads=_most_kv_heads(survey),
        head_dim=max(max(layer.head_dim, layer.value_dim) for layer in survey.layers),
        max_position_embeddings=_max_positions(config),
        windows=tuple(layer.window for layer in survey.layers),
        embedding_size=survey.hidden_size,
        tie_word_embeddings=False,
        rms_norm=True,
        norm_eps=0.0,
        gated_mlp=True,
        activation="",
    )


def _most_kv_heads(survey: Survey) -> int:
    return max(layer.num_kv_heads for layer in survey.layers)


def _max_positions(config: Any) -> int:
    """Returns the number of positions for which a model was made, under whatever name its config has it."""
    name = next((name for name in POSITION_FIELDS if getattr(config, name, None) is not None), POSITION_FIELDS[0])
    return positive_int(config, name)


def _check_classifier(module_class: Any) -> None:
    """Raises if a classifier has another head than one linear layer, which reads the last token."""
    from transformers.modeling_layers import GenericForSequenceClassification

    name = module_class.__name__
    if name.endswith("ForSequenceClassification") and not issubclass(module_class, GenericForSequenceClassification):
        raise UnsupportedModelError(
            f"{name} of transformers has a head of its own; of classifiers that have no family here, only those with "
            "one linear layer run"
        )


def _check_rope(config: Any) -> None:
    """Raises if the rotary frequencies of a token depend on other sequences of its step."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *rope.values()]:
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in MOVING_ROPES:
            raise UnsupportedModelError(
                f"config field 'rope_parameters' is {quote(rope)}: with rope type {kind}, transformers takes the "
                "frequencies of all tokens from the longest sequence of a step, so the model cannot run as its module"
            )

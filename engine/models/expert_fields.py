"""Functions that read the fields of a config about experts, and check their values."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError, quote
from ..layers import EXPERT_GATES, RouterSpec
from .hf_config import flag, one_of, positive_float, positive_int

__all__ = ["corrected_router", "expert_counts", "expert_gate", "group_counts", "layer_numbers", "layers_after"]


def expert_counts(config: Any, field: str) -> dict[str, Any]:
    """Returns `num_experts` and `num_choices` of a `RouterSpec`.

    Args:
        config: A transformers config.
        field: Name of the field with the number of experts.

    Raises:
        UnsupportedModelError: A field is missing, or a token goes through more experts than there are.
    """
    num_experts, num_choices = positive_int(config, field), positive_int(config, "num_experts_per_tok")
    if num_choices > num_experts:
        raise UnsupportedModelError(
            f"config field 'num_experts_per_tok' is {num_choices}; it can be at most {field}={num_experts}"
        )
    return {"num_experts": num_experts, "num_choices": num_choices}


def group_counts(config: Any, counts: dict[str, Any]) -> dict[str, Any]:
    """Returns `num_groups` and `num_chosen_groups` of a `RouterSpec`, from the fields `n_group` and `topk_group`.

    Args:
        config: A transformers config.
        counts: The result of `expert_counts`.

    Raises:
        UnsupportedModelError: The groups do not divide the experts, or the best ones have fewer experts than a token
            goes through.
    """
    num_groups, num_chosen = positive_int(config, "n_group"), positive_int(config, "topk_group")
    num_experts, num_choices = counts["num_experts"], counts["num_choices"]
    if num_experts % num_groups:
        raise UnsupportedModelError(f"config field 'n_group' is {num_groups}; it must divide {num_experts} experts")
    if num_chosen > num_groups or num_chosen * (num_experts // num_groups) < num_choices:
        raise UnsupportedModelError(
            f"config field 'topk_group' is {num_chosen}; of n_group={num_groups} groups it must choose some that have "
            f"num_experts_per_tok={num_choices} experts together"
        )
    return {"num_groups": num_groups, "num_chosen_groups": num_chosen}


def corrected_router(config: Any, field: str = "n_routed_experts") -> RouterSpec:
    """Returns the router of DeepSeek-V3 and its followers: sigmoids with a correction, and groups of experts.

    Args:
        config: A transformers config.
        field: Name of the field with the number of experts.

    Raises:
        UnsupportedModelError: A field is missing, or the numbers contradict each other.
    """
    counts = expert_counts(config, field)
    groups = group_counts(config, counts)
    if groups["num_groups"] > 1 and counts["num_experts"] // groups["num_groups"] < 2:
        raise UnsupportedModelError("config field 'n_group' leaves one expert to a group, and two rank a group")
    return RouterSpec(
        **counts,
        **groups,
        num_group_scores=2,
        scores="sigmoid",
        correction=True,
        renormalise=flag(config, "norm_topk_prob", True),
        scale=positive_float(config, "routed_scaling_factor"),
    )


def layers_after(config: Any, field: str = "first_k_dense_replace") -> frozenset[int]:
    """Returns the numbers of the layers that follow as many dense ones as a field says.

    Args:
        config: A transformers config.
        field: The field's name.

    Raises:
        UnsupportedModelError: The field is not a number of layers.
    """
    num_dense, num_layers = getattr(config, field, None), config.num_hidden_layers
    if type(num_dense) is not int or not 0 <= num_dense <= num_layers:
        raise UnsupportedModelError(f"config field {field!r} is {quote(num_dense)}; it can be 0 to {num_layers} layers")
    return frozenset(range(num_dense, num_layers))


def expert_gate(config: Any, field: str = "hidden_act") -> str:
    """Returns the `gate` of an `ExpertsSpec`.

    Args:
        config: A transformers config.
        field: Name of the field with the activation.

    Raises:
        UnsupportedModelError: The activation is not implemented for experts.
    """
    return EXPERT_GATES[one_of(config, field, tuple(EXPERT_GATES))]


def layer_numbers(config: Any, field: str) -> frozenset[int]:
    """Returns a field that is a list of numbers of layers; empty if it is missing or null.

    Args:
        config: A transformers config.
        field: The field's name.

    Raises:
        UnsupportedModelError: The field is something else.
    """
    value = getattr(config, field, None)
    if value is None:
        return frozenset()
    if not isinstance(value, list | tuple) or not all(type(layer) is int for layer in value):
        raise UnsupportedModelError(f"config field {field!r} is {quote(value)}; it must be a list of integers")
    return frozenset(value)

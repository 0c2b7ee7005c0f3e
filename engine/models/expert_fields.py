"""Functions that read the fields of a config about experts, and check their values."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError, quote
from ..layers import EXPERT_GATES
from .hf_config import one_of, positive_int

__all__ = ["expert_counts", "expert_gate", "group_counts", "layer_numbers"]


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

"""`Router`: chooses the experts of each token, and the weights of their results.

All numbers are float32, because a small error of a score may choose another expert. So are the router's weights, which
are few: a row for each expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .linear import LinearBase

__all__ = ["Router", "RouterSpec", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """The way in which a router chooses experts, as data.

    A softmax over the chosen logits alone is the same as a softmax over all of them with `renormalise`.

    Attributes:
        num_experts: Number of experts of the layer.
        num_choices: Number of experts that each token goes through.
        scores: Function that turns the logits of a token into the scores of the experts.
        renormalise: Whether the weights of a token are its chosen scores divided by their sum; otherwise the scores.
        bias: Whether the logits have a bias.
        correction: Whether experts are chosen by the sum of their score and a learned correction. The correction is
            not part of the weights (DeepSeek-AI, 2024, arXiv:2412.19437).
        num_groups: Number of groups of neighbouring experts. The choice is among the experts of the best groups.
        num_chosen_groups: Number of groups that are the best.
        num_group_scores: Number of a group's highest scores whose sum ranks the group.
        min_total: Smallest number by which `renormalise` divides.
        scale: Factor on the weights.
    """

    num_experts: int
    num_choices: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    bias: bool = False
    correction: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    num_group_scores: int = 1
    min_total: float = 1e-20
    scale: float = 1.0


class Router(nn.Module):
    """Chooses experts by the scores that a linear layer gives them.

    Args:
        linear: Computes the logits, `[hidden_size] -> [num_experts]`, in float32.
        spec: The way to choose.
        device: Device of the correction. Its memory is not initialised.
    """

    def __init__(self, linear: LinearBase, spec: RouterSpec, *, device: torch.device) -> None:
        super().__init__()
        self.linear = linear
        self.spec = spec
        self._score = torch.softmax if spec.scores == "softmax" else sigmoid
        self.correction: nn.Parameter | None = None
        if spec.correction:
            correction = torch.empty(spec.num_experts, dtype=torch.float32, device=device)
            self.correction = nn.Parameter(correction, requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the experts of each token.

        Args:
            hidden: `[num_tokens, hidden_size]`, in the dtype of the model.

        Returns:
            The ids of the experts, `[num_tokens, num_choices]` int32, and their weights, of the same shape in float32.
        """
        spec = self.spec
        scores = self._score(self.linear(hidden.float()), -1)
        ranks = scores if self.correction is None else scores + self.correction
        expert_ids = self._without_lesser_groups(ranks).topk(spec.num_choices).indices
        weights = scores.gather(1, expert_ids)
        if spec.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=spec.min_total)
        return expert_ids.int(), weights * spec.scale

    def _without_lesser_groups(self, ranks: Tensor) -> Tensor:
        """Returns `ranks` with minus infinity for the experts of all groups but the best."""
        spec = self.spec
        if spec.num_chosen_groups == spec.num_groups:
            return ranks
        groups = ranks.unflatten(1, (spec.num_groups, -1))
        best = groups.topk(spec.num_group_scores).values.sum(-1).topk(spec.num_chosen_groups).indices
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=ranks.device).scatter(1, best, True)
        return groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)


def sigmoid(logits: Tensor, dim: int = -1) -> Tensor:
    """Returns the sigmoid of each element, rounded from float64 (`dim` is that of a softmax, and not used).

    On a CPU torch computes the last elements of a tensor with other instructions than the first ones. The float64
    results differ too little to be rounded to other numbers, so that an element does not depend on the others.
    """
    return logits.double().sigmoid().to(logits.dtype)

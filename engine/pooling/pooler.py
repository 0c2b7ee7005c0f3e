"""Turns the vector that the device gives into what its caller gets: `Pooler`, on the host.

Every request has its own parameters and a vector is small, so the parameters never go to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import PoolerConfig
from .params import PoolingParams

__all__ = ["Pooler", "class_activation", "normalize"]

Activation = Callable[[np.ndarray], np.ndarray]


def normalize(vector: np.ndarray) -> np.ndarray:
    """Scales a vector to length 1; a vector of zeros stays one."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of classes of which one is true."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of classes of which each may be true."""
    return 1 / (1 + np.exp(-logits))


def identity(logits: np.ndarray) -> np.ndarray:
    """Returns what it is given: a regression's numbers are no probabilities."""
    return logits


ACTIVATIONS: dict[str, Activation] = {
    "single_label_classification": softmax,
    "multi_label_classification": sigmoid,
    "regression": identity,
}
"""`problem_type` of a classifier's config -> what makes probabilities of its logits."""


def class_activation(hf_config: Any, num_labels: int) -> Activation:
    """Returns the function that makes probabilities of a classifier's logits, as its config says."""
    default = softmax if num_labels > 1 else sigmoid
    return ACTIVATIONS.get(getattr(hf_config, "problem_type", None) or "", default)


@dataclass(frozen=True, slots=True)
class Pooler:
    """How one engine ends a vector.

    Attributes:
        config: Settings for the requests that say nothing.
        activation: The last operation on an embedding or on logits, unless it is switched off.
    """

    config: PoolerConfig
    activation: Activation

    def finish(self, vector: np.ndarray, params: PoolingParams) -> np.ndarray:
        """Makes of a vector what a request asks for: first it is cut, then it is activated.

        Args:
            vector: `[size]` float32.
            params: Of the request.

        Returns:
            `[dimensions]` or `[size]` float32, of its own memory.
        """
        cut = vector[: params.dimensions or self.config.dimensions].astype(np.float32)
        is_on = self.config.use_activation if params.use_activation is None else params.use_activation
        return cut if is_on is False else self.activation(cut).astype(np.float32)

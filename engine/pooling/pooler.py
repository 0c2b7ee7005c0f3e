"""From the vector of a prompt to what its caller gets: `Pooler`, on the host.

The device gives the plain vector, and every request has its own parameters; a vector is small, so they are heeded here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import EngineConfig
from ..errors import ConfigError, PoolingParamsError
from ..loading.model_source import locate_model
from ..models import describe_model
from ..task import Task
from .config import PoolerConfig
from .params import PoolingParams
from .sentence_transformer import read_sentence_transformer

__all__ = ["Pooler"]

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


@dataclass(frozen=True, slots=True)
class Pooler:
    """How one engine pools.

    Attributes:
        task: ``"embed"`` or ``"classify"``.
        config: What requests get that say nothing.
        size: Numbers of a vector.
        activation: Ends an embedding or a classification, unless it is switched off.
        sizes: Dimensions the model was trained for; None where it does not say.
    """

    task: Task
    config: PoolerConfig
    size: int
    activation: Activation
    sizes: tuple[int, ...] | None = None

    @classmethod
    def choose(cls, config: EngineConfig, hf_config: Any, task: Task) -> Pooler:
        """Makes the pooler of an engine, from its settings and what the model's folder says.

        Args:
            config: Settings.
            hf_config: The model's config.
            task: ``"embed"`` or ``"classify"``.

        Raises:
            ConfigError: A setting does not fit the model.
            CheckpointError: The model's folder asks for a pooling that is not there.
        """
        own = PoolerConfig.read(config.pooler_config)
        spec = describe_model(hf_config)
        if task == "classify":
            if own.pooling_type == "MEAN" or own.dimensions is not None:
                raise ConfigError("pooler_config: a classifier reads the last token, and all of its classes are given")
            default = softmax if spec.num_labels > 1 else sigmoid
            activation = ACTIVATIONS.get(getattr(hf_config, "problem_type", None) or "", default)
            return cls(task, own, spec.num_labels, activation)
        pooling = own.over(read_sentence_transformer(locate_model(config.model)))
        sizes = getattr(hf_config, "matryoshka_dimensions", None)
        pooler = cls(task, pooling, spec.embedding_size, normalize, tuple(sizes) if sizes else None)
        if (problem := pooler.problem_of(pooling.dimensions)) is not None:
            raise ConfigError(f"pooler_config: {problem}")
        return pooler

    @property
    def takes_mean(self) -> bool:
        """Whether a vector is the mean over all tokens, so that each of them must be computed."""
        return self.config.pooling_type == "MEAN"

    def check(self, params: PoolingParams) -> None:
        """Checks what only the model can tell.

        Raises:
            PoolingParamsError: Another task, or dimensions that the model does not have.
        """
        if params.task not in (None, self.task):
            raise PoolingParamsError(f"task={params.task!r}, but this engine does {self.task!r}; construct another one")
        if self.task == "classify" and params.dimensions is not None:
            raise PoolingParamsError("dimensions are those of an embedding, and this engine classifies; drop them")
        if (problem := self.problem_of(params.dimensions)) is not None:
            raise PoolingParamsError(problem)

    def problem_of(self, dimensions: int | None) -> str | None:
        """Returns why an embedding cannot have so many dimensions; None if it can."""
        if dimensions is None:
            return None
        if self.sizes is not None and dimensions not in self.sizes:
            return (
                f"dimensions={dimensions}, but the model was trained for {', '.join(map(str, self.sizes))}; use these"
            )
        if dimensions > self.size:
            return f"dimensions={dimensions}, but the model's embeddings have {self.size}; use at most so many"
        return None

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

"""`Pooler`: shortens and normalises the vectors that the device has computed.

This happens on the host, because each request has its own parameters and a vector is small. Every function takes one
vector, `[size]`, or rows of them, `[num_rows, size]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError, quote
from .config import PoolerConfig
from .params import PoolingParams

__all__ = ["Pooler", "class_activation", "normalize"]

Activation = Callable[[np.ndarray], np.ndarray]


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors scaled to length 1; a vector of zeros is not changed."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of classes that exclude each other, from their logits; they sum to 1."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns the probability of each class, from its logit; the classes do not exclude each other."""
    return 1 / (1 + np.exp(-logits))


def identity(logits: np.ndarray) -> np.ndarray:
    """Returns the argument: the outputs of a regression are not turned into probabilities."""
    return logits


ACTIVATIONS: dict[str, Activation] = {
    "single_label_classification": softmax,
    "multi_label_classification": sigmoid,
    "regression": identity,
}
"""`problem_type` of a classifier's config -> the function that turns its logits into probabilities."""


ACTIVATIONS_BY_CLASS: dict[str, Activation] = {
    "Identity": identity,
    "Sigmoid": sigmoid,
    "Softmax": softmax,
    "Tanh": np.tanh,
}
"""Names of the classes of torch that a cross-encoder of sentence-transformers may name -> the functions."""


def class_activation(hf_config: Any, num_labels: int, named: Any = None) -> Activation:
    """Returns the function that turns a classifier's logits into probabilities.

    Args:
        hf_config: Config of the model. The activation of a cross-encoder of sentence-transformers chooses the function,
            or else `problem_type`.
        num_labels: Number of classes. If the config chooses none, one class uses `sigmoid` and several use `softmax`.
        named: Name of the class of torch that another file of the model's folder chooses; None if there is none.

    Raises:
        UnsupportedModelError: The activation of the cross-encoder is not implemented.
    """
    own = getattr(hf_config, "sentence_transformers", None)
    named = named or (own.get("activation_fn") if isinstance(own, Mapping) else None)
    named = named or getattr(hf_config, "sbert_ce_default_activation_function", None)
    if named is not None:
        name = str(named).rpartition(".")[2]
        if name not in ACTIVATIONS_BY_CLASS:
            raise UnsupportedModelError(
                f"the folder names the activation {quote(named)}; implemented are {', '.join(ACTIVATIONS_BY_CLASS)}"
            )
        return ACTIVATIONS_BY_CLASS[name]
    default = softmax if num_labels > 1 else sigmoid
    return ACTIVATIONS.get(getattr(hf_config, "problem_type", None) or "", default)


@dataclass(frozen=True, slots=True)
class Pooler:
    """The last operations of an engine on the vectors of a prompt.

    Attributes:
        config: Settings for requests whose parameters leave them open.
        activation: Function that normalises an embedding or turns logits into probabilities.
        steps: Functions that are applied to the vector of a prompt before, such as linear layers.
        token_steps: The same for the vectors of tokens.
    """

    config: PoolerConfig
    activation: Activation
    steps: tuple[Activation, ...] = ()
    token_steps: tuple[Activation, ...] = ()

    def finish(self, vector: np.ndarray, params: PoolingParams) -> np.ndarray:
        """Applies the steps, shortens the vector to the dimensions that a request asks for, and activates it if asked.

        Args:
            vector: `[size]` float32, as the device has computed it.
            params: Pooling parameters of the request.

        Returns:
            `[dimensions]` or `[size]` float32, which shares no memory with `vector`.
        """
        for step in self.steps:
            vector = step(vector)
        return self._activate(vector, params)

    def finish_tokens(self, vectors: np.ndarray, token_ids: Sequence[int], params: PoolingParams) -> np.ndarray:
        """Does the same with the vectors of all tokens of a prompt, of which a request may want some only.

        Args:
            vectors: `[num_tokens, size]` float32, as the device has computed them.
            token_ids: The tokens of the prompt.
            params: Pooling parameters of the request.

        Returns:
            `[num_rows, size]` float32, which shares no memory with `vectors`. There is a row for each token, or for
            each step tag.
        """
        tag = self.step_tag_id(params)
        if tag is not None:
            vectors = vectors[np.equal(token_ids, tag)]
        for step in self.token_steps:
            vectors = step(vectors)
        columns = self.config.returned_token_ids if params.returned_token_ids is None else params.returned_token_ids
        if columns is not None:
            vectors = vectors[:, list(columns)]
        return self._activate(vectors, params)

    def step_tag_id(self, params: PoolingParams) -> int | None:
        """Returns the token whose vectors a request wants, of those of all tokens; None if it wants all."""
        if params.step_tag_id is not None:
            return params.step_tag_id
        return self.config.step_tag_id if self.config.tok_pooling_type == "STEP" else None

    def _activate(self, vectors: np.ndarray, params: PoolingParams) -> np.ndarray:
        cut = vectors[..., : params.dimensions or self.config.dimensions].astype(np.float32)
        if self.config.logit_mean is not None:
            cut -= self.config.logit_mean
        if self.config.logit_sigma is not None:
            cut /= self.config.logit_sigma
        is_on = self.config.use_activation if params.use_activation is None else params.use_activation
        return cut if is_on is False else self.activation(cut).astype(np.float32)

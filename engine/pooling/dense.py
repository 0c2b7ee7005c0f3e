"""`Dense`: the linear layer after the pooling that models of sentence-transformers may have."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError, quote
from ..storage import Location

__all__ = ["Dense", "read_dense", "read_tensors"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "ReLU6": functional.relu6,
    "LeakyReLU": functional.leaky_relu,
    "ELU": functional.elu,
    "SELU": functional.selu,
    "CELU": functional.celu,
    "GELU": functional.gelu,
    "SiLU": functional.silu,
    "Mish": functional.mish,
    "Sigmoid": torch.sigmoid,
    "LogSigmoid": functional.logsigmoid,
    "Hardtanh": functional.hardtanh,
    "Hardsigmoid": functional.hardsigmoid,
    "Hardswish": functional.hardswish,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Tanhshrink": functional.tanhshrink,
}
"""Names of the classes of torch that a folder may name -> the functions that they compute."""

CONFIG_NAMES = ("module_input_name", "module_output_name")
"""Settings that may send a layer's input or output elsewhere than to the embedding."""

TARGETS = (None, "sentence_embedding")
"""Values of these settings in a folder that pools; without a pooling a layer changes the vectors of tokens too."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A linear layer with an activation, which the host applies to the vector of a prompt.

    Attributes:
        weight: `[out_features, in_features]` float32.
        bias: `[out_features]` float32; None for a layer without one.
        activation: Name of the activation, a key of `ACTIVATIONS`.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """Returns the layer's output, `[..., out_features]` float32, for vectors `[..., in_features]`."""
        with torch.inference_mode():
            projected = functional.linear(torch.from_numpy(vector.astype(np.float32)), self.weight, self.bias)
            return ACTIVATIONS[self.activation](projected).numpy()


def read_dense(place: Location, config: Mapping[str, Any], *, of_tokens: bool = False) -> Dense:
    """Reads a layer.

    Args:
        place: Folder of the layer.
        config: Content of its config.json.
        of_tokens: Whether the layer may be one of the vectors of tokens, because nothing pools them before it.

    Raises:
        CheckpointError: The weights are missing or damaged, or a setting of the layer is not implemented.
    """
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{place}: activation_function is {quote(activation)}; implemented are {', '.join(ACTIVATIONS)}"
        )
    targets = (*TARGETS, "token_embeddings") if of_tokens else TARGETS
    for name in CONFIG_NAMES:
        if config.get(name) not in targets:
            allowed = " and ".join(map(repr, targets[1:]))
            raise CheckpointError(f"{place}: {name} is {quote(config[name])}; implemented: {allowed}")
    if config.get("use_residual"):
        raise CheckpointError(f"{place}: use_residual, a layer that is added to its input, is not implemented")
    tensors = read_tensors(place)
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise CheckpointError(f"{place} must hold linear.weight and a bias that fits it; it holds {quote(shapes)}")
    return Dense(weight.float(), None if bias is None else bias.float(), activation)


def read_tensors(place: Location) -> dict[str, Tensor]:
    """Returns the weights in the folder of a module.

    Raises:
        CheckpointError: They are missing or damaged.
    """
    from safetensors.torch import load

    try:
        if (place / "model.safetensors").exists():
            return load((place / "model.safetensors").read_bytes())
        content = io.BytesIO((place / "pytorch_model.bin").read_bytes())
        return dict(torch.load(content, map_location="cpu", weights_only=True))
    except Exception as error:  # The readers of weights raise errors of many types for damaged files.
        raise CheckpointError(f"the weights of {place} cannot be read: {str(error)[:200] or error!r}") from error

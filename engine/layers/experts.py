"""`ExpertMLP`: the feed-forward networks of a layer of which each token goes through a few; `Experts`: their weights.

When ranks share the networks, each rank returns one addend: the result is the sum over the ranks. A rank has a slice of
every expert, or (expert parallelism) some experts as a whole. The code is the same: one of the two shards is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...kernels import experts
from ...kernels.experts import CodedMatrices
from ..parallel.shard import Shard
from .input_format import PLAIN, InputFormat
from .linear import LinearBase
from .mlp import MLP
from .router import Router, sigmoid
from .weight_slot import WeightSlot

__all__ = ["EXPERT_GATES", "ExpertMLP", "Experts", "ExpertsLayer", "FeedForward"]

EXPERT_GATES: Mapping[str, str] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Activations of gated experts, by their names in Hugging Face configs -> names of `kernels.experts.GATES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsLayer:
    """The description of the experts of a layer that a scheme is to make.

    Attributes:
        name: Path of the experts in the model, e.g. `layers.3.mlp.experts`.
        own: The experts of this rank.
        hidden_size: Size of the input and the output.
        inner: This rank's part of the width inside each expert.
        gate: Key of `kernels.experts.GATES`.
        bias: Whether the projections have biases.
        adds_down_bias: Whether this rank adds the bias of the down projection; of ranks with slices only one does.
        dtype: Number type of the inputs, the outputs and the biases.
        device: Device of the weights.
    """

    name: str
    own: Shard
    hidden_size: int
    inner: Shard
    gate: str
    bias: bool
    adds_down_bias: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections to the width inside an expert: their matrices are fused to w13, in this order."""
        return ("up",) if self.gate == "relu_squared" else ("gate", "up")


class Experts(nn.Module):
    """The weights of a layer's experts, of which a rank has some or a part of each, in the dtype of the model.

    Their memory is not initialised.

    Args:
        layer: The description of the experts.
        deterministic: Whether a token's result must not depend, to the bit, on the rest of the batch.
    """

    def __init__(self, layer: ExpertsLayer, *, deterministic: bool) -> None:
        super().__init__()
        self.layer = layer
        self.deterministic = deterministic
        self._hidden, self._inner = Shard(layer.hidden_size), layer.inner
        num_rows = len(layer.projections) * layer.inner.length
        self._add_matrices("w13", num_rows, layer.hidden_size)
        self._add_matrices("w2", layer.hidden_size, layer.inner.length)
        has_down_bias = layer.bias and layer.adds_down_bias
        self.w13_bias = self._parameter(num_rows, dtype=layer.dtype) if layer.bias else None
        self.w2_bias = self._parameter(layer.hidden_size, dtype=layer.dtype) if has_down_bias else None

    def _parameter(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        """Returns a parameter with a tensor of this shape for each expert of this rank."""
        numbers = torch.empty(self.layer.own.length, *shape, dtype=dtype, device=self.layer.device)
        return nn.Parameter(numbers, requires_grad=False)

    def _add_matrices(self, name: str, num_rows: int, num_columns: int) -> None:
        """Adds the parameters of the matrices `w13` or `w2` of all experts."""
        self.register_parameter(name, self._parameter(num_rows, num_columns, dtype=self.layer.dtype))

    def _matrices(self, name: str) -> Tensor | CodedMatrices:
        """Returns the matrices `w13` or `w2` of all experts, as `kernels.experts` takes them."""
        return self.get_parameter(name)

    def _matrix_slot(self, name: str, index: int, rows: slice) -> WeightSlot:
        """Returns a weight slot of some rows of the matrix of one of this rank's experts, without its shards."""
        return WeightSlot((self.get_parameter(name)[index, rows],))

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot), such as `7.gate.weight` for the gate of expert 7."""
        length = self._inner.length
        for index in range(self.layer.own.length):
            expert = self.layer.own.start + index
            for i, name in enumerate(self.layer.projections):
                rows = slice(i * length, (i + 1) * length)
                slot = self._matrix_slot("w13", index, rows)
                yield f"{expert}.{name}.weight", replace(slot, parts=(self._inner, self._hidden))
                if self.w13_bias is not None:
                    yield f"{expert}.{name}.bias", WeightSlot((self.w13_bias[index, rows],), parts=(self._inner,))
            slot = self._matrix_slot("w2", index, slice(None))
            yield f"{expert}.down.weight", replace(slot, parts=(self._hidden, self._inner))
            if self.w2_bias is not None:
                yield f"{expert}.down.bias", WeightSlot((self.w2_bias[index],))

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Runs each token through the experts of this rank that it goes through, and adds their weighted results up.

        Args:
            hidden: `[num_tokens, hidden_size]`.
            expert_ids: `[num_tokens, num_choices]` int32, among all experts of the layer.
            weights: `[num_tokens, num_choices]` float32.

        Returns:
            `[num_tokens, hidden_size]`, this rank's addend.
        """
        if self.layer.own.count > 1:
            # An expert of a lower rank gets a negative number, one of a higher rank a number behind the last expert.
            expert_ids = expert_ids - self.layer.own.start
        return experts(
            hidden,
            self._matrices("w13"),
            self._matrices("w2"),
            expert_ids,
            weights,
            gate=self.layer.gate,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            deterministic=self.deterministic,
        )


class ExpertMLP(nn.Module):
    """A router, the experts among which it chooses, and a network that every token goes through.

    Args:
        router: Chooses the experts of each token, alike on all ranks.
        experts: The experts.
        shared: The network of all tokens (elsewhere: shared expert); None for none.
        shared_gate: Projection to one logit, by whose sigmoid the result of `shared` is multiplied; None for 1.
    """

    def __init__(
        self, router: Router, experts: Experts, shared: MLP | None = None, shared_gate: LinearBase | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate

    @property
    def input_format(self) -> InputFormat:
        """The form in which the network reads its input: plain rows, which the router and the experts need."""
        return PLAIN

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the network's output (or this rank's addend) for `hidden`; both are `[num_tokens, hidden_size]`."""
        result = self.experts(hidden, *self.router(hidden))
        if self.shared is None:
            return result
        shared = self.shared(hidden)
        if self.shared_gate is not None:
            shared = shared * sigmoid(self.shared_gate(hidden))
        return result + shared


FeedForward: TypeAlias = MLP | ExpertMLP
"""Any feed-forward network of a decoder layer."""

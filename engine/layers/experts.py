"""`ExpertMLP`: the feed-forward networks of a layer of which each token goes through a few; `Experts`: their weights.

When ranks share the networks, each rank returns one addend: the result is the sum over the ranks. A rank has a slice of
every expert, or (expert parallelism) some experts as a whole. The code is the same: one of the two shards is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...kernels import experts
from ..parallel.shard import Shard
from .input_format import PLAIN, InputFormat
from .linear import LinearBase
from .mlp import MLP
from .router import Router, sigmoid
from .weight_slot import WeightSlot

__all__ = ["EXPERT_GATES", "ExpertMLP", "Experts", "FeedForward"]

EXPERT_GATES: Mapping[str, str] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Activations of gated experts, by their names in Hugging Face configs -> names of `kernels.experts.GATES`."""


class Experts(nn.Module):
    """The weights of a layer's experts, of which a rank has some or a part of each.

    Args:
        own: The experts of this rank.
        hidden_size: Size of the input and the output.
        inner: This rank's part of the width inside each expert.
        gate: Key of `kernels.experts.GATES`.
        bias: Whether the projections have biases.
        adds_down_bias: Whether this rank adds the bias of the down projection; of ranks with slices only one does.
        deterministic: Whether a token's result must not depend, to the bit, on the rest of the batch.
        dtype: Number type of all weights.
        device: Device of the weights. Their memory is not initialised.
    """

    def __init__(
        self,
        own: Shard,
        hidden_size: int,
        inner: Shard,
        *,
        gate: str,
        bias: bool,
        adds_down_bias: bool,
        deterministic: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.deterministic = deterministic
        self.own = own
        self._hidden, self._inner = Shard(hidden_size), inner
        self._projections = ("up",) if gate == "relu_squared" else ("gate", "up")
        num_rows = len(self._projections) * inner.length

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(own.length, *shape, dtype=dtype, device=device), requires_grad=False)

        self.w13 = make(num_rows, hidden_size)
        self.w2 = make(hidden_size, inner.length)
        self.w13_bias = make(num_rows) if bias else None
        self.w2_bias = make(hidden_size) if bias and adds_down_bias else None

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot), such as `7.gate.weight` for the gate of expert 7."""
        for index in range(self.own.length):
            expert, length = self.own.start + index, self._inner.length
            for i, name in enumerate(self._projections):
                rows = slice(i * length, (i + 1) * length)
                yield f"{expert}.{name}.weight", WeightSlot((self.w13[index, rows],), parts=(self._inner, self._hidden))
                if self.w13_bias is not None:
                    yield f"{expert}.{name}.bias", WeightSlot((self.w13_bias[index, rows],), parts=(self._inner,))
            yield f"{expert}.down.weight", WeightSlot((self.w2[index],), parts=(self._hidden, self._inner))
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
        if self.own.count > 1:
            # An expert of a lower rank gets a negative number, one of a higher rank a number behind the last expert.
            expert_ids = expert_ids - self.own.start
        return experts(
            hidden,
            self.w13,
            self.w2,
            expert_ids,
            weights,
            gate=self.gate,
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

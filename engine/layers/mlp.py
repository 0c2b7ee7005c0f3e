"""Feed-forward networks of a decoder layer: `GatedMLP` and `PlainMLP`.

When ranks share a network, each rank returns one addend: the result is the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from ...kernels import packed_gated_linear, silu_and_mul
from ...kernels.packed_gated_linear import can_pack_gated, pack_gated
from .activation import Activation
from .input_format import InputFormat, Rows
from .linear import GatedWeight, Linear, LinearBase

__all__ = ["MLP", "GatedMLP", "PlainMLP"]


class GatedMLP(nn.Module):
    """A gated network (Shazeer, 2020, arXiv:2002.05202): `down(activation(gate(x)) * up(x))`.

    Args:
        gate_up: The fused gate and up projections, `[hidden_size] -> [2 * intermediate_size]`.
        down: The down projection, `[intermediate_size] -> [hidden_size]`.
        gate: Maps the output of `gate_up` to `activation(gate(x)) * up(x)` in the form that `down` reads: a value of
            `down.input_format.gates`.
    """

    def __init__(self, gate_up: LinearBase, down: LinearBase, gate: Callable[[Tensor], Rows]) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.gate = gate
        self._packed: Tensor | None = None

    @property
    def input_format(self) -> InputFormat:
        """The form in which the network reads its input."""
        return self.gate_up.input_format

    def pack(self) -> None:
        """Packs the gate and up weights for a kernel that computes both products and the gate, if the CPU has one.

        `Decoder.pack` calls this before `pack` of the linear layers, which leaves `gate_up` as it is then.
        """
        layer = self.gate_up.plain
        if type(layer) is not Linear or self.gate is not silu_and_mul or layer.bias is not None or layer.weight is None:
            return
        if can_pack_gated(layer.weight):
            self._packed = pack_gated(layer.weight.detach())
            layer.pack_as(GatedWeight(self._packed))

    def forward(self, hidden: Rows) -> Tensor:
        """Returns the network's output (or this rank's addend) for `hidden`; both are `[num_tokens, hidden_size]`."""
        if self._packed is not None and not self.gate_up.is_adapted:  # Adapters are added before the activation.
            assert isinstance(hidden, Tensor)
            return self.down(packed_gated_linear(hidden, self._packed))
        return self.down(self.gate(self.gate_up(hidden)))


class PlainMLP(nn.Module):
    """Two projections with an activation between them: `down(activation(up(x)))`.

    Args:
        up: The up projection, `[hidden_size] -> [intermediate_size]`.
        down: The down projection, `[intermediate_size] -> [hidden_size]`.
        activation: A value of `ACTIVATIONS`, applied to each element.
    """

    def __init__(self, up: LinearBase, down: LinearBase, activation: Activation) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation

    @property
    def input_format(self) -> InputFormat:
        """The form in which the network reads its input."""
        return self.up.input_format

    def forward(self, hidden: Rows) -> Tensor:
        """Returns the network's output (or this rank's addend) for `hidden`; both are `[num_tokens, hidden_size]`."""
        return self.down(self.up.forward_activated(hidden, self.activation))


MLP: TypeAlias = GatedMLP | PlainMLP
"""Either feed-forward network."""

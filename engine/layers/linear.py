"""Linear layers: one matrix, made of one or more named row blocks.

Fusing (query, key and value; gate and up) is a matter of construction: the layer names its row blocks, and a loader
fills each through `slots` without knowing that they share a matrix. On CPU the matrix can be packed once, after
loading, into oneDNN's blocked layout, which is 1.1 to 5 times faster (docs/recipes/model.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .slots import Slot

__all__ = ["Linear"]


class Linear(nn.Module):
    """Computes `x W^T + b`.

    Args:
        in_features: Columns of W.
        out_features: Rows of W, or the sizes of its named row blocks in order, e.g. `{"gate": 512, "up": 512}`.
        bias: Whether there is a b.
        dtype: Of W and b, and of what goes in and out.
        device: Of W and b. Their memory is not initialised.
        weight_dtype: Of W, where a subclass stores it in another dtype; None for `dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._blocks = {} if isinstance(out_features, int) else dict(out_features)
        self._num_rows = out_features if isinstance(out_features, int) else sum(out_features.values())
        weight = torch.empty(self._num_rows, in_features, dtype=weight_dtype or dtype, device=device)
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(self._num_rows, dtype=dtype, device=device), requires_grad=False)
        self._packed: Tensor | None = None

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Yields every (name, slot) a checkpoint fills: `weight`, or `gate.weight` and `up.weight` of a fused layer."""
        for name, _ in self.named_parameters(recurse=False):
            if not self._blocks:
                yield name, self._slot(name, slice(None))
            first = 0
            for block, size in self._blocks.items():
                yield f"{block}.{name}", self._slot(name, slice(first, first + size))
                first += size

    def _slot(self, name: str, rows: slice) -> Slot:
        """Returns the slot of some rows of a parameter."""
        return Slot((self.get_parameter(name)[rows],))

    def pack(self) -> None:
        """Lays the weight out for oneDNN where that is supported, and lets go of the plain copy.

        Called once, after the last weight has been loaded. Does nothing on a device other than the CPU, or for a dtype
        in which this CPU has no oneDNN matrix product.
        """
        if self.weight is not None and _can_pack(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight.default(self.weight.detach())
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[..., in_features]` to `[..., out_features]` in the same dtype."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    """Says whether oneDNN can multiply by this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32

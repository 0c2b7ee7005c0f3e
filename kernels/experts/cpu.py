"""The experts of a layer on the CPU: compiled (`native.cpp`), or else one expert after the other in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import kernels_by_dtype
from ..invariant_linear import invariant_linear
from ..tape import empty
from .coded import KINDS, CodedMatrices, weight_of
from .op import GATES, experts

MAX_TOKENS = 512
"""Tokens of one call of the kernel. Its scratch memory stays small, and reading the weights again for the next tokens
takes little of the time of so many."""

MAX_ROWS = 64
"""Most rows of an expert, on average, for which the kernel is faster than products of a library in the same dtype."""

_KERNELS = kernels_by_dtype("experts", "P" + 2 * "PPPiii" + 7 * "P" + "l" + 6 * "i")
_KIND_OF_GATE = {name: kind for kind, name in enumerate(GATES)}
_KINDS = (*KINDS, "")  # The enum `Kind`; "" is a plain weight.
_STEP = 16


@experts.register("cpu")
def experts_cpu(
    hidden: Tensor,
    w13: Tensor | CodedMatrices,
    w2: Tensor | CodedMatrices,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    gate: str,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Runs `experts` in the compiled kernel, in which no token depends on the others, or else in torch."""
    kernel, is_plain = _KERNELS.get(hidden.dtype), isinstance(w13, Tensor) and isinstance(w2, Tensor)
    is_much = is_plain and expert_ids.numel() > MAX_ROWS * len(w13)
    is_for_a_library = is_much and not deterministic and _has_products(hidden.dtype)
    if kernel is None or hidden.stride(1) != 1 or is_for_a_library:
        linear = invariant_linear if deterministic else F.linear
        return _expert_by_expert(linear, hidden, (w13, w13_bias), (w2, w2_bias), expert_ids, weights, gate)
    (num_tokens, width), num_choices, size = hidden.shape, expert_ids.shape[1], w2.shape[2]
    max_tokens = min(num_tokens, MAX_TOKENS)
    rows = empty((max_tokens, -(-width // _STEP) * _STEP), torch.float32)
    inner = empty((max_tokens * num_choices, -(-size // _STEP) * _STEP), torch.float32)
    out = empty((num_tokens, width), hidden.dtype)
    tensors = (w13_bias, w2_bias, expert_ids.contiguous(), weights.contiguous(), rows, inner, out)
    sizes = (max_tokens, len(w13), num_choices, width, size, _KIND_OF_GATE[gate])
    matrices = (*_matrices(w13), *_matrices(w2))
    kernel(num_tokens, hidden.data_ptr(), *matrices, *map(_address, tensors), hidden.stride(0), *sizes)
    return out


def _matrices(matrices: Tensor | CodedMatrices) -> tuple[int, ...]:
    """Returns the fields of a `struct Matrices`."""
    if isinstance(matrices, Tensor):
        return (matrices.data_ptr(), 0, 0, _KINDS.index(""), 1, 0)
    addresses = map(_address, (matrices.codes, matrices.scales, matrices.zeros))
    return (*addresses, _KINDS.index(matrices.kind), matrices.group, matrices.scales.dtype == torch.uint8)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _has_products(dtype: torch.dtype) -> bool:
    """Returns whether this CPU multiplies numbers of a dtype without widening them first."""
    return dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()


def _expert_by_expert(
    linear: Callable[..., Tensor],
    hidden: Tensor,
    first: tuple[Tensor | CodedMatrices, Tensor | None],
    second: tuple[Tensor | CodedMatrices, Tensor | None],
    expert_ids: Tensor,
    weights: Tensor,
    gate: str,
) -> Tensor:
    """Runs the chosen experts one after the other, each on its tokens. `first` and `second` are weights and biases."""

    def of(expert: int, layer: tuple[Tensor | CodedMatrices, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        weight, bias = layer
        return weight_of(weight, expert, hidden.dtype), None if bias is None else bias[expert]

    out = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in set(expert_ids.unique().tolist()) & set(range(len(first[0]))):
        token, choice = torch.where(expert_ids == expert)
        gated = GATES[gate](linear(hidden[token], *of(expert, first)).float()).to(hidden.dtype)
        out.index_add_(0, token, linear(gated, *of(expert, second)).float() * weights[token, choice, None])
    return out.to(hidden.dtype)

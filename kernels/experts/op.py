"""The feed-forward networks of a layer of experts: the definition.

    out[t] = sum over j of  weights[t, j] · expert(expert_ids[t, j], hidden[t])

    expert(e, x) = w2[e] · gate(w13[e] · x + w13_bias[e]) + w2_bias[e]

A gate multiplies the second half of its input, `up`, by an activation of the first:

    silu                silu(gate) · up
    gelu, gelu_tanh     gelu(gate) · up, exact or by tanh
    clamped_swiglu      g · sigmoid(1.702 g) · (u + 1),   g = min(gate, 7),   u = max(-7, min(up, 7))
    relu_squared        max(x, 0)², of the whole input: a network without a gate

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017. The clamped
gate is that of gpt-oss (OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025), the square that of So et al., "Primer:
Searching for Efficient Transformers for Language Modeling", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Draw, Sample, op
from .coded import KINDS, CodedMatrices, weight_of


def _multiplied(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return activation(gate) * up


def _clamped_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate = gate.clamp(max=7)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7, 7) + 1)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


GATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": partial(_multiplied, F.silu),
        "gelu": partial(_multiplied, F.gelu),
        "gelu_tanh": partial(_multiplied, partial(F.gelu, approximate="tanh")),
        "clamped_swiglu": _clamped_swiglu,
        "relu_squared": _relu_squared,
    }
)
"""The function of each gate, on the results of w13. All halve the last dimension, except `relu_squared`."""


def _samples(draw: Draw) -> Iterator[Sample]:
    """Yields tokens, experts and choices of every kind. Experts and tokens that count for nothing hold NaN."""
    for gate in GATES:
        yield _sample(draw, gate, (7, 3, 2), (33, 20), gate=gate, is_biased=gate in ("clamped_swiglu", "gelu"))
    for tokens, num_experts, num_choices in ((1, 1, 1), (1, 64, 8), (63, 5, 3), (130, 2, 1)):
        name = f"{tokens} tokens, {num_choices} of {num_experts}"
        yield _sample(draw, name, (tokens, num_experts, num_choices), (64, 123))
    yield _sample(draw, "wide", (5, 4, 2), (500, 192), is_biased=True)
    yield _sample(draw, "no tokens", (0, 4, 2), (16, 8))
    every_other = _sample(draw, "every other row", (14, 4, 2), (40, 24))
    hidden, w13, w2, expert_ids, weights = every_other.args
    hidden[1::2] = torch.nan
    yield Sample(every_other.name, (hidden[::2], w13, w2, expert_ids[::2], weights[::2]), every_other.kwargs)
    alone = _sample(draw, "one expert, twice for each token", (20, 3, 2), (32, 16))
    alone.args[1][::2], alone.args[2][::2], alone.args[3][:] = torch.nan, torch.nan, 1
    yield alone
    yield from _coded_samples(draw)
    absent = _sample(draw, "experts of other ranks and padding", (20, 6, 4), (32, 16), is_biased=True)
    hidden, _, _, expert_ids, weights = absent.args
    expert_ids[:, 1], expert_ids[:, 2], expert_ids[9:, :] = -1, 6, -1
    weights[(expert_ids < 0) | (expert_ids >= 6)], hidden[9:] = torch.nan, torch.nan
    yield absent


def _coded_samples(draw: Draw) -> Iterator[Sample]:
    """Yields samples of every kind of code, with groups of all lengths; w13 and w2 need not be of the same kind."""
    yield _coded_sample(draw, "int4 with zeros", (63, 5, 3), (128, 96), (("int4", 32, True), ("int4", 96, True)))
    yield _coded_sample(draw, "int4 of a token", (1, 9, 2), (72, 40), (("int4", 72, False), ("int8", 40, False)))
    yield _coded_sample(draw, "int8", (7, 3, 2), (192, 33), (("int8", 64, True), ("int8", 33, False)))
    yield _coded_sample(draw, "e4m3 by row", (130, 2, 1), (123, 57), (("e4m3", 123, False), ("e4m3", 57, False)))
    yield _coded_sample(draw, "e4m3 by block", (5, 3, 2), (160, 136), (("e4m3", 128, False), ("e4m3", 128, False)))
    mxfp4 = (("e2m1", 32, False), ("e2m1", 32, False))
    yield _coded_sample(draw, "mxfp4", (17, 4, 2), (96, 64), mxfp4, gate="clamped_swiglu", is_biased=True)
    yield _coded_sample(draw, "mxfp4 without a gate", (3, 4, 2), (64, 48), mxfp4, gate="relu_squared")


def _coded_sample(
    draw: Draw,
    name: str,
    counts: tuple[int, int, int],
    sizes: tuple[int, int],
    forms: tuple[tuple[str, int, bool], tuple[str, int, bool]],
    **options: Any,
) -> Sample:
    """Returns a sample as `_sample` does, with w13 and w2 in forms: kind of code, group, and whether it has zeros."""
    sample = _sample(draw, name, counts, sizes, **options)
    hidden, w13, w2, *routes = sample.args
    coded = [_codes(draw, weight.shape, *form) for weight, form in zip((w13, w2), forms, strict=True)]
    return Sample(name, (hidden, *coded, *routes), sample.kwargs)


def _codes(draw: Draw, shape: tuple[int, ...], kind: str, group: int, has_zeros: bool) -> CodedMatrices:
    """Returns random matrices of a shape, whose results are about as large as those of plain ones."""
    num_experts, num_rows, num_columns = shape
    num_groups, bits = -(-num_columns // group), KINDS[kind].bits
    codes = draw.integers(0, 256, num_experts, num_rows, num_columns * bits // 8, dtype=torch.uint8)
    if kind == "e4m3":
        codes &= 0xBF  # Numbers below 2 and no NaN.
    step = {"int4": 0.1, "int8": 0.01, "e4m3": 1.0, "e2m1": 0.08}[kind] * num_columns**-0.5
    scales = (draw.normal(num_experts, num_rows, num_groups, dtype=torch.float32).abs() + 0.5) * step
    if kind == "e2m1":
        scales = (scales.log2().round() + 127).to(torch.uint8)
    zeros = draw.integers(0, 2**bits, *scales.shape, dtype=torch.uint8) if has_zeros else None
    return CodedMatrices(kind, codes, scales, zeros, group)


def _sample(
    draw: Draw,
    name: str,
    counts: tuple[int, int, int],
    sizes: tuple[int, int],
    *,
    gate: str = "silu",
    is_biased: bool = False,
) -> Sample:
    """Returns a sample for counts of tokens, experts and choices, and for the hidden and the intermediate size."""
    (num_tokens, num_experts, num_choices), (hidden_size, size) = counts, sizes
    num_rows = size if gate == "relu_squared" else 2 * size
    w13 = draw.normal(num_experts, num_rows, hidden_size) * hidden_size**-0.5
    w2 = draw.normal(num_experts, hidden_size, size) * size**-0.5 / 4
    kwargs: dict[str, str | Tensor] = {"gate": gate}
    if is_biased:
        kwargs |= {"w13_bias": draw.normal(num_experts, num_rows) * 4, "w2_bias": draw.normal(num_experts, hidden_size)}
    chosen = [draw.permutation(num_experts, torch.int32)[:num_choices] for _ in range(num_tokens)]
    expert_ids = torch.stack(chosen) if chosen else draw.integers(0, 1, 0, num_choices, dtype=torch.int32)
    weights = draw.normal(num_tokens, num_choices, dtype=torch.float32).softmax(-1)
    return Sample(name, (draw.normal(num_tokens, hidden_size), w13, w2, expert_ids, weights), kwargs)


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)},
)
def experts(
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
    """Runs each token through the experts that it chose, and adds up their results with its weights.

    An expert id outside of `[0, num_experts)` is an expert of another rank: it adds nothing, whatever its weight is.
    A token of padding has only such ids, -1 by convention; its result is 0, whatever its hidden state is.

    Args:
        hidden: `[num_tokens, hidden_size]`, contiguous rows with any stride between them.
        w13: `[num_experts, 2 * intermediate_size, hidden_size]`, the dtype of hidden, contiguous: of each expert the
            rows of the gate, then those of the projection that it is multiplied by. Without a gate there are
            `intermediate_size` rows. Or the same matrices in codes.
        w2: `[num_experts, hidden_size, intermediate_size]`, the dtype of hidden, contiguous, or in codes.
        expert_ids: `[num_tokens, num_choices]`, int32.
        weights: `[num_tokens, num_choices]`, float32.
        gate: A name in `GATES`.
        w13_bias: `[num_experts, rows of w13]`, the dtype of hidden, or None for 0.
        w2_bias: `[num_experts, hidden_size]`, the dtype of hidden, or None for 0.
        deterministic: Whether no bit of a token's result may depend on the other tokens.

    Returns:
        `[num_tokens, hidden_size]`, in the dtype of hidden. Products are added up in float32, and so are the weighted
        results of a token's experts. An implementation may round to that dtype after each of the two products, and
        the dequantised numbers of a weight.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    for expert in range(len(w13)):
        token, choice = torch.where(expert_ids == expert)
        x = F.linear(hidden[token].to(wide), weight_of(w13, expert, wide), _bias(w13_bias, expert, wide))
        y = F.linear(GATES[gate](x), weight_of(w2, expert, wide), _bias(w2_bias, expert, wide))
        out.index_add_(0, token, y * weights[token, choice, None].to(wide))
    return out.to(hidden.dtype)


def _bias(bias: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[expert].to(dtype)

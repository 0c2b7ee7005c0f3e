"""The experts of a layer on the GPU, in Triton.

    inner[p] = gate(w13[e] · hidden[p // k] + w13_bias[e])      for each pair p of a token and a choice, of expert e
    parts[p] = w2[e] · inner[p] + w2_bias[e]
    out[t]   = sum over j of  weights[t, j] · parts[t · k + j]

`_align.py` puts the pairs in blocks of one expert each. `product_kernel`, grid (blocks x column tiles), multiplies the
rows of a block by the weight of its expert, and runs twice. `combine_kernel`, grid (tokens, 1,024 columns), adds up the
choices of a token in order. The number of blocks follows from shapes; those that no expert needs return at once.

With few pairs, each is a block of its own, and none is sorted: an expert that is chosen twice is then read twice.

A weight in codes (`coded.py`) is dequantised in registers, a tile at a time (`_dequantise.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gated import activate
from .._triton import MAX_PLANS, TORCH_TO_TRITON, Launch, Layout, Specialisation, Target, current_target
from ._align import MAX_EXPERTS, TILE, count_kernel, max_blocks, place_kernel
from ._dequantise import multiply_coded
from .coded import KINDS, CodedMatrices
from .op import GATES, experts

COMBINE_BLOCK = 1024
MIN_ROWS_OF_MANY = 32
"""Pairs for each expert from which on blocks are high. With fewer, the time is that of reading weights."""

_SMALL = {"num_warps": 4, "enable_fp_fusion": True}


@experts.register("cuda")
def experts_triton(
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
    """Runs `experts` in three launches, or five where pairs are sorted by expert.

    Raises:
        ValueError: There are more than 1,024 experts, or a tensor is not contiguous.
    """
    if not (w13.is_contiguous() and w2.is_contiguous() and hidden.stride(1) == 1):
        raise ValueError("experts: the weights, and the rows of hidden, must be contiguous; call .contiguous() before")
    layout = Layout.of(hidden)
    first, second = _Stored.of(w13), _Stored.of(w2)
    plan = _plan(layout, first.layout, second.layout, expert_ids.shape[1], gate, deterministic, current_target())
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if not out.numel():
        return out
    expert_ids, weights = expert_ids.contiguous(), weights.contiguous()
    inner, parts = (torch.empty((expert_ids.numel(), n), dtype=out.dtype, device=out.device) for n in w2.shape[:0:-1])
    order, block_experts = None, expert_ids
    if plan.place_pairs is not None:
        counts, order, block_experts = (torch.empty(n, dtype=torch.int32, device=out.device) for n in plan.lengths)
        plan.count_pairs.run(expert_ids, counts)
        plan.place_pairs.run(expert_ids, counts, order, block_experts)
    plan.first.run(hidden, *first.tensors, w13_bias, order, block_experts, inner)
    plan.second.run(inner, *second.tensors, w2_bias, order, block_experts, parts)
    plan.combine.run(parts, expert_ids, weights, out)
    return out


class _Layout(NamedTuple):
    """What a launch depends on of the matrices of all experts: their shape, the kind of their codes, their groups."""

    shape: tuple[int, ...]
    kind: str
    group: int


class _Stored(NamedTuple):
    """The matrices of all experts as a kernel takes them: numbers or codes, scales and zeros; None for those absent."""

    tensors: tuple[Tensor, Tensor | None, Tensor | None]
    layout: _Layout

    @classmethod
    def of(cls, matrices: Tensor | CodedMatrices) -> _Stored:
        """Returns matrices as a kernel takes them; plain ones have no kind."""
        if isinstance(matrices, Tensor):
            return cls((matrices, None, None), _Layout(matrices.shape, "", 1))
        tensors = (matrices.codes, matrices.scales, matrices.zeros)
        return cls(tensors, _Layout(matrices.shape, matrices.kind, matrices.group))


class _Plan(NamedTuple):
    """The launches of a call, and the lengths of counts, order and experts of blocks. Unsorted pairs are blocks."""

    lengths: tuple[int, int, int]
    count_pairs: Launch
    place_pairs: Launch | None
    first: Launch
    second: Launch
    combine: Launch


@functools.lru_cache(MAX_PLANS)
def _plan(
    hidden: Layout, w13: _Layout, w2: _Layout, num_choices: int, gate: str, deterministic: bool, target: Target
) -> _Plan:
    (num_tokens, width), (num_experts, _, size) = hidden.shape, w2.shape
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"experts: {num_experts} experts are too many for one call; at most {MAX_EXPERTS}")
    num_pairs = num_tokens * num_choices
    is_many = deterministic or num_pairs >= MIN_ROWS_OF_MANY * num_experts
    is_sorted = is_many or (num_tokens > 1 and 4 * num_pairs > num_experts)
    dtype = TORCH_TO_TRITON[hidden.dtype]
    rows = configuration(dtype, is_many, w13.kind, target)[0]["ROWS"]
    num_blocks = max_blocks(num_pairs, num_experts, rows) if is_sorted else num_pairs

    def product(weight: _Layout, kind: str, outer: int, choices: int, stride: int) -> Launch:
        tile, options = configuration(dtype, is_many, weight.kind, target)
        grid = (num_blocks * triton.cdiv(outer, tile["COLUMNS"]),)
        values = (num_blocks, num_experts, choices, weight.shape[2], outer, stride, weight.group)
        return Launch(product_kernel, grid, values, {"GATE": kind, "KIND": weight.kind, **tile, **options})

    sort = {"TILE": TILE, **_SMALL}
    place = Launch(
        place_kernel, (num_experts,), (num_pairs, num_blocks), {"ROWS": rows, "MAX_EXPERTS": MAX_EXPERTS, **sort}
    )
    grid = (num_tokens, triton.cdiv(width, COMBINE_BLOCK))
    return _Plan(
        (num_experts, num_blocks * rows, num_blocks),
        Launch(count_kernel, (num_experts,), (num_pairs,), sort),
        place if is_sorted else None,
        product(w13, gate, size, num_choices, hidden.strides[0]),
        product(w2, "", width, 1, size),
        Launch(combine_kernel, grid, (num_experts, num_choices, width), {"BLOCK": COMBINE_BLOCK, **_SMALL}),
    )


def configuration(dtype: str, is_many: bool, kind: str, target: Target) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the tile (`ROWS` x `COLUMNS`, of gate and of up, `DEPTH` inputs per step) and the options of a product.

    16 rows are the least of a tensor core; then the loop only has to keep enough bytes in flight. 128 rows by twice 64
    columns are a square, as in `invariant_linear`. float32 uses no tensor cores, and registers limit its tile;
    numbers that are dequantised (`kind` is not empty) take more of them, which twice the threads have.
    """
    if dtype == "fp32":
        tile = {"ROWS": 32 if is_many else 16, "COLUMNS": 32, "DEPTH": 32}
        return tile, {"num_warps": 8 if kind else 4, "num_stages": 2, "enable_fp_fusion": True}
    num_stages = 3 if target.warp_size == 32 else 2
    if is_many:
        tile = {"ROWS": 128, "COLUMNS": 64, "DEPTH": 64}
        return tile, {"num_warps": 8, "num_stages": num_stages, "enable_fp_fusion": True}
    tile = {"ROWS": 16, "COLUMNS": 64, "DEPTH": 128 if target.warp_size == 32 else 64}
    return tile, {"num_warps": 4, "num_stages": num_stages, "enable_fp_fusion": True}


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the five kernels on a target."""
    for dtype in ("fp32", "fp16", "bf16"):
        for is_many in (False, True):
            yield from _product_forms(dtype, is_many, target)
        types = {"parts_ptr": f"*{dtype}", "ids_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        types |= dict.fromkeys(("num_experts", "num_choices", "width"), "i32")
        yield Specialisation(combine_kernel, types, {"BLOCK": COMBINE_BLOCK}, _SMALL, ("width",))
    yield Specialisation(count_kernel, _pointers("ids", "counts") | {"num_pairs": "i32"}, {"TILE": TILE}, _SMALL)
    for rows in (16, 32, 128):
        types = _pointers("ids", "counts", "order", "block_experts") | {"num_pairs": "i32", "num_blocks": "i32"}
        sizes = {"ROWS": rows, "TILE": TILE, "MAX_EXPERTS": MAX_EXPERTS}
        yield Specialisation(place_kernel, types, sizes, _SMALL)


def _pointers(*names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*i32" for name in names}


def _product_forms(dtype: str, is_many: bool, target: Target) -> Iterator[Specialisation]:
    """Yields the forms of a product: each way to store weights, each gate or none, with a bias or none, sorted or not.

    The gate of most models comes last.
    """
    sizes = ("num_inputs", "num_outputs", "x_stride")
    for kind, stored in _stored_forms(dtype):
        tile, options = configuration(dtype, is_many, kind, target)
        for gate in ("", *reversed([*GATES])):
            for absent in ((), ("bias_ptr",)):
                for unsorted in ((),) if is_many else ((), ("order_ptr",)):
                    types = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}") | stored
                    types |= _pointers("order", "block_experts")
                    types |= dict.fromkeys(("num_blocks", "num_experts", "num_choices", *sizes, "group"), "i32")
                    missing = {"weight_ptr", "scales_ptr", "zeros_ptr"} - stored.keys()
                    constants: dict[str, Any] = {"GATE": gate, "KIND": kind, **tile}
                    constants |= dict.fromkeys((*missing, *absent, *unsorted))
                    present = {name: kind for name, kind in types.items() if name not in constants}
                    yield Specialisation(product_kernel, present, constants, options, sizes)


def _stored_forms(dtype: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the kind of the codes, and the types of the tensors, of each way to store weights; plain ones first."""
    yield "", {"weight_ptr": f"*{dtype}"}
    for kind, form in KINDS.items():
        types = {"weight_ptr": "*u8", "scales_ptr": "*u8" if kind == "e2m1" else "*fp32"}
        yield kind, types
        if form.has_zeros:
            yield kind, types | {"zeros_ptr": "*u8"}


@triton.jit(do_not_specialize=["num_blocks", "num_experts", "num_choices", "group"])
def product_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    order_ptr,
    block_experts_ptr,
    out_ptr,
    num_blocks,
    num_experts,
    num_choices,
    num_inputs,
    num_outputs,
    x_stride,
    group,
    GATE: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    """Computes COLUMNS columns of the result of one block. Pair p reads row `p // num_choices` of x, and writes row p.

    With a gate the weight of an expert has twice as many rows, of gate and up. Blocks of one column tile run side by
    side, so that those of one expert share its weights in the L2 cache.
    """
    block, tile = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    if expert < 0 or expert >= num_experts:
        return
    is_gated: tl.constexpr = GATE != "" and GATE != "relu_squared"
    pair = _pairs_of(block, order_ptr, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    has_row, has_column = pair[:, None] >= 0, column[None, :] < num_outputs
    first_row = expert * (2 * num_outputs if is_gated else num_outputs)
    gate_row, up_row = first_row + column, first_row + num_outputs + column
    codes = (weight_ptr, scales_ptr, zeros_ptr)
    x_ptrs = x_ptr + (pair // num_choices)[:, None].to(tl.int64) * x_stride + inner[None, :]
    gate_ptrs = weight_ptr + gate_row[None, :] * num_inputs + inner[:, None]
    up_ptrs = weight_ptr + up_row[None, :] * num_inputs + inner[:, None]
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_inputs, DEPTH):
        left = num_inputs - start
        mask = has_column & (inner[:, None] < left)
        x = tl.load(x_ptrs + start, mask=has_row & (inner[None, :] < left), other=0.0)
        if KIND != "":
            gate = multiply_coded(x, codes, gate_row, has_column, start, num_inputs, group, gate, KIND, DEPTH)
            if is_gated:
                up = multiply_coded(x, codes, up_row, has_column, start, num_inputs, group, up, KIND, DEPTH)
        else:
            gate = tl.dot(x, tl.load(gate_ptrs + start, mask=mask, other=0.0), gate, input_precision="ieee")
            if is_gated:
                up = tl.dot(x, tl.load(up_ptrs + start, mask=mask, other=0.0), up, input_precision="ieee")
    if bias_ptr is not None:
        biases = bias_ptr + first_row + column
        gate += tl.load(biases, mask=column < num_outputs, other=0.0).to(tl.float32)[None, :]
        if is_gated:
            up += tl.load(biases + num_outputs, mask=column < num_outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + pair[:, None].to(tl.int64) * num_outputs + column[None, :]
    tl.store(out_ptrs, _gated(gate, up, GATE).to(out_ptr.dtype.element_ty), mask=has_row & has_column)


@triton.jit
def _pairs_of(block, order_ptr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the pairs of a block, -1 where there is none. Without an order, pair b alone is block b."""
    row = tl.arange(0, ROWS)
    return tl.where(row == 0, block, -1) if order_ptr is None else tl.load(order_ptr + block * ROWS + row)


@triton.jit
def _gated(gate, up, GATE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    if GATE == "":
        out = gate
    elif GATE == "relu_squared":
        gate = tl.maximum(gate, 0.0)
        out = gate * gate
    elif GATE == "clamped_swiglu":
        gate = tl.minimum(gate, 7.0)
        out = gate * tl.sigmoid(1.702 * gate) * (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0)
    else:
        out = activate(gate, GATE) * up
    return out


@triton.jit(do_not_specialize=["num_experts", "num_choices"])
def combine_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    num_experts,
    num_choices,
    width,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Adds up the weighted results of one token's choices, in their order. Experts of other ranks have no result."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(num_choices):
        pair = token * num_choices + choice
        expert = tl.load(ids_ptr + pair)
        is_ours = (expert >= 0) & (expert < num_experts)
        weight = tl.where(is_ours, tl.load(weights_ptr + pair), 0.0)
        num_columns = tl.where(is_ours, width, 0)
        part = tl.load(parts_ptr + pair * width + column, mask=column < num_columns, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)

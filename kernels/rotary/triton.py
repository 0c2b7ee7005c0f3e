"""Rotary position embedding on the GPU, in Triton.

    x1, x2 = x1 · c - x2 · s,  x2 · c + x1 · s

Grid: (tokens, groups of query heads, then groups of key heads): one launch turns both. A program owns about 1,024
numbers of heads of one token, and reads the cosines and sines of its position once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .._heads import head_options, heads_per_program
from .._triton import Specialisation, Target, current_target
from .op import rotary


@rotary.register("cuda")
def rotary_triton(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Runs `rotary` in one kernel.

    Raises:
        ValueError: Heads or the rows of the table are not contiguous.
    """
    if query.stride(2) != 1 or key.stride(2) != 1 or not cos_sin.is_contiguous():
        raise ValueError(
            f"rotary: the last strides of query and key are {query.stride(2)} and {key.stride(2)}, the strides of "
            f"cos_sin {cos_sin.stride()}; heads and the table must be contiguous"
        )
    num_tokens, rot_dim = len(positions), cos_sin.shape[1]
    if not num_tokens or not rot_dim:
        return
    heads = heads_per_program(rot_dim)
    num_groups = [triton.cdiv(x.shape[1], heads) for x in (query, key)]
    rotary_kernel[(num_tokens, sum(num_groups))](
        positions,
        query,
        key,
        cos_sin,
        *query.stride()[:2],
        *key.stride()[:2],
        query.shape[1],
        key.shape[1],
        num_groups[0],
        rot_dim // 2,
        HEADS=heads,
        BLOCK=triton.next_power_of_2(rot_dim // 2),
        **head_options(current_target()),
    )


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the forms the kernel takes on a target: from heads of two numbers to 1,024."""
    strides = ("query_stride", "query_head", "key_stride", "key_head")
    for dtype in ("fp32", "fp16", "bf16"):
        for rot_dim in (2, 64, 128, 1024):
            types = {"positions_ptr": "*i64", "query_ptr": f"*{dtype}", "key_ptr": f"*{dtype}", "cos_sin_ptr": "*fp32"}
            types |= dict.fromkeys((*strides, "num_heads", "num_kv_heads", "num_query_groups", "half"), "i32")
            constants = {"HEADS": heads_per_program(rot_dim), "BLOCK": rot_dim // 2}
            yield Specialisation(rotary_kernel, types, constants, head_options(target), (*strides, "half"))


@triton.jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    positions_ptr,
    query_ptr,
    key_ptr,
    cos_sin_ptr,
    query_stride,
    query_head,
    key_stride,
    key_head,
    num_heads,
    num_kv_heads,
    num_query_groups,
    half,
    HEADS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Turns HEADS heads of token `program_id(0)`. `query_head` and `key_head` are strides between heads."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    table_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * half)
    if group < num_query_groups:
        _rotate(query_ptr + token * query_stride, query_head, num_heads, group, table_ptr, half, HEADS, BLOCK)
    else:
        group -= num_query_groups
        _rotate(key_ptr + token * key_stride, key_head, num_kv_heads, group, table_ptr, half, HEADS, BLOCK)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    heads_ptr,
    head_stride,
    num_heads,
    group,
    table_ptr,
    half,
    HEADS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads) & (column < half)
    cos = tl.load(table_ptr + column, mask=column < half, other=0.0)
    sin = tl.load(table_ptr + half + column, mask=column < half, other=0.0)
    first_ptr = heads_ptr + head * head_stride + column
    second_ptr = first_ptr + half
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(heads_ptr.dtype.element_ty), mask=inside)
    tl.store(second_ptr, (second * cos + first * sin).to(heads_ptr.dtype.element_ty), mask=inside)

"""Gathering the tensors of a step on the GPU, in Triton: one launch.

Grid: sequence x tile of 512. A program writes its tile of the tokens of the sequence and its tile of the block table.
The first program of a sequence also writes the entries of the sequence in the prefix sums and the lengths. The host
does not know the lengths, so it launches tiles enough for the longest prompt and the widest table.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Specialisation, Target, launch, varying
from .op import gather_batch

TILE = 512
NUM_WARPS = 4


@gather_batch.register("cuda")
def gather_batch_triton(
    token_table: Tensor, block_table: Tensor, plan: Tensor, num_tokens: int, max_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs `gather_batch` in one kernel.

    Raises:
        ValueError: The plan is not `[4, num_seqs]` and contiguous, or the block table has too few columns.
    """
    num_seqs = plan.shape[-1]
    if plan.shape != (4, num_seqs) or not plan.is_contiguous() or max_blocks > block_table.shape[1]:
        raise ValueError(
            f"gather_batch: the plan must be [4, num_seqs] and contiguous, and max_blocks at most "
            f"{block_table.shape[1]}; got {list(plan.shape)} with strides {plan.stride()}, and {max_blocks}"
        )
    token_ids, positions, slot_mapping = torch.empty((3, num_tokens), dtype=torch.int64, device=plan.device).unbind()
    query_start_loc = torch.empty(num_seqs + 1, dtype=torch.int32, device=plan.device)
    seq_lens = torch.empty(num_seqs, dtype=torch.int32, device=plan.device)
    block_tables = torch.empty((num_seqs, max_blocks), dtype=torch.int32, device=plan.device)
    launch(
        gather_batch_kernel,
        (num_seqs, triton.cdiv(max(num_tokens, max_blocks), TILE)),
        token_table,
        block_table,
        plan,
        token_ids,
        positions,
        slot_mapping,
        query_start_loc,
        seq_lens,
        block_tables,
        token_table.stride(0),
        block_table.stride(0),
        max_blocks,
        block_size,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )
    return token_ids, positions, slot_mapping, query_start_loc, seq_lens, block_tables


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the only specialisation of the kernel: the tables are always int32."""
    tables = ("token_table_ptr", "block_table_ptr", "plan_ptr", "query_start_loc_ptr", "seq_lens_ptr")
    types = dict.fromkeys((*tables, "block_tables_ptr"), "*i32")
    types |= dict.fromkeys(("token_ids_ptr", "positions_ptr", "slot_mapping_ptr"), "*i64")
    types |= dict.fromkeys(("token_stride", "block_stride", "max_blocks", "block_size"), "i32")
    yield Specialisation(gather_batch_kernel, types, {"TILE": TILE}, {"num_warps": NUM_WARPS})


@triton.jit(
    **varying(["token_stride", "block_stride", "max_blocks", "block_size"], ["positions_ptr", "slot_mapping_ptr"])
)
def gather_batch_kernel(  # type: ignore[no-untyped-def]
    token_table_ptr,
    block_table_ptr,
    plan_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    token_stride,
    block_stride,
    max_blocks,
    block_size,
    TILE: tl.constexpr,  # noqa: N803
):
    """Gathers tile `program_id(1)` (TILE tokens, TILE blocks) of sequence `program_id(0)`, to contiguous outputs."""
    sequence, num_seqs = tl.program_id(0), tl.num_programs(0)
    row = tl.load(plan_ptr + sequence).to(tl.int64)
    start = tl.load(plan_ptr + num_seqs + sequence)
    count = tl.load(plan_ptr + 2 * num_seqs + sequence)
    offset = tl.load(plan_ptr + 3 * num_seqs + sequence)
    is_real = row >= 0
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)

    inside = columns < count
    known = columns < tl.where(is_real, count, 0)
    position = start + columns
    token = tl.load(token_table_ptr + row * token_stride + position, mask=known, other=0)
    block = tl.load(block_table_ptr + row * block_stride + position // block_size, mask=known, other=0)
    slot = tl.where(is_real, block.to(tl.int64) * block_size + position % block_size, -1)
    tl.store(token_ids_ptr + offset + columns, token.to(tl.int64), mask=inside)
    tl.store(positions_ptr + offset + columns, position.to(tl.int64), mask=inside)
    tl.store(slot_mapping_ptr + offset + columns, slot, mask=inside)

    in_table = columns < max_blocks
    held = columns < tl.where(is_real, max_blocks, 0)
    entry = tl.load(block_table_ptr + row * block_stride + columns, mask=held, other=0)
    tl.store(block_tables_ptr + sequence.to(tl.int64) * max_blocks + columns, entry, mask=in_table)

    if tl.program_id(1) == 0:
        tl.store(seq_lens_ptr + sequence, tl.where(is_real, start + count, 0))
        tl.store(query_start_loc_ptr + sequence, offset)
        if sequence == num_seqs - 1:
            tl.store(query_start_loc_ptr + sequence + 1, offset + count)

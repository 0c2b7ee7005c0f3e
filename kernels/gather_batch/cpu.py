"""`gather_batch` on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import native_kernel
from ..tape import empty
from .op import gather_batch

_KERNEL = native_kernel("gather_batch", "PPPPPPPPPllliii")


@gather_batch.register("cpu")
def gather_batch_cpu(
    token_table: Tensor, block_table: Tensor, plan: Tensor, num_tokens: int, max_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs `gather_batch` in the compiled kernel, or its plain body if the kernel cannot be used here.

    Raises:
        ValueError: The rows of the plan are not contiguous, or the block table has too few columns.
    """
    num_seqs = plan.shape[1]
    if _KERNEL is None:
        return gather_batch.plain(token_table, block_table, plan, num_tokens, max_blocks, block_size)
    if (num_seqs > 1 and plan.stride(1) != 1) or max_blocks > block_table.shape[1]:
        raise ValueError(
            f"gather_batch: the rows of the plan must be contiguous, and max_blocks at most {block_table.shape[1]}; "
            f"got strides {plan.stride()}, and {max_blocks}"
        )
    token_ids, positions, slots = (empty((num_tokens,), torch.int64) for _ in range(3))
    query_start_loc, seq_lens = (empty((size,), torch.int32) for size in (num_seqs + 1, num_seqs))
    block_tables = empty((num_seqs, max_blocks), torch.int32)
    tensors = (token_table, block_table, plan, token_ids, positions, slots, query_start_loc, seq_lens, block_tables)
    _KERNEL(
        num_tokens,
        *(tensor.data_ptr() for tensor in tensors),
        token_table.stride(0),
        block_table.stride(0),
        plan.stride(0),
        -1 if num_seqs == num_tokens else num_seqs,
        max_blocks,
        block_size,
    )
    return token_ids, positions, slots, query_start_loc, seq_lens, block_tables

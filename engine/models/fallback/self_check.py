"""`check_paging`: compares a loaded module with itself: once with the attention of transformers, once with ours.

A trial on the meta device sees shapes and masks, but no numbers. A module may still do something between tokens that no
attention call shows: shift them, sum over them, or count positions by itself. Such a module gives other hidden states
when prompts come in chunks and side by side. So two short prompts are run both ways once the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...batch import ForwardBatch
from ...errors import UnsupportedModelError
from ...kv_cache.layout import allocate_kv_cache
from ...parallel.context import ParallelContext
from ..decoder import Decoder
from ..pp_stages import cache_groups, cache_shape

__all__ = ["check_paging"]

LENGTHS = (11, 5)
"""Lengths of the prompts, at most a block."""

FIRST_CHUNK = 7
"""Tokens of the first prompt that come in the first step, beside the second prompt."""

BLOCK_SIZE = 16

TOLERANCE = {torch.float32: 0.01}
"""Largest difference relative to the size of the hidden states; `WIDE_TOLERANCE` for numbers of 16 bits."""

WIDE_TOLERANCE = 0.25


@torch.inference_mode()
def check_paging(model: Decoder, module: Any, dtype: torch.dtype, device: torch.device, paged: str) -> None:
    """Checks that a module computes the same with the paged attention as with its own.

    Args:
        model: The model around the module, with its weights loaded.
        module: The module of transformers.
        dtype: Number type of the hidden states.
        device: Device of the model.
        paged: Name of our attention function.

    Raises:
        UnsupportedModelError: The hidden states differ, or a forward pass fails.
    """
    length = min(max(LENGTHS), model.spec.max_position_embeddings)
    prompts = [
        (torch.arange(1, min(count, length) + 1, device=device) * 7919) % model.spec.vocab_size for count in LENGTHS
    ]
    try:
        with _own_attention(module, paged):
            own = [_run_alone(module.base_model, prompt) for prompt in prompts]
        ours = _run_paged(model, prompts, dtype, device)
    except Exception as error:  # A forward pass raises anything.
        raise UnsupportedModelError(
            f"{type(module).__name__} of transformers cannot run here: its forward pass fails on two short prompts "
            f"({error!r:.200}); check that the fields of config.json fit each other"
        ) from error
    expected, found = torch.cat(own).float(), torch.cat(ours).float()
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    most = TOLERANCE.get(dtype, WIDE_TOLERANCE)
    if not difference <= most:
        raise UnsupportedModelError(
            f"{type(module).__name__} of transformers cannot run here: with the paged attention its hidden states "
            f"differ by {difference:.2g} of their size from those with its own (at most {most}), so something else in "
            "it reads other tokens, or its weights give no finite numbers"
        )


@contextmanager
def _own_attention(module: Any, paged: str) -> Iterator[None]:
    """Lets a module use the attention and the masks of transformers for a while."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    ours = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == paged]
    try:
        for config in ours:
            config._attn_implementation = "eager"
        yield
    finally:
        for config in ours:
            config._attn_implementation = paged


def _run_alone(body: Any, prompt: Tensor) -> Tensor:
    """Returns the hidden states of a prompt, `[num_tokens, hidden_size]`."""
    positions = torch.arange(len(prompt), device=prompt.device)
    hidden: Tensor = body(input_ids=prompt[None], position_ids=positions[None], use_cache=False)[0][0]
    return hidden


def _run_paged(
    model: Decoder, prompts: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the hidden states of two prompts that are run in two steps, of which the second has a chunk alone."""
    alone = ParallelContext.of_rank(model.parallel.rank, model.parallel.tp_size, model.parallel.pp_size)
    num_groups = len(cache_groups(model.spec))
    cache = allocate_kv_cache(cache_shape(model.spec, alone), 2 * num_groups, BLOCK_SIZE, dtype=dtype, device=device)
    (first, second), split = prompts, min(FIRST_CHUNK, len(prompts[0]) - 1)
    both = model(_batch([(first[:split], 0), (second, 0)], num_groups), cache)
    rest = model(_batch([(first[split:], split)], num_groups), cache)
    return torch.cat((both[:split], rest)), both[split:]


def _batch(parts: Sequence[tuple[Tensor, int]], num_groups: int) -> ForwardBatch:
    """Makes the batch of parts of prompts: their tokens and first positions. A prompt has one block in each group."""
    device = parts[0][0].device
    counts = torch.tensor([0, *(len(tokens) for tokens, _ in parts)])
    positions = torch.cat([start + torch.arange(len(tokens)) for tokens, start in parts])
    blocks = torch.arange(2 * num_groups, dtype=torch.int32).view(num_groups, 2, 1)[:, : len(parts)]
    owners = torch.repeat_interleave(torch.arange(len(parts)), counts[1:])
    slots = blocks[:, owners, 0].long() * BLOCK_SIZE + positions
    return ForwardBatch(
        token_ids=torch.cat([tokens for tokens, _ in parts]),
        positions=positions.to(device),
        slot_mappings=slots.to(device).unbind(),
        query_start_loc=counts.cumsum(0).int().to(device),
        seq_lens=torch.tensor([start + len(tokens) for tokens, start in parts], dtype=torch.int32, device=device),
        block_tables=blocks.contiguous().to(device).unbind(),
        rows=torch.arange(len(parts), dtype=torch.int32, device=device),
    )

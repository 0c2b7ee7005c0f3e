"""`run_largest_step`: runs the largest possible step once before the engine starts, to measure the memory of a step.

The function also makes the tables of the runner and of the sampler, which an engine keeps. So the measurement covers
all memory except for weights and KV cache.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ...kernels import top_logprobs
from ..batch import ForwardBatch
from ..kv_cache.layout import allocate_kv_cache
from ..kv_cache.states import allocate_states
from ..lora.routing import Routing, no_routing
from ..models.decoder import Decoder
from ..models.pp_stages import cache_groups, cache_shape, state_shape
from ..step.sampler import Sampler
from ..step.tables import Tables
from ..step.token_head import MAX_PROMPT_LOGITS

NUM_LOGPROBS = 20
"""Number of log-probabilities of each position in the measurement; the memory of each one is negligible."""


@torch.inference_mode()
def run_largest_step(
    model: Decoder,
    device: torch.device,
    *,
    num_tokens: int,
    num_seqs: int,
    max_model_len: int,
    block_size: int,
    kv_dtype: torch.dtype,
    draws: bool = True,
) -> None:
    """Runs a step of the largest size, so that the caller can measure its peak memory.

    The step computes prompts of `num_tokens` tokens in all, then samples for `num_seqs` sequences with
    log-probabilities. The KV cache has one block, which all prompts read and none writes, and one row of states, which
    none reads or writes. In a model with adapter slots the products of adapters run too, but add nothing. Results are
    discarded.

    Args:
        model: The model, with its weights loaded.
        device: Device of the model.
        num_tokens: Most tokens of a step.
        num_seqs: Most sequences of a step.
        max_model_len: Most tokens of a sequence.
        block_size: Tokens per KV cache block.
        kv_dtype: Number type of the KV cache.
        draws: Whether the engine draws tokens, so that logits and draws are measured too.
    """
    spec, num_rows = model.spec, max(num_seqs, MAX_PROMPT_LOGITS)
    num_groups = max(1, len(cache_groups(spec)))
    tables, sampler = Tables(num_rows, max_model_len, block_size, device, num_groups), Sampler(num_rows, device)
    kv_cache = allocate_kv_cache(cache_shape(spec, model.parallel), 1, block_size, dtype=kv_dtype, device=device)
    kv_cache += allocate_states(state_shape(spec, model.parallel), 1, dtype=model.dtype, device=device)
    with _adapters(model, num_tokens, device):
        hidden = model(_prompts(num_tokens, max_model_len, block_size, num_groups, device), kv_cache)
    if not (model.parallel.is_last_stage and draws):
        return
    logits = model.compute_logits(hidden.new_zeros((num_rows, hidden.shape[1])))
    raw = logits.clone()  # The sampler makes such a copy if a request edits its logits and asks for log-probabilities.
    placed = torch.stack((torch.arange(num_rows, device=device), torch.ones(num_rows, device=device).long()))
    token_ids, _ = sampler.draw(logits, range(num_rows), [1] * num_rows, placed, tables.tokens)
    top_logprobs(raw, token_ids.clamp(min=0), min(NUM_LOGPROBS, spec.vocab_size))


def _adapters(model: Decoder, num_tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """Makes a step run the products of adapters, if the model has any."""
    if model.adapters is None:
        return nullcontext()
    num_slots = model.adapters.sizes.num_slots
    return model.adapters.routed(Routing(no_routing(num_slots, num_tokens, device), num_slots))


def _prompts(
    num_tokens: int, max_model_len: int, block_size: int, num_groups: int, device: torch.device
) -> ForwardBatch:
    """Makes a batch of `num_tokens` tokens in prompts of `max_model_len`, the last one shorter; no slot is written."""
    numbers = torch.arange(num_tokens, device=device)
    begins = torch.arange(0, num_tokens + max_model_len, max_model_len, dtype=torch.int32, device=device)
    begins = begins.clamp(max=num_tokens)
    max_blocks = -(-max_model_len // block_size)
    block_tables = torch.zeros((num_groups, len(begins) - 1, max_blocks), dtype=torch.int32, device=device)
    return ForwardBatch(
        token_ids=torch.zeros_like(numbers),
        positions=numbers % max_model_len,
        slot_mappings=torch.full((num_groups, num_tokens), -1, device=device).unbind(),
        query_start_loc=begins,
        seq_lens=begins.diff(),
        block_tables=block_tables.unbind(),
        rows=torch.full((len(begins) - 1,), -1, dtype=torch.int32, device=device),
    )

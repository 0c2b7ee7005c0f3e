"""Encodes step plans as bytes, for the ranks that have no scheduler.

A decode step is a few small integers for each sequence. A sequence's tokens and parameters are sent once, when it
enters. The fields that only the scheduler reads (sequences, published blocks) are not sent.
"""

from __future__ import annotations

import pickle
from array import array
from typing import Any

from ..sequence import Sequence
from ..step_plan import NewRow, StepPlan

__all__ = ["decode_plan", "encode_plan", "known_tokens"]


def encode_plan(plan: StepPlan) -> bytes:
    """Returns a plan as bytes, which `decode_plan` reads."""
    fields = (
        plan.rows,
        plan.starts,
        plan.counts,
        plan.samples,
        plan.new_blocks,
        plan.new_tokens,
        plan.num_decodes,
        plan.num_shared_blocks,
        plan.token_masks,
        [_pack_row(new) for new in plan.new_rows],
    )
    return pickle.dumps(fields, protocol=5)


def decode_plan(message: bytes) -> StepPlan:
    """Returns the plan of a message of `encode_plan`, for a runner to execute; `plan.sequences` is empty."""
    rows, starts, counts, samples, new_blocks, new_tokens, num_decodes, num_shared, masks, new_rows = pickle.loads(
        message
    )
    return StepPlan(
        rows=rows,
        starts=starts,
        counts=counts,
        samples=samples,
        new_blocks=new_blocks,
        new_tokens=new_tokens,
        num_decodes=num_decodes,
        num_shared_blocks=num_shared,
        token_masks=masks,
        new_rows=[_unpack_row(packed) for packed in new_rows],
    )


def known_tokens(plan: StepPlan) -> list[tuple[int, int, list[int]]]:
    """Returns the generated tokens that a step takes as its input, as (row, first position, tokens) of each sequence.

    The last pp stage has drawn these tokens, and the first pp stage embeds them, so rank 0 sends them as
    `StepPlan.new_tokens`. Sequences that enter the tables in this step are left out, since all of their tokens are sent
    with them (`StepPlan.new_rows`).
    """
    entered = {new.row for new in plan.new_rows}
    return [
        (row, start, sequence.token_ids[start : start + count])
        for sequence, row, start, count in zip(plan.sequences, plan.rows, plan.starts, plan.counts, strict=True)
        if start >= sequence.num_prompt_tokens and row not in entered
    ]


def _pack_row(new: NewRow) -> tuple[Any, ...]:
    sequence = new.sequence
    return (
        new.row,
        array("i", sequence.token_ids[: new.num_tokens]).tobytes(),
        sequence.params,
        sequence.seed,
        sequence.num_prompt_tokens,
        sequence.max_tokens_total,
        sequence.stop_token_ids,
        sequence.bad_word_ids,
        sequence.spans,
    )


def _unpack_row(packed: tuple[Any, ...]) -> NewRow:
    row, tokens, params, seed, num_prompt_tokens, max_tokens_total, stop_token_ids, bad_word_ids, spans = packed
    token_ids = array("i", tokens).tolist()
    sequence = Sequence(
        request_id="",
        index=0,
        params=params,
        seed=seed,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        max_tokens_total=max_tokens_total,
        stop_token_ids=stop_token_ids,
        bad_word_ids=bad_word_ids,
        spans=spans,
    )
    return NewRow(row, sequence, len(token_ids))

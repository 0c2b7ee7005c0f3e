"""Encodes step plans as bytes, for the ranks that have no scheduler.

A decode step is a few small integers for each sequence. A sequence's tokens and parameters are sent once, when it
enters. The fields that only the scheduler reads (sequences, published blocks) are not sent.
"""

from __future__ import annotations

from array import array
from dataclasses import fields
from itertools import islice
from typing import Any

import torch

from ..embeds.span import EmbeddedSpan
from ..parallel.wire import Buffer, decode, encode
from ..sampling_params import SamplingParams
from ..sequence import Sequence
from ..step_plan import NewRow, StepPlan
from ..structured.token_masks import TokenMasks
from .adapter_wire import pack_adapter, unpack_adapter

__all__ = ["decode_plan", "encode_plan", "known_tokens"]

_DEFAULTS = {item.name: item.default for item in fields(SamplingParams) if item.name != "structured_outputs"}
"""Fields of sampling parameters and their defaults. Only rank 0 reads the constraint of an output."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def encode_plan(plan: StepPlan, *, with_masks: bool = True) -> bytes:
    """Returns a plan as bytes, which `decode_plan` reads; without token masks for a rank that draws no tokens."""
    masks = plan.token_masks if with_masks else None
    return encode(
        [
            array("i", [*plan.rows, *plan.starts, *plan.counts, *plan.samples]),
            plan.new_blocks,
            _pack_tokens(plan.new_tokens),
            plan.num_decodes,
            plan.num_shared_blocks,
            None if masks is None else [masks.indices, masks.bits],
            [_pack_row(new) for new in plan.new_rows],
            [pack_adapter(new) for new in plan.new_adapters],
        ]
    )


def decode_plan(message: Buffer) -> StepPlan:
    """Returns the plan of a message of `encode_plan`, for a runner to execute; `plan.sequences` is empty."""
    numbers, new_blocks, new_tokens, num_decodes, num_shared, masks, new_rows, new_adapters = decode(message)
    rows, starts, counts, samples = numbers.reshape(4, -1).tolist()
    return StepPlan(
        rows=rows,
        starts=starts,
        counts=counts,
        samples=[bool(sample) for sample in samples],
        new_blocks=[tuple(entry) for entry in new_blocks],
        new_tokens=_unpack_tokens(*new_tokens),
        num_decodes=num_decodes,
        num_shared_blocks=num_shared,
        token_masks=None if masks is None else TokenMasks(*masks),
        new_rows=[_unpack_row(packed) for packed in new_rows],
        new_adapters=[unpack_adapter(packed) for packed in new_adapters],
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


def _pack_tokens(new_tokens: list[tuple[int, int, list[int]]]) -> list[array[int]]:
    """Returns the row, first position and number of tokens of each entry in one array, and all tokens in another."""
    places = array("i", [number for row, start, tokens in new_tokens for number in (row, start, len(tokens))])
    return [places, array("i", [token for _, _, tokens in new_tokens for token in tokens])]


def _unpack_tokens(places: Any, tokens: Any) -> list[tuple[int, int, list[int]]]:
    left = iter(tokens.tolist())
    return [(row, start, list(islice(left, count))) for row, start, count in places.reshape(-1, 3).tolist()]


def _pack_row(new: NewRow) -> list[Any]:
    sequence = new.sequence
    return [
        new.row,
        array("i", sequence.token_ids[: new.num_tokens]),
        _pack_params(sequence.params),
        sequence.seed,
        sequence.num_prompt_tokens,
        sequence.max_tokens_total,
        list(sequence.stop_token_ids.items()),
        sequence.bad_word_edges,
        [_pack_span(span) for span in sequence.spans],
        sequence.adapter_slot,
        sequence.num_first_tokens,
        sequence.pools_tokens,
        sequence.num_left_out,
    ]


def _unpack_row(packed: list[Any]) -> NewRow:
    row, tokens, params, seed, num_prompt_tokens, max_tokens_total, stop_token_ids, *others = packed
    bad_word_edges, spans, adapter_slot, num_first_tokens, pools_tokens, num_left_out = others
    sequence = Sequence(
        request_id="",
        index=0,
        params=SamplingParams(**params),
        seed=seed,
        token_ids=tokens.tolist(),
        num_prompt_tokens=num_prompt_tokens,
        max_tokens_total=max_tokens_total,
        stop_token_ids=dict(stop_token_ids),
        bad_word_edges=bad_word_edges,
        spans=[_unpack_span(*span) for span in spans],
        adapter_slot=adapter_slot,
        num_first_tokens=num_first_tokens,
        pools_tokens=pools_tokens,
        num_left_out=num_left_out,
    )
    return NewRow(row, sequence, len(tokens))


def _pack_params(params: SamplingParams) -> dict[str, Any]:
    """Returns the fields that have other values than the default."""
    values = {name: getattr(params, name) for name in _DEFAULTS}
    return {name: value for name, value in values.items() if value != _DEFAULTS[name]}


def _pack_span(span: EmbeddedSpan) -> list[Any]:
    dtype = str(span.embeddings.dtype).removeprefix("torch.")
    return [span.start, dtype, span.embeddings.view(torch.uint8).numpy()]


def _unpack_span(start: int, dtype: str, content: Any) -> EmbeddedSpan:
    return EmbeddedSpan(start, torch.from_numpy(content).view(_DTYPES[dtype]))

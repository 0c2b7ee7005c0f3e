"""`TextRow`: runs the texts of a step through a module of transformers in one row, without padding between them.

That is right if tokens see others in the attention interface of transformers alone, and if positions can be given. It
is tried on short texts: what a text gives must be the same bits whatever text is beside it, and what it gives alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels import varlen_attention
from ...batch import ForwardBatch
from ...errors import UnsupportedModelError
from .attention import ATTRIBUTE, PAGED, Step, register
from .trial import NEUTRAL

__all__ = ["MOVING_ROPES", "RowLayer", "TextRow", "first_position"]

LENGTHS = (11, 5)
"""Numbers of tokens of the two texts of a trial."""

TOLERANCE = {torch.float32: 1e-3}
"""Largest difference to a text alone, relative to the size of the hidden states; `WIDE_TOLERANCE` for 16 bits."""

WIDE_TOLERANCE = 0.1

KNOWN = NEUTRAL - {"sliding_window"} | {"is_causal", "scaling", "softcap"}
"""Options of an attention call that we heed, or that do not change its result."""

MOVING_ROPES = ("dynamic", "longrope")
"""Rope types whose frequencies follow from the longest sequence that is computed, which in a step is any sequence."""

LOCAL_MARKS = ("window", "attention_chunk", "layer_types")
"""Parts of names of config fields that say that not all tokens of a text see each other."""


def first_position(module: nn.Module) -> int:
    """Returns the position of the first token: in some models the first ones, up to the padding id, are not used."""
    tables = [table for path, table in module.named_modules() if path.endswith("position_embeddings")]
    indices = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return 1 + max((index for index in indices if index is not None), default=-1)


class RowLayer:
    """Attends from each token of a step to all tokens of its text, for one module of transformers.

    Args:
        module: The module whose calls of the attention interface are answered.
        step: The step that is being computed.
    """

    def __init__(self, module: nn.Module, step: Step) -> None:
        self._module = module
        self._step = step

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """As `AttentionCallee`; raises `UnsupportedModelError` for attention of another kind."""
        batch = self._step.batch
        assert batch is not None
        if query.shape[::2] != (1, len(batch.token_ids)):
            raise UnsupportedModelError("the attention is not that of one row of tokens")
        self._check(query, key, value, attention_mask, options)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = options.get("scaling")
        attended = varlen_attention(
            q,
            k,
            v,
            batch.query_start_loc,
            batch.longest_prompt or len(q),
            query.shape[3] ** -0.5 if scale is None else float(scale),
            softcap=float(options.get("softcap") or 0.0),
        )
        return attended.unsqueeze(0)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        """Raises if a call asks for another attention than that of each token to all tokens of its text."""
        causal = options.get("is_causal")
        causal = getattr(self._module, "is_causal", False) if causal is None else causal
        others = [name for name in options.keys() - KNOWN if options[name] is not None]
        same_size = query.shape[2:] == key.shape[2:] == value.shape[2:]
        if causal or others or mask is not None or not same_size:
            raise UnsupportedModelError("the attention is not that of each token to all tokens of a text")


class TextRow:
    """A module of transformers that runs the texts of a step in one row.

    Args:
        module: The module, with its weights loaded.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._step = Step()
        self._first = first_position(module)
        self._takes_types = "token_type_ids" in inspect.signature(module.forward).parameters
        register()
        for part in module.modules():
            object.__setattr__(part, ATTRIBUTE, RowLayer(part, self._step))

    @classmethod
    def attempt(cls, module: Any, vocab_size: int, dtype: torch.dtype, device: torch.device) -> TextRow | None:
        """Returns the row of a module, or None if a trial shows that its texts must be run one by one.

        Args:
            module: The module, with its weights loaded, whose first output is a vector for each token.
            vocab_size: Number of token ids.
            dtype: Number type of the vectors.
            device: Device of the module.
        """
        if _depends_on_length(module.config) or "position_ids" not in inspect.signature(module.forward).parameters:
            return None
        row = cls(module)
        try:
            return row if row._is_right(_trial_texts(module.config, vocab_size, device), dtype) else None
        except Exception:  # noqa: BLE001  # A forward pass raises anything, and texts can be run one by one.
            return None

    def run(self, batch: ForwardBatch) -> Tensor:
        """Returns the first output of the module for the texts of a step, `[num_tokens, size]`."""
        types = batch.token_types if self._takes_types else None
        more = {} if types is None else {"token_type_ids": types[None]}
        self._step.batch = batch
        try:
            with _attention(self._module, PAGED):
                positions = batch.positions[None] + self._first
                vectors: Tensor = self._module(input_ids=batch.token_ids[None], position_ids=positions, **more)[0]
        finally:
            self._step.batch = None
        return vectors[0]

    @torch.inference_mode()
    def _is_right(self, texts: list[Tensor], dtype: torch.dtype) -> bool:
        """Returns whether the first two of four texts, of two lengths, give the same beside others, and alone."""
        long, short, other_long, other_short = texts
        both, count = self.run(_row_of([long, short])), len(long)
        beside_others = self.run(_row_of([long, other_short]))[:count], self.run(_row_of([other_long, short]))[count:]
        if not torch.equal(both, torch.cat(beside_others)):
            return False
        alone = torch.cat([self._module(input_ids=text[None])[0][0] for text in (long, short)]).float()
        difference = float((both.float() - alone).norm() / alone.norm().clamp(min=1e-12))
        return difference <= TOLERANCE.get(dtype, WIDE_TOLERANCE)


def _depends_on_length(config: Any) -> bool:
    """Returns whether a config says that long texts are computed in another way than the short ones of a trial."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, Mapping)]
    fields = [name for name, value in vars(config).items() if value is not None]
    return any(kind in MOVING_ROPES for kind in kinds) or any(mark in name for name in fields for mark in LOCAL_MARKS)


@contextmanager
def _attention(module: Any, name: str) -> Iterator[None]:
    """Lets a module use another attention function for a while."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}.values()
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


def _trial_texts(config: Any, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Returns four texts of two lengths; the last two have the ids that a module may treat in a way of its own."""
    special = [value for name, value in vars(config).items() if name.endswith("_token_id") and type(value) is int]
    special = [value for value in special if 0 <= value < vocab_size and value != getattr(config, "pad_token_id", None)]
    texts = []
    for start, marked in ((1, []), (101, special)):
        for length in LENGTHS:
            ids = (torch.arange(start, start + length) * 7919 + 2) % vocab_size
            ids[: min(length, len(marked))] = torch.tensor(marked[:length], dtype=ids.dtype)
            texts.append(
                torch.where(ids == getattr(config, "pad_token_id", -1), (ids + 1) % vocab_size, ids).to(device)
            )
    return texts


def _row_of(texts: list[Tensor]) -> ForwardBatch:
    """Returns the batch of texts, as far as a row reads it."""
    device, lengths = texts[0].device, torch.tensor([len(text) for text in texts])
    return ForwardBatch(
        token_ids=torch.cat(texts),
        positions=torch.cat([torch.arange(len(text)) for text in texts]).to(device),
        slot_mappings=(),
        query_start_loc=F.pad(lengths.cumsum(0), (1, 0)).int().to(device),
        seq_lens=lengths.int().to(device),
        block_tables=(),
        rows=torch.arange(len(texts), dtype=torch.int32, device=device),
        longest_prompt=int(lengths.max()),
    )

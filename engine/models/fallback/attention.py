"""`PagedLayer`: the paged attention of one layer of a transformers module, called through its attention interface.

A module of transformers looks its attention function up by name, and calls it with itself as the first argument. We
register one function, which hands the call to the object that the module carries: a `PagedLayer` in an engine, and a
`Recorder` in the trial before it (`trial.py`). So the function needs no state, and no forward pass an argument more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels import paged_attention, store_kv
from ...batch import ForwardBatch, KVCache
from .layer_form import LayerForm

__all__ = ["ATTRIBUTE", "PAGED", "RECORDED", "PagedLayer", "Step", "register"]

PAGED, RECORDED = "millrace", "millrace_trial"
"""Names of the attention function. transformers makes no mask for the first, and our own masks for the second."""

ATTRIBUTE = "millrace_layer"
"""Attribute of an attention module that holds the object to which its calls are handed."""


class AttentionCallee(Protocol):
    """An object that answers the attention calls of a module."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Returns `[1, T, H, D]` for `query`, `[1, H, T, D]`, and `key` and `value`, `[1, K, T, D]`."""


@dataclass(slots=True)
class Step:
    """The step that is being computed, which all layers of a model read.

    Attributes:
        batch: The tokens of the step; None between two steps.
        kv_cache: The caches of the model.
    """

    batch: ForwardBatch | None = None
    kv_cache: KVCache | None = None


class PagedLayer:
    """Stores the keys and values of a layer in the paged cache, and attends to it.

    All layers have the same shape of cache, that of the largest one. A smaller layer stores zeros behind its heads, and
    behind the numbers of a head; neither changes a score.

    Args:
        form: The heads of the layer, and how it scores keys.
        pair: Index of the pair of cache tensors that the layer uses.
        group: Index of the group of layers whose block tables it reads.
        step: The step that is being computed.
    """

    def __init__(self, form: LayerForm, pair: int, group: int, step: Step) -> None:
        self._form = form
        self._pair = pair
        self._group = group
        self._step = step

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """As `AttentionCallee`."""
        form, batch, kv_cache = self._form, self._step.batch, self._step.kv_cache
        assert batch is not None and kv_cache is not None
        k_cache, v_cache = kv_cache[self._pair]
        _, num_kv_heads, _, head_dim = k_cache.shape
        num_heads = form.num_heads // form.num_kv_heads * num_kv_heads
        key, value = (_grown(x, num_kv_heads, head_dim).to(k_cache.dtype) for x in (key, value))
        store_kv(key, value, k_cache, v_cache, batch.slot_mappings[self._group])
        sinks = options.get("s_aux")
        attended = paged_attention(
            _grown(query, num_heads, head_dim).to(k_cache.dtype),
            k_cache,
            v_cache,
            batch.block_tables[self._group],
            batch.seq_lens,
            batch.query_start_loc,
            form.scale,
            form.window,
            softcap=form.softcap,
            sinks=None if sinks is None else F.pad(sinks.float(), (0, num_heads - form.num_heads)),
            num_decodes=batch.num_decodes,
            num_shared=batch.num_shared,
        )
        return attended[:, : form.num_heads, : form.value_dim].to(query.dtype).unsqueeze(0)


def _grown(heads: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Returns `[1, H, T, D]` as contiguous `[T, num_heads, head_dim]`, with zeros where there was nothing."""
    flat = heads[0].transpose(0, 1)
    missing = (0, head_dim - flat.shape[2], 0, num_heads - flat.shape[1])
    return F.pad(flat, missing) if any(missing) else flat.contiguous()


def register() -> None:
    """Registers our attention function and masks with transformers; again is as good as once."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from .masks import trial_mask

    for name in (PAGED, RECORDED):
        ALL_ATTENTION_FUNCTIONS.register(name, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(RECORDED, trial_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Hands a call to the object that the module carries."""
    callee: AttentionCallee = getattr(module, ATTRIBUTE)
    return callee(query, key, value, attention_mask, options), None

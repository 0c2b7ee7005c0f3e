"""Attention of prompts by a library: FlashAttention (Dao, 2023, arXiv:2307.08691), as it comes with torch for GPUs.

A prompt without cached context attends only to its own tokens. So its keys and values can be gathered from the cache
into one piece each, and a library that knows nothing of blocks can compute the rest. For long prompts a library may be
faster than our kernel, which reads blocks through a table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["PromptLibrary"]

logger = logging.getLogger(__name__)

IS_USED = False
"""Whether engines use the library. No GPU has shown yet that it is faster: `benchmarks/attention_sweep.py` compares."""

MAX_HEAD_DIM, HEAD_DIM_UNIT = 256, 8
"""FlashAttention takes heads of up to 256 numbers, in multiples of 8, in 16 bits."""


class PromptLibrary:
    """Attends from whole prompts to themselves with a library, until a call fails; then with nothing.

    Args:
        attend: The library's function, with the arguments of `torch.ops.aten._flash_attention_forward`.
    """

    def __init__(self, attend: Callable[..., tuple[Any, ...]]) -> None:
        self._attend = attend
        self._has_failed = False

    @classmethod
    def choose(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        *,
        softcap: float = 0.0,
        sinks: bool = False,
        alibi: bool = False,
        causal: bool = True,
        deterministic: bool = False,
        is_used: bool = IS_USED,
    ) -> PromptLibrary | None:
        """Returns the library for the attention of a model; None if it is not used or cannot compute this attention.

        Args:
            device: Device of the model.
            dtype: Number type of queries, keys and values.
            head_dim: Size of a head.
            softcap: Limit of the scores, as in `paged_attention`.
            sinks: Whether a learned score takes part in the softmax.
            alibi: Whether scores fall with distance.
            causal: As in `paged_attention`.
            deterministic: As in `paged_attention`.
            is_used: Whether a library is to be used at all.
        """
        attend = getattr(torch.ops.aten, "_flash_attention_forward", None)
        fits = dtype in (torch.float16, torch.bfloat16) and head_dim <= MAX_HEAD_DIM and not head_dim % HEAD_DIM_UNIT
        is_plain = causal and not softcap and not sinks and not alibi and not deterministic
        can = fits and is_plain and device.type == "cuda"
        return cls(attend) if is_used and can and attend is not None else None

    def attend(
        self,
        query: Tensor,
        caches: tuple[Tensor, Tensor],
        slots: Tensor,
        starts: Tensor,
        longest: int,
        scale: float,
        window: int = 0,
    ) -> Tensor | None:
        """Attends from each token of some prompts to the tokens of its prompt up to itself.

        Args:
            query: `[num_tokens, num_heads, head_dim]`.
            caches: Keys and values, `[num_blocks, num_kv_heads, block_size, head_dim]` each, those of the prompts
                included.
            slots: `[num_tokens]` int64, the slot of each token.
            starts: `[num_prompts + 1]` int32, the index of the first token of each prompt, from 0 to num_tokens.
            longest: Number of tokens of the longest prompt.
            scale: As in `paged_attention`.
            window: As in `paged_attention`.

        Returns:
            The result of `paged_attention`; None if the caches have another dtype, or the library has failed.
        """
        if self._has_failed or caches[0].dtype != query.dtype:
            return None
        block_size = caches[0].shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        keys, values = (cache[blocks, :, offsets] for cache in caches)
        sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        lengths = (starts, starts, longest, longest)
        try:
            return self._attend(query.contiguous(), keys, values, *lengths, 0.0, True, False, scale=scale, **sides)[0]
        except RuntimeError as error:
            self._has_failed = True
            logger.warning("prompts are computed by our own attention kernel, because the library failed: %s", error)
            return None

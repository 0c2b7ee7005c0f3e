"""`trial_mask`: finds the windows of a model from the functions with which it makes its masks.

transformers makes a mask from a function that says whether token q attends to token k. In the trial, we are given this
function in place of having it evaluated for all pairs, and look at a few rows of it: a row of a causal mask is true up
to the token itself, and one of a window mask from `window - 1` tokens before. Other masks are refused. The mask that
the model gets and passes on to its layers is a tensor on the meta device that carries the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TrialMask", "trial_mask"]


class TrialMask(Tensor):
    """A mask of the trial, on the meta device. A whole slice of it is the same mask, and any other result is not.

    Attributes:
        window: The window of the mask (0 for none), or text that says why no window describes it. A model may make
            masks that no layer uses, so a mask is refused where a layer uses it. Other results have no such attribute.
    """

    window: int | str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.__getitem__ and hasattr(args[0], "window") and result.shape == args[0].shape:
            result.window = args[0].window
        return result


def trial_mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], config: Any, **_: Any
) -> TrialMask:
    """Returns a mask without content that carries the window of a mask function; called by transformers.

    Args:
        batch_size: Number of sequences.
        q_length: Number of queries.
        kv_length: Number of keys.
        mask_function: Says whether a query attends to a key: `(sequence, head, query, key) -> bool`, on tensors.
        config: The config of the model, with the number of positions for which it was made.

    Returns:
        `[batch_size, 1, q_length, kv_length]` bool, on the meta device.

    """
    shape = (batch_size, 1, q_length, kv_length)
    mask = torch.empty(shape, dtype=torch.bool, device="meta").as_subclass(TrialMask)
    mask.window = _window(mask_function, _probes(config))
    return mask


def _probes(config: Any) -> list[int]:
    """Returns the positions whose rows are looked at: around every length that the config names, and the last one."""
    sizes = {
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and not isinstance(value, bool) and ("window" in name or "chunk" in name)
    }
    last = max(getattr(config, "max_position_embeddings", None) or 4096, *sizes, 64)
    near = {size + offset for size in sizes for offset in (-1, 0, 1, size // 2)}
    return sorted(position for position in {1, 7, 63, last - 1, *near} if 0 < position < last)


def _window(mask_function: Callable[..., Any], probes: list[int]) -> int | str:
    """Returns the window that explains all probed rows, 0 if tokens attend to all before them, or why none does."""
    try:
        rows = {position: _row(mask_function, position) for position in probes}
    except Exception as error:  # noqa: BLE001  # A mask made of the input reads tensors that hold no numbers here.
        why = "it is chunked, blockwise or made of the input"
        return f"depends on more than the positions of tokens: {why} ({error!r:.90})"
    longest = rows[probes[-1]]
    size = int(longest.sum())
    window = size if size <= probes[-1] else 0
    for position, row in rows.items():
        keys = torch.arange(len(row))
        seen = keys <= position
        if window:
            seen &= keys > position - window
        if not torch.equal(row, seen):
            return (
                f"is neither causal nor a window: token {position} attends to {int(row.sum())} of {len(row)} tokens, "
                f"not to {int(seen.sum())}"
            )
    return window


def _row(mask_function: Callable[..., Any], position: int) -> Tensor:
    """Returns whether the token at a position attends to each token up to the one after it, `[position + 2]` bool."""
    zero = torch.zeros((), dtype=torch.int64)
    row = mask_function(zero, zero, torch.tensor(position), torch.arange(position + 2))
    return torch.as_tensor(row).expand(position + 2)

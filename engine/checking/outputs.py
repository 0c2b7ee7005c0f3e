"""`compare_outputs`: what this engine generates, compared with what transformers computes for the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..outputs import Logprob, RequestOutput

__all__ = ["OutputCheck", "compare_outputs"]


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """The comparison for one prompt.

    Attributes:
        prompt: The prompt.
        num_tokens: Number of tokens that were generated and compared.
        first_difference: Index of the first generated token that is not the likeliest of transformers; None if there is
            none. A token that is less likely by no more than the tolerance is no difference.
        ours: The token of this engine there; None without a difference.
        theirs: The token of transformers there; None without a difference.
        max_logprob_error: Largest absolute difference between log-probabilities of the same token.
        same_prompt_tokens: Whether the tokenizers made the same token ids of the prompt.
    """

    prompt: str
    num_tokens: int
    first_difference: int | None
    ours: int | None
    theirs: int | None
    max_logprob_error: float
    same_prompt_tokens: bool


@torch.inference_mode()
def compare_outputs(
    reference: Any, tokenizer: Any, prompt: str, output: RequestOutput, *, tolerance: float
) -> OutputCheck:
    """Compares the greedy output of one prompt with the model of transformers.

    transformers runs once, on the prompt and our output. If each of our tokens is the likeliest one after the tokens
    before it, its own greedy search would have made the same output.

    Args:
        reference: A causal language model of transformers, in float32.
        tokenizer: The tokenizer of transformers.
        prompt: The prompt.
        output: Our output, with log-probabilities.
        tolerance: Largest difference between log-probabilities that passes as rounding.

    Returns:
        The comparison.
    """
    prompt_ids = list(output.prompt_token_ids or ())
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    ids = torch.tensor([prompt_ids + token_ids], device=reference.device)
    logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logprobs = logits[len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    likeliest = logprobs.argmax(-1)
    gaps = logprobs.amax(-1) - logprobs[torch.arange(len(token_ids)), token_ids]
    differing = [i for i, gap in enumerate(gaps.tolist()) if not gap <= tolerance]
    first = differing[0] if differing else None
    return OutputCheck(
        prompt=prompt,
        num_tokens=len(token_ids),
        first_difference=first,
        ours=None if first is None else token_ids[first],
        theirs=None if first is None else int(likeliest[first]),
        max_logprob_error=_max_error(completion.logprobs or (), logprobs),
        same_prompt_tokens=_encode(tokenizer, prompt) == prompt_ids,
    )


def _max_error(ours: Sequence[Mapping[int, Logprob]], theirs: Tensor) -> float:
    """Returns the largest difference over all tokens of which both know the log-probability; NaN counts as infinite."""
    errors = [
        abs(entry.logprob - theirs[step, token].item()) for step, of in enumerate(ours) for token, entry in of.items()
    ]
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    return list(tokenizer(prompt).input_ids)

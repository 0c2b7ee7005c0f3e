"""Reference results, from implementations that are not ours: Hugging Face's `generate` in float32."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


@dataclass(frozen=True)
class Reference:
    """The result of greedy search for one prompt.

    Attributes:
        token_ids: Generated tokens.
        logprobs: `[num_tokens, vocab_size]` float32, log-softmax of the raw logits at each step.
    """

    token_ids: list[int]
    logprobs: torch.Tensor


@torch.inference_mode()
def greedy(folder: Path, prompts: list[list[int]], max_tokens: int, **settings: Any) -> list[Reference]:
    """Runs Hugging Face's greedy search, prompts of equal length together, so that nothing is padded.

    `settings` are further arguments of `from_pretrained`.
    """
    settings = {"dtype": torch.float32, "attn_implementation": "eager", **settings}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config = config
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    results: dict[int, Reference] = {}
    for length, where in by_length.items():
        ids = torch.tensor([prompts[i] for i in where])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logprobs = torch.stack(out.logits, dim=1).float().log_softmax(dim=-1)
        for row, i in enumerate(where):
            results[i] = Reference(out.sequences[row, length:].tolist(), logprobs[row])
    return [results[i] for i in range(len(prompts))]


@torch.inference_mode()
def score_prompt(folder: Path, prompt: list[int]) -> torch.Tensor:
    """Returns the log-softmax after each prompt token, `[num_tokens, vocab_size]` float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(torch.tensor([prompt])).logits[0].float().log_softmax(dim=-1)

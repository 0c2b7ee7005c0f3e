"""Other engines, behind the interface that offline.py times."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from workloads import TEMPERATURE, Workload


class TransformersEngine:
    """The continuous batching of transformers, with its paged attention and its own choice of sizes.

    Args:
        folder: Holds config.json; the weights are drawn by transformers.
        device: "cpu" or "cuda".
        dtype: "bfloat16" or "float32".
    """

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
        # top_k is off, as everywhere else in these benchmarks; transformers' own default is 50.
        sampling = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=0, eos_token_id=-1, pad_token_id=0)
        # The library chooses the sizes; on a CPU the cache must leave memory to others (2 % of 24 GiB was too little).
        sizes = ContinuousBatchingConfig(max_memory_percent=None if device == "cuda" else 0.05)
        self._open = contextlib.ExitStack()
        self._manager: Any = self._open.enter_context(
            model.eval()
            .requires_grad_(False)
            .continuous_batching_context_manager(generation_config=sampling, continuous_batching_config=sizes)
        )

    def close(self) -> None:
        """Gives the memory back."""
        self._open.close()

    def generate(self, workload: Workload) -> list[int]:
        """Runs all requests.

        Raises:
            RuntimeError: The background thread stopped, or a request failed.
        """
        ids = [
            self._manager.add_request(prompt, max_new_tokens=num_out)
            for prompt, num_out in zip(workload.prompts, workload.max_tokens, strict=True)
        ]
        lengths: dict[str, int] = {}
        while len(lengths) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before the last request ended")
            if result is not None and result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed on a request: {result.error}")
            if result is not None and result.is_finished():
                lengths[result.request_id] = len(result.generated_tokens)
        return [lengths[request_id] for request_id in ids]

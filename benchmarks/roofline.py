"""Computes the least time of a list of requests: the sum over its steps of the time to read and compute.

    step = max(weights / bandwidth, products / peak) + attention of prompts / peak + KV cache read / bandwidth

Weights and KV cache are the bytes that one step reads; the peaks are those of the element types in use. The steps
are those of a scheduler that fills a token budget, running requests first, with no limit of memory and no time between
steps. The limits are measured (limits.py), so an engine can be faster than a term only by a little, and faster than the
sum only where terms overlap in time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from limits import Limits
from models import ModelShape
from workloads import Workload


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a machine.

    Attributes:
        shape: The model.
        limits: The measured limits of the machine.
        dtype: "bfloat16" or "float32": weights, activations, and the KV cache if `kv_cache_dtype` is "auto".
        quantization: "fp8" or "int8" if the layers' matrices are 8 bits wide; "int4" if they have 4 bits in groups of
            64, and the output head 8. With the others the head has the model's own dtype.
        kv_cache_dtype: "fp8" or "auto".
    """

    shape: ModelShape
    limits: Limits
    dtype: str
    quantization: str | None = None
    kv_cache_dtype: str = "auto"

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the model's own dtype."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one step reads."""
        if self.quantization == "int4":
            scale_bits = 8 * self.itemsize / 64
            num_bits = self.shape.num_layer_params * (4 + scale_bits) + self.shape.num_head_params * (8 + scale_bits)
            return int(num_bits / 8)
        layer_itemsize = 1 if self.quantization else self.itemsize
        return self.shape.num_layer_params * layer_itemsize + self.shape.num_head_params * self.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token, in all layers."""
        return self.shape.num_kv_numbers * (1 if self.kv_cache_dtype == "fp8" else self.itemsize)

    def step_seconds(self, num_tokens: int, num_logits: int, num_pairs: int, num_kv_tokens: int) -> float:
        """Returns the least time of one step.

        Args:
            num_tokens: Tokens computed.
            num_logits: Tokens whose logits are needed.
            num_pairs: Pairs of a prompt's query and a key that it sees.
            num_kv_tokens: Tokens of KV cache that decoding requests read.
        """
        peak = self.limits.flops_per_s[self.dtype]
        # Without a measured product of 8-bit numbers the peak is that of the model's dtype.
        layer_peak = self.limits.flops_per_s.get(self.quantization or self.dtype, peak)
        products_s = 2 * num_tokens * self.shape.num_layer_params / layer_peak
        products_s += 2 * num_logits * self.shape.num_head_params / peak
        weights_s = self.weight_bytes / self.limits.copy_bytes_per_s
        kv_s = num_kv_tokens * self.kv_bytes_per_token / self.limits.copy_bytes_per_s
        return max(weights_s, products_s) + num_pairs * self.shape.num_attention_flops / peak + kv_s


@dataclass(slots=True)
class _Sequence:
    """The lengths of a request."""

    num_computed: int
    num_prompt: int
    num_left: int


@dataclass(slots=True)
class _Step:
    """The work of one step; the fields are the arguments of `Roofline.step_seconds`."""

    num_tokens: int = 0
    num_logits: int = 0
    num_pairs: int = 0
    num_kv_tokens: int = 0

    def decode(self, sequence: _Sequence, num_shared: int) -> None:
        """Adds one token of a request; the step reads the shared prefix once."""
        sequence.num_computed += 1
        self.num_tokens += 1
        self.num_logits += 1
        self.num_kv_tokens += sequence.num_computed - num_shared
        sequence.num_left -= 1

    def prefill(self, sequence: _Sequence, budget: int) -> None:
        """Adds as many tokens of a prompt as the budget allows; the end of the prompt yields the first token."""
        chunk = min(budget, sequence.num_prompt - sequence.num_computed)
        self.num_tokens += chunk
        self.num_pairs += chunk * sequence.num_computed + chunk * (chunk + 1) // 2
        sequence.num_computed += chunk
        if sequence.num_computed == sequence.num_prompt:
            self.num_logits += 1
            sequence.num_left -= 1


def ideal_seconds(roofline: Roofline, workload: Workload, max_num_seqs: int, max_num_batched_tokens: int) -> float:
    """Returns the least time in which a workload can run.

    A prefix that all prompts share is computed once, and read once per step.

    Args:
        roofline: The model on the machine.
        workload: The requests.
        max_num_seqs: Most requests running at once.
        max_num_batched_tokens: Most tokens per step.
    """
    num_shared = workload.num_shared
    waiting = deque(
        _Sequence(num_shared if i else 0, len(prompt), num_out)
        for i, (prompt, num_out) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True))
    )
    running: list[_Sequence] = []
    seconds = 0.0
    while waiting or running:
        step = _Step()
        unfinished = [sequence for sequence in running if sequence.num_computed < sequence.num_prompt]
        for sequence in running:
            if sequence.num_computed >= sequence.num_prompt:
                step.decode(sequence, num_shared)
        step.num_kv_tokens += num_shared if step.num_tokens else 0
        while step.num_tokens < max_num_batched_tokens and (unfinished or waiting):
            if not unfinished:
                if len(running) == max_num_seqs:
                    break
                running.append(waiting.popleft())
                unfinished.append(running[-1])
            step.prefill(unfinished.pop(), max_num_batched_tokens - step.num_tokens)
        seconds += roofline.step_seconds(step.num_tokens, step.num_logits, step.num_pairs, step.num_kv_tokens)
        running = [sequence for sequence in running if sequence.num_left > 0]
    return seconds

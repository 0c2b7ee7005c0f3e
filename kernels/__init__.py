"""The maths of the engine, one folder per op.

Each op is a function on torch tensors that runs the best implementation for their device (`_op.py` says how). It knows
nothing about requests, schedulers or models, and imports nothing else of Millrace. Importing this package loads torch,
but neither numba nor triton.
"""

from __future__ import annotations

from .layer_norm import layer_norm
from .paged_attention import paged_attention
from .rms_norm import rms_norm
from .rotary import rotary
from .sample import sample
from .silu_and_mul import silu_and_mul
from .store_kv import store_kv
from .top_logprobs import top_logprobs

__all__ = [
    "layer_norm",
    "paged_attention",
    "rms_norm",
    "rotary",
    "sample",
    "silu_and_mul",
    "store_kv",
    "top_logprobs",
]

"""The maths of the engine, one folder per op.

Each op is a function on torch tensors that runs the best implementation for their device (`_op.py` chooses it). Ops
know nothing about requests, schedulers or models, and import no other part of Millrace. Importing this package loads
torch, but neither numba nor triton.
"""

from __future__ import annotations

from .disentangled_attention import disentangled_attention
from .embedding import embedding
from .experts import experts
from .fp8_linear import fp8_linear
from .gate_and_mul_fp8 import gate_and_mul_fp8
from .gated_delta import gated_delta
from .gather_batch import gather_batch
from .gelu_and_mul import gelu_and_mul
from .greedy import greedy
from .group_linear import group_linear
from .int8_linear import int8_linear
from .invariant_linear import invariant_linear
from .latent_attention import latent_attention
from .layer_norm import layer_norm
from .lora import lora
from .packed_gated_linear import packed_gated_linear
from .packed_group_embedding import packed_group_embedding
from .packed_group_linear import packed_group_linear
from .packed_linear import packed_linear
from .paged_attention import paged_attention
from .quantize_fp8 import quantize_fp8
from .quantize_int8 import quantize_int8
from .rms_norm import rms_norm
from .rms_norm_fp8 import rms_norm_fp8
from .rope_and_store import rope_and_store
from .rope_and_store_latent import rope_and_store_latent
from .sample import sample
from .sample_shard import sample_shard
from .scaled_int8_linear import scaled_int8_linear
from .scaled_linear import scaled_linear
from .short_conv import short_conv
from .silu_and_mul import silu_and_mul
from .state_scan import state_scan
from .store_kv import store_kv
from .top_logprobs import top_logprobs
from .varlen_attention import varlen_attention

__all__ = [
    "disentangled_attention",
    "embedding",
    "experts",
    "fp8_linear",
    "gate_and_mul_fp8",
    "gated_delta",
    "gather_batch",
    "gelu_and_mul",
    "greedy",
    "group_linear",
    "int8_linear",
    "invariant_linear",
    "latent_attention",
    "layer_norm",
    "lora",
    "packed_gated_linear",
    "packed_group_embedding",
    "packed_group_linear",
    "packed_linear",
    "paged_attention",
    "quantize_fp8",
    "quantize_int8",
    "rms_norm",
    "rms_norm_fp8",
    "rope_and_store",
    "rope_and_store_latent",
    "sample",
    "sample_shard",
    "scaled_int8_linear",
    "scaled_linear",
    "short_conv",
    "silu_and_mul",
    "state_scan",
    "store_kv",
    "top_logprobs",
    "varlen_attention",
]

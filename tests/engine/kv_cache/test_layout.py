"""The tensors of the KV cache: their sizes, and that values of latents take no memory of their own."""

from __future__ import annotations

import torch

from millrace.engine.kv_cache import CacheShape, allocate_kv_cache, kv_block_bytes

DEEPSEEK_V3 = CacheShape(num_pairs=61, num_heads=1, head_dim=512 + 64, latent_rank=512)


def test_a_block_of_latents_has_one_vector_for_each_token_and_layer() -> None:
    assert kv_block_bytes(DEEPSEEK_V3, 16, torch.bfloat16) == 61 * 16 * 576 * 2
    keys_and_values = CacheShape(num_pairs=61, num_heads=128, head_dim=192)
    assert kv_block_bytes(keys_and_values, 16, torch.bfloat16) == 61 * 16 * 2 * 128 * 192 * 2


def test_the_values_of_latents_are_a_view_of_their_first_numbers() -> None:
    shape = CacheShape(num_pairs=2, num_heads=1, head_dim=7, latent_rank=5)
    cache = allocate_kv_cache(shape, 3, 4, dtype=torch.float32, device=torch.device("cpu"))
    assert len(cache) == 2
    for latents, values in cache:
        assert latents.nbytes == 3 * kv_block_bytes(shape, 4, torch.float32) // shape.num_pairs
        latents.copy_(torch.arange(7.0))
        assert values.shape == (3, 1, 4, 5)
        assert torch.equal(values, torch.arange(5.0).expand(3, 1, 4, 5))

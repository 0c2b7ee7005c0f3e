"""The plain bodies against somebody else's: torch.nn.functional and Hugging Face."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from millrace.kernels import layer_norm, rms_norm, rotary, silu_and_mul, store_kv, top_logprobs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_rms_norm_is_torchs_and_hugging_faces():
    x, residual, weight = torch.randn(9, 48), torch.randn(9, 48), torch.randn(48)
    out, new_residual = rms_norm.plain(x, weight, 1e-5, residual)
    torch.testing.assert_close(new_residual, x + residual)
    torch.testing.assert_close(out, F.rms_norm(x + residual, (48,), weight, 1e-5))
    module = LlamaRMSNorm(48, eps=1e-5)
    module.weight.data = weight
    torch.testing.assert_close(out, module(x + residual))


def test_the_residual_is_rounded_before_it_is_normalised():
    x, residual, weight = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((5, 64), (5, 64), (64,)))
    for implementation in (rms_norm.plain, rms_norm):
        out, new_residual = implementation(x, weight, 1e-6, residual)
        assert torch.equal(new_residual, x + residual)
        assert torch.equal(out, implementation(new_residual, weight, 1e-6)[0])


def test_layer_norm_by_its_formula():
    x, residual, weight, bias = torch.randn(9, 48), torch.randn(9, 48), torch.randn(48), torch.randn(48)
    out, new_residual = layer_norm(x, weight, bias, 1e-5, residual)
    total = (x + residual).double()
    normal = (total - total.mean(-1, keepdim=True)) / (total.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out.double(), normal * weight + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_residual, x + residual)
    torch.testing.assert_close(layer_norm(x, None, None, 1e-5)[0], F.layer_norm(x, (48,)))


@pytest.mark.parametrize(("head_dim", "rot_dim"), [(32, 32), (80, 32)])
def test_rotary_is_hugging_faces(head_dim, rot_dim):
    num_tokens = 11
    query, key = torch.randn(num_tokens, 6, head_dim), torch.randn(num_tokens, 2, head_dim)
    frequencies = 10_000.0 ** -(torch.arange(0, rot_dim, 2) / rot_dim)
    angles = torch.arange(100).unsqueeze(-1) * frequencies
    positions = torch.randint(0, 100, (num_tokens,))
    cos, sin = (torch.cat((half, half), -1)[positions].unsqueeze(0) for half in (angles.cos(), angles.sin()))
    heads = (x[..., :rot_dim].transpose(0, 1).unsqueeze(0) for x in (query, key))  # [1, heads, tokens, rot_dim]
    wanted = [x.squeeze(0).transpose(0, 1) for x in apply_rotary_pos_emb(*heads, cos, sin)]
    rest = [x[..., rot_dim:].clone() for x in (query, key)]
    assert rotary(positions, query, key, torch.cat((angles.cos(), angles.sin()), -1)) is None
    for actual, rotated, kept in zip((query, key), wanted, rest, strict=True):
        torch.testing.assert_close(actual[..., :rot_dim], rotated)
        assert torch.equal(actual[..., rot_dim:], kept)


def test_silu_and_mul_by_its_formula():
    gate, up = torch.randn(5, 24), torch.randn(5, 24)
    torch.testing.assert_close(silu_and_mul(torch.cat((gate, up), -1)), gate / (1 + (-gate).exp()) * up)


def test_store_kv_writes_its_slots_and_no_other():
    k_cache, v_cache = torch.zeros(5, 2, 4, 3), torch.zeros(5, 2, 4, 3)
    key, value = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    store_kv(key, value, k_cache, v_cache, torch.tensor([0, 19, 6]))
    for token, (block, offset) in enumerate(((0, 0), (4, 3), (1, 2))):
        assert torch.equal(k_cache[block, :, offset], key[token])
        assert torch.equal(v_cache[block, :, offset], value[token])
    assert k_cache.count_nonzero() == v_cache.count_nonzero() == key.numel()


def test_top_logprobs_are_those_of_the_log_softmax():
    logits = torch.randn(6, 50) * 3
    token_ids = torch.randint(0, 50, (6,))
    logprobs, ids, ranks = top_logprobs(logits, token_ids, 4)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, ids))
    assert torch.equal(ids[:, 0], token_ids)
    ordered = logits.argsort(-1, descending=True)
    assert torch.equal(ids[:, 1:], ordered[:, :4])
    assert torch.equal((ordered == token_ids.unsqueeze(-1)).int().argmax(-1) + 1, ranks)


def test_the_rank_counts_strictly_larger_logits():
    ranks = top_logprobs(torch.tensor([[2.0, 5.0, 5.0, 1.0]] * 3), torch.tensor([1, 2, 0]), 0)[2]
    assert ranks.tolist() == [1, 1, 3]

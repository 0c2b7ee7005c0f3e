"""The plain bodies against other implementations: torch.nn.functional and Hugging Face."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.bamba.modeling_bamba import causal_conv1d_fn, mamba2_chunk_scan
from transformers.models.cohere import modeling_cohere
from transformers.models.deberta_v2.configuration_deberta_v2 import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, make_log_bucket_position
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from millrace.kernels import (
    disentangled_attention,
    experts,
    gated_delta,
    gather_batch,
    gelu_and_mul,
    latent_attention,
    layer_norm,
    quantize_fp8,
    quantize_int8,
    rms_norm,
    rope_and_store,
    rope_and_store_latent,
    short_conv,
    silu_and_mul,
    state_scan,
    store_kv,
    top_logprobs,
)
from millrace.kernels.experts import CodedMatrices


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_a_unit_offset_is_gemmas(dtype):
    x, weight = torch.randn(9, 48).to(dtype), (torch.randn(48) / 64).to(dtype)
    module = Gemma2RMSNorm(48, eps=1e-6)
    module.weight.data = weight
    assert torch.equal(rms_norm(x, weight, 1e-6, add_unit_offset=True)[0], module(x))


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


def rope_by_hugging_face(x, positions, angles, interleaved):
    """Rotates the first numbers of each head, twice as many as there are angles, as Llama or Cohere of transformers."""
    rot_dim = 2 * angles.shape[1]
    table = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    cos, sin = (values[positions].unsqueeze(0) for values in (table.cos(), table.sin()))
    heads = x[..., :rot_dim].transpose(0, 1).unsqueeze(0)  # [1, heads, tokens, rot_dim]
    rotate = modeling_cohere.apply_rotary_pos_emb if interleaved else apply_rotary_pos_emb
    rotated = rotate(heads, heads, cos, sin)[0].squeeze(0).transpose(0, 1)
    return torch.cat((rotated, x[..., rot_dim:]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("implementation", [rope_and_store.plain, rope_and_store])
@pytest.mark.parametrize(("head_dim", "rot_dim"), [(8, 8), (8, 6), (80, 32)])
def test_rope_and_store_is_a_norm_hugging_faces_rotation_and_a_store(
    implementation, norm, head_dim, rot_dim, interleaved
):
    fused = torch.randn(5, 6 + 2 * 2, head_dim)
    query, key, value = (part.clone() for part in fused.split((6, 2, 2), dim=1))
    angles, positions = torch.randn(30, rot_dim // 2), torch.randint(0, 30, (5,))
    slots, table = torch.tensor([3, -1, 0, 7, 6]), torch.cat((angles.cos(), angles.sin()), -1)
    weights = (torch.randn(head_dim), torch.randn(head_dim)) if norm else (None, None)
    parts, whole = torch.zeros(2, 2, 2, 2, 4, head_dim)
    if norm:
        query, key = (rms_norm(x, weight, 1e-5)[0] for x, weight in zip((query, key), weights, strict=True))
    query, key = (rope_by_hugging_face(x, positions, angles, interleaved) for x in (query, key))
    store_kv(key, value, *parts, slots)
    views, before = fused.split((6, 2, 2), dim=1), fused.clone()
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-5, "interleaved": interleaved}
    implementation(*views, *whole, slots, positions, table, **options)
    torch.testing.assert_close(fused[:, :6], query)
    torch.testing.assert_close(whole, parts)
    assert torch.equal(fused[:, 6:], before[:, 6:])


def test_attention_over_latents_is_attention_over_the_keys_and_values_made_of_them():
    """Up-projections that are absorbed into queries and results give what expanded keys and values give."""
    num_heads, nope_dim, rope_dim, rank, value_dim, num_tokens = 3, 6, 4, 10, 5, 7
    keys_up, values_up = torch.randn(num_heads, nope_dim, rank), torch.randn(num_heads, value_dim, rank)
    latents, query = torch.randn(num_tokens, rank + rope_dim), torch.randn(num_tokens, num_heads, nope_dim + rope_dim)
    compressed, rotated = latents.split((rank, rope_dim), dim=-1)
    keys = torch.cat((compressed @ keys_up.mT, rotated.expand(num_heads, -1, -1)), -1)
    expected = F.scaled_dot_product_attention(
        query.transpose(0, 1), keys, compressed @ values_up.mT, is_causal=True, scale=0.3
    )
    absorbed = torch.cat((torch.einsum("thn,hnr->thr", query[..., :nope_dim], keys_up), query[..., nope_dim:]), -1)
    cache = torch.zeros(3, 1, 4, rank + rope_dim)
    cache[[2, 0]] = F.pad(latents, (0, 0, 0, 1)).view(2, 1, 4, -1)
    lengths = (torch.tensor([num_tokens], dtype=torch.int32), torch.tensor([0, num_tokens], dtype=torch.int32))
    for implementation in (latent_attention.plain, latent_attention):
        out = implementation(absorbed, cache, torch.tensor([[2, 0]], dtype=torch.int32), *lengths, 0.3, rank)
        torch.testing.assert_close(torch.einsum("thr,hvr->htv", out, values_up), expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_pairs_of_latents_and_queries_are_rotated_as_hugging_face_rotates_them(interleaved):
    query, latent, weight = torch.randn(5, 3, 6), torch.randn(5, 8 + 6), torch.randn(8)
    angles, positions = torch.randn(30, 3), torch.randint(0, 30, (5,))
    cos, sin = (torch.cat((half, half), -1)[positions].unsqueeze(0) for half in (angles.cos(), angles.sin()))
    rotate = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    heads, shared = query.transpose(0, 1).unsqueeze(0).clone(), latent[None, None, :, 8:]
    expected = [x[0].transpose(0, 1) for x in rotate(heads, shared, cos, sin)]
    cache, table = torch.zeros(2, 1, 4, 14), torch.cat((angles.cos(), angles.sin()), -1)
    slots = torch.tensor([3, -1, 0, 7, 6])
    rope_and_store_latent(query, latent, cache, slots, positions, table, weight, 1e-5, interleaved=interleaved)
    # Its interleaved rotation puts the first numbers of all pairs before the second ones, in queries and keys alike.
    as_pairs = [x.unflatten(-1, (2, 3)).mT.flatten(-2) if interleaved else x for x in expected]
    torch.testing.assert_close(query, as_pairs[0])
    stored = torch.cat((F.rms_norm(latent[:, :8], (8,), weight, 1e-5), as_pairs[1].squeeze(1)), -1)
    torch.testing.assert_close(cache.flatten(0, 2)[slots[slots >= 0]], stored[slots >= 0])
    assert not cache.flatten(0, 2)[[1, 2, 4, 5]].any()


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


@pytest.mark.parametrize(("approximate", "activation"), [("none", GELUActivation()), ("tanh", NewGELUActivation())])
def test_gelu_and_mul_is_hugging_faces(approximate, activation):
    gate, up = torch.randn(5, 24), torch.randn(5, 24)
    torch.testing.assert_close(gelu_and_mul(torch.cat((gate, up), -1), approximate), activation(gate) * up)


def test_a_token_without_a_slot_is_not_stored():
    k_cache, v_cache = torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3)
    key, value = torch.randn(3, 1, 3), torch.randn(3, 1, 3)
    store_kv(key, value, k_cache, v_cache, torch.tensor([-1, 5, -7]))
    assert torch.equal(k_cache[1, :, 1], key[1])
    assert torch.equal(v_cache[1, :, 1], value[1])
    assert k_cache.count_nonzero() == v_cache.count_nonzero() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_8_bit_cache_rounds_to_even_and_saturates(dtype):
    numbers = [1.0625, 1.1875, -1e4, 464.0, 2.0**-10, 3 * 2.0**-10, torch.nan]
    stored = torch.tensor([1.0, 1.25, -448.0, 448.0, 0.0, 2.0**-8, torch.nan])
    key = torch.tensor(numbers, dtype=dtype).view(1, 1, 7)
    k_cache, v_cache = torch.zeros(2, 1, 1, 4, 7).to(torch.float8_e4m3fn)
    store_kv(key, -key, k_cache, v_cache, torch.tensor([2]))
    torch.testing.assert_close(k_cache[0, 0, 2].float(), stored, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_cache[0, 0, 2].float(), -stored, rtol=0, atol=0, equal_nan=True)


def test_rope_and_store_keeps_what_it_does_not_change_to_the_bit():
    fused = torch.randn(4, 4, 16).half()
    fused[:, :, -1] = torch.tensor([6e-8, -3e-5, 65504.0, torch.inf]).half()  # subnormals, the largest, infinity
    before, cache = fused.clone(), torch.zeros(2, 1, 1, 4, 16).half()
    table = torch.cat((torch.ones(1, 4), torch.zeros(1, 4)), -1)  # no turn
    rope_and_store(*fused.split((2, 1, 1), dim=1), *cache, torch.arange(4), torch.zeros(4, dtype=torch.int64), table)
    assert torch.equal(fused, before)
    assert torch.equal(cache[0, 0, 0], before[:, 2])
    assert torch.equal(cache[1, 0, 0], before[:, 3])


def test_rope_and_store_takes_both_weights_or_neither():
    x, cache = torch.randn(1, 1, 4), torch.zeros(1, 1, 4, 4)
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="give both or neither"):
        rope_and_store(x, x, x, cache, cache, index, index, torch.randn(1, 4), q_weight=torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_rows_use_the_whole_range_and_come_back_within_half_a_step(dtype):
    x = (torch.randn(6, 100) * 10.0 ** torch.arange(-3, 3).unsqueeze(-1)).to(dtype)
    x[5] = 0
    q, scale = quantize_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == (6, 1)
    assert q.float().abs().amax(-1).tolist() == [448.0] * 5 + [0.0]
    assert scale[5] == 1
    error = (q.float() * scale - x.float()).abs()
    assert (error <= x.float().abs() / 16 + scale * 2.0**-10).all()


def test_groups_of_columns_are_quantised_as_rows_of_their_own_and_a_given_scale_clamps():
    x = torch.randn(3, 300)
    values, scales = quantize_fp8(x, group_size=128)
    for index, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        alone, scale = quantize_fp8(x[:, columns])
        assert torch.equal(values[:, columns].float(), alone.float()) and torch.equal(
            scales[:, index : index + 1], scale
        )
    values, scales = quantize_fp8(torch.tensor([[1.0, -3.0, 0.3]]), torch.tensor([1 / 256]))
    assert (values.float() * scales).tolist() == [[1.0, -1.75, 0.3125]]


def test_a_row_with_nan_or_infinity_shows_it_in_its_scale():
    x = torch.ones(4, 5)
    x[1, 2], x[2, 3] = torch.nan, -torch.inf
    values, scales = quantize_int8(x)
    assert scales[1].isnan() and scales[2].isinf()
    assert values[1:3].eq(0).all() and values[::3].eq(127).all()


@pytest.mark.parametrize("zero_point", [0, -128, 3])
def test_static_integers_come_back_within_half_a_step_and_end_where_their_range_ends(zero_point):
    x, scale = torch.randn(6, 100) * 4, 0.02
    given = torch.tensor([zero_point], dtype=torch.int32) if zero_point else None
    values, scales = quantize_int8(x, torch.tensor([scale]), given)
    assert torch.equal(scales, torch.full((6,), scale))
    low, high = ((end - zero_point) * scale for end in (-128, 127))
    inside = x.clamp(low, high)
    assert (x != inside).any() and values.min() == -128
    assert (((values - float(zero_point)) * scale) - inside).abs().max() <= scale * 0.5001


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


def test_gather_batch_is_what_a_loop_over_sequences_finds():
    tokens = torch.arange(60, dtype=torch.int32).view(5, 12)
    blocks = torch.arange(20, dtype=torch.int32).flip(0).view(5, 4)
    sequences = [(3, 11, 1), (0, 0, 5), (-1, 0, 1), (2, 4, 6)]  # row (-1 is padding), start, count
    offsets = [0, 1, 6, 7]
    plan = torch.tensor([[*each, offset] for each, offset in zip(sequences, offsets, strict=True)], dtype=torch.int32).T
    found = gather_batch(tokens, blocks, plan.contiguous(), 13, 4, 3)
    expected: list[list[int]] = [[], [], []]
    for row, start, count in sequences:
        for position in range(start, start + count):
            slot = -1 if row < 0 else int(blocks[row, position // 3]) * 3 + position % 3
            values = (0 if row < 0 else int(tokens[row, position]), position, slot)
            for column, value in zip(expected, values, strict=True):
                column.append(value)
    assert [column.tolist() for column in found[:3]] == expected
    assert found[3].tolist() == [*offsets, 13]
    assert found[4].tolist() == [12, 5, 0, 10]
    assert found[5].tolist() == [blocks[3].tolist(), blocks[0].tolist(), [0] * 4, blocks[2].tolist()]


SIZES = {"num_local_experts": 5, "hidden_size": 24, "intermediate_size": 18}


def routed():
    """Returns hidden states, the ids of 2 of 5 experts for each of them, and their weights."""
    expert_ids = torch.stack([torch.randperm(5)[:2] for _ in range(9)]).int()
    return torch.randn(9, 24), expert_ids, torch.randn(9, 2).softmax(-1)


def call_module(module, hidden, expert_ids, weights):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        return module(hidden, expert_ids.long(), weights)


@pytest.mark.parametrize("implementation", [experts.plain, experts])
@pytest.mark.parametrize(
    ("gate", "hidden_act"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
def test_experts_are_those_of_mixtral(implementation, gate, hidden_act):
    module, (hidden, expert_ids, weights) = MixtralExperts(MixtralConfig(**SIZES, hidden_act=hidden_act)), routed()
    wanted = call_module(module, hidden, expert_ids, weights)
    w13, w2 = module.gate_up_proj.detach(), module.down_proj.detach()
    out = implementation(hidden, w13, w2, expert_ids, weights, gate=gate)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("implementation", [experts.plain, experts])
def test_experts_with_a_clamped_gate_and_biases_are_those_of_gpt_oss(implementation):
    module, (hidden, expert_ids, weights) = GptOssExperts(GptOssConfig(**SIZES)), routed()
    wanted = call_module(module, hidden, expert_ids, weights)
    w13, w13_bias = module.gate_up_proj.detach(), module.gate_up_proj_bias.detach()
    assert (torch.einsum("th,ehr->etr", hidden, w13) > 7).any()  # The limit matters.
    # There the columns of the gate and of what it is multiplied by alternate.
    w13, w13_bias = (torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in (w13, w13_bias.unsqueeze(1)))
    w13, w2 = (x.transpose(1, 2).contiguous() for x in (w13, module.down_proj.detach()))
    biases = {"w13_bias": w13_bias.squeeze(1), "w2_bias": module.down_proj_bias.detach()}
    out = implementation(hidden, w13, w2, expert_ids, weights, gate="clamped_swiglu", **biases)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("implementation", [experts.plain, experts])
def test_experts_without_a_gate_by_their_formula(implementation):
    hidden, expert_ids, weights = routed()
    w1, w2 = torch.randn(5, 18, 24), torch.randn(5, 24, 18)
    out = implementation(hidden, w1, w2, expert_ids, weights, gate="relu_squared")
    for token in range(9):
        pairs = zip(expert_ids[token].tolist(), weights[token], strict=True)
        wanted = sum(weight * w2[e] @ (w1[e] @ hidden[token]).clamp(min=0) ** 2 for e, weight in pairs)
        torch.testing.assert_close(out[token], wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("implementation", [experts.plain, experts])
def test_padding_and_experts_of_other_ranks_add_nothing(implementation):
    hidden, expert_ids, weights = routed()
    w13, w2 = torch.randn(5, 36, 24), torch.randn(5, 24, 18)
    whole = implementation(hidden, w13, w2, expert_ids, weights, gate="silu")
    halves = [
        implementation(hidden, w13[part], w2[part], expert_ids - part.start, weights, gate="silu")
        for part in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-3)
    hidden[4], expert_ids[4] = torch.nan, -1
    padded = implementation(hidden, w13, w2, expert_ids, weights, gate="silu")
    assert padded[4].tolist() == [0.0] * 24
    others = torch.arange(9) != 4
    torch.testing.assert_close(padded[others], whole[others], rtol=1e-5, atol=1e-3)


def test_codes_of_experts_in_mxfp4_are_those_of_gpt_oss():
    blocks, scales = (torch.randint(0, 256, (2, 3, 4, 16)), torch.randint(100, 140, (2, 3, 4)))
    blocks, scales = blocks.to(torch.uint8), scales.to(torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).float()
    coded = CodedMatrices("e2m1", blocks.flatten(2), scales, None, 32)
    assert [*coded.shape] == [*wanted.shape]
    assert all(torch.equal(coded.dequantise(expert, torch.float32), wanted[expert]) for expert in range(2))


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_codes_of_experts_that_are_integers_by_their_formula(kind):
    bits = int(kind.removeprefix("int"))
    integers, zeros = torch.randint(0, 2**bits, (3, 5, 64)), torch.randint(0, 2**bits, (3, 5, 2))
    scales = torch.rand(3, 5, 2)
    words = sum(integers[..., i :: 32 // bits] << (bits * i) for i in range(32 // bits))
    codes = torch.where(words < 2**31, words, words - 2**32).to(torch.int32).view(torch.uint8)
    for given in (zeros, None):
        own = torch.full_like(zeros, 2 ** (bits - 1)) if given is None else given
        coded = CodedMatrices(kind, codes, scales, None if given is None else given.to(torch.uint8), 32)
        wanted = (integers - own.repeat_interleave(32, -1)) * scales.repeat_interleave(32, -1)
        assert torch.equal(coded.dequantise(1, torch.float32), wanted[1])


def test_groups_of_codes_that_no_kernel_can_multiply_are_refused():
    codes, scales = torch.zeros((1, 4, 64), dtype=torch.uint8), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="groups of 16 columns; they must be multiples of 32, or whole rows"):
        CodedMatrices("int8", codes, scales, None, 16)
    with pytest.raises(ValueError, match=r"scales of shape \[1, 4, 4\], and zeros, must have shape \[1, 4, 2\]"):
        CodedMatrices("int8", codes, scales, None, 32)
    with pytest.raises(ValueError, match="codes of kind e2m1 have no zero points"):
        CodedMatrices("e2m1", codes, scales, scales.to(torch.uint8), 32)


def one_sequence(num_tokens: int, num_computed: int = 0) -> tuple[torch.Tensor, ...]:
    """Returns row, first tokens and length of one sequence that owns row 1."""
    numbers = [1], [0, num_tokens], [num_computed + num_tokens]
    return tuple(torch.tensor(each, dtype=torch.int32) for each in numbers)


def test_short_conv_is_hugging_faces():
    x, weight, bias, state = torch.randn(9, 5), torch.randn(5, 4), torch.randn(5), torch.randn(3, 3, 5)
    out = short_conv.plain(x, weight, bias, state, *one_sequence(9))
    expected = causal_conv1d_fn(x.T.unsqueeze(0), weight, bias, activation="silu")[0].T
    torch.testing.assert_close(out, expected)
    assert torch.equal(state[1], x[-3:])


def test_state_scan_is_hugging_faces_from_a_state_on():
    x, dt, state = torch.randn(11, 4, 6), torch.randn(11, 4), torch.randn(3, 4, 6, 5)
    (b, c), heads = (
        torch.randn(2, 11, 2, 5),
        {"dt_bias": torch.randn(4), "rate": -torch.rand(4), "skip": torch.randn(4)},
    )
    expected, last = mamba2_chunk_scan(
        *(each.unsqueeze(0) for each in (x, dt)),
        heads["rate"],
        b.unsqueeze(0),
        c.unsqueeze(0),
        chunk_size=4,
        D=heads["skip"],
        dt_bias=heads["dt_bias"],
        initial_states=state[1:2].clone(),
        dt_softplus=True,
        return_final_states=True,
    )
    out = state_scan.plain(x, dt, b, c, state, *one_sequence(11, 3), **heads)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(state[1], last[0])


def test_gated_delta_is_hugging_faces_from_a_state_on():
    query, key, value = torch.randn(11, 2, 6), torch.randn(11, 2, 6), torch.randn(11, 4, 5)
    gates, state = torch.randn(2, 11, 4), torch.randn(3, 4, 5, 6)
    rate, bias = -torch.rand(4), torch.randn(4)
    expected, last = torch_recurrent_gated_delta_rule(
        *(each.unsqueeze(0) for each in (query, key, value)),
        g=(rate * F.softplus(gates[0] + bias)).unsqueeze(0),
        beta=gates[1].sigmoid().unsqueeze(0),
        initial_state=state[1:2].mT.clone(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    owners = dict(zip(("rows", "query_start_loc", "seq_lens"), one_sequence(11, 3), strict=True))
    for implementation in (gated_delta.plain, gated_delta):
        new = state.clone()
        out = implementation(query, key, value, *gates, new, **owners, rate=rate, decay_bias=bias)
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(new[1], last[0].mT)


def test_disentangled_attention_is_hugging_faces():
    config = DebertaV2Config(
        hidden_size=64,
        num_attention_heads=4,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=16,
        max_relative_positions=40,
        share_att_key=True,
        hidden_dropout_prob=0.0,
    )
    attention, hidden, vectors = DisentangledSelfAttention(config).eval(), torch.randn(90, 64), torch.randn(32, 64)
    with torch.no_grad():
        wanted, _ = attention(hidden[None], torch.ones(1, 1, 90, 90), rel_embeddings=vectors)
        projections = (attention.query_proj, attention.key_proj, attention.value_proj)
        heads = [layer(hidden).view(90, 4, 16) for layer in projections]
        row_queries, row_keys = (layer(vectors).view(32, 4, 16) for layer in projections[:2])
    rows = (make_log_bucket_position(torch.arange(-40, 41), 16, 40).long() + 16).clamp(0, 31)
    starts = torch.tensor([0, 90], dtype=torch.int32)
    out = disentangled_attention.plain(*heads, row_keys, row_queries, rows, starts, 90, scale=48**-0.5)
    torch.testing.assert_close(out.flatten(1), wanted[0], rtol=1e-4, atol=1e-5)

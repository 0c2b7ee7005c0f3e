"""Attention of encoders: against torch's own, the biases of T5, MPNet and ALiBi, and over random geometries."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import MPNetConfig, T5Config
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from millrace.kernels import varlen_attention
from millrace.kernels._op import Draw
from millrace.kernels.varlen_attention.samples import Geometry, make_sample

IMPLEMENTATIONS = [varlen_attention.plain, varlen_attention]
NAMES = ["plain", "cpu"]


def by_sdpa(query, key, value, starts, _max_seq_len, scale, window=0, bias=None):
    """Calls torch for each text, with a mask `[heads, n, n]` that is built from `bias(n)` and the window."""
    group, texts = query.shape[1] // key.shape[1], []
    for start, end in pairwise(torch.unique(starts).tolist()):
        n = end - start
        rows = [x[start:end].transpose(0, 1) for x in (query, key, value)]
        mask = torch.zeros(query.shape[1], n, n) if bias is None else bias(n).clone()
        if window:
            distances = (torch.arange(n) - torch.arange(n)[:, None]).abs()
            mask.masked_fill_(distances >= window, -torch.inf)
        rows[1:] = [x.repeat_interleave(group, 0) for x in rows[1:]]
        texts.append(F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat([query[:0], *texts])


@st.composite
def calls(draw):
    num_kv_heads = draw(st.integers(1, 3))
    geometry = Geometry(
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 80, 128]))),
        window=draw(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 400))),
        max_distance=draw(st.one_of(st.none(), st.integers(0, 90))),
    )
    lengths = draw(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 600)), min_size=1, max_size=4))
    return make_sample("", Draw.seeded(torch.float32, seed=draw(st.integers(0, 99))), geometry, lengths)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
@given(sample=calls())
@settings(max_examples=30, deadline=None)
def test_agrees_with_torchs_attention(implementation, sample):
    table = sample.kwargs.get("distance_bias")

    def bias(n):
        limit = table.shape[1] // 2
        return torch.stack([table[:, (torch.arange(n) - i).clamp(-limit, limit) + limit] for i in range(n)], 1)

    wanted = by_sdpa(*sample.args, bias=None if table is None else bias)
    torch.testing.assert_close(implementation(*sample.args, **sample.kwargs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
def test_the_buckets_of_t5_and_of_mpnet_are_a_bias_of_distances(implementation):
    distances = torch.arange(-128, 129)
    sample = make_sample("", Draw.seeded(torch.float32), Geometry(4, 4, 16, scale=1.0), [150, 3, 60])
    t5 = T5Attention(T5Config(num_heads=4, d_model=64, d_kv=16), has_relative_attention_bias=True)
    mpnet = MPNetEncoder(MPNetConfig(num_hidden_layers=0, num_attention_heads=4, hidden_size=64))
    of_mpnet = SimpleNamespace(shape=(1, 150, 64), size=lambda i: (1, 150, 64)[i], device=torch.device("cpu"))
    with torch.no_grad():
        t5.relative_attention_bias.weight.normal_()
        mpnet.relative_attention_bias.weight.normal_()
        for buckets, embedding, whole in (
            (
                t5._relative_position_bucket(distances),
                t5.relative_attention_bias.weight,
                t5.compute_bias(150, 150)[0],
            ),
            (
                mpnet.relative_position_bucket(distances),
                mpnet.relative_attention_bias.weight,
                mpnet.compute_position_bias(of_mpnet)[0],
            ),
        ):
            result = implementation(*sample.args, distance_bias=embedding[buckets].t().contiguous())
            wanted = by_sdpa(*sample.args, bias=lambda n, whole=whole: whole[:, :n, :n])
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
def test_slopes_of_alibi_are_a_bias_as_long_as_the_longest_text(implementation):
    sample = make_sample("", Draw.seeded(torch.float32), Geometry(4, 2, 16), [70, 3])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None]
    result = implementation(*sample.args, distance_bias=-slopes * torch.arange(-69, 70).abs())

    def bias(n):
        return -slopes[:, :, None] * (torch.arange(n) - torch.arange(n)[:, None]).abs()

    torch.testing.assert_close(result, by_sdpa(*sample.args, bias=bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_of_a_text_depends_on_the_texts_around_it(implementation, dtype):
    lengths = [33, 100, 7]
    sample = make_sample("", Draw.seeded(dtype), Geometry(4, 2, 32, max_distance=9), lengths)
    parts, (starts, *rest) = [x.clone() for x in sample.args[:3]], sample.args[3:]
    whole = implementation(*parts, starts, *rest, **sample.kwargs)
    for first, last in ((0, 33), (133, 140)):
        for part in parts:
            part[first:last] = torch.nan
    among_nan = implementation(*parts, starts, *rest, **sample.kwargs)
    text = [part[33:133] for part in parts]
    alone = implementation(*text, torch.tensor([0, 100], dtype=torch.int32), *rest, **sample.kwargs)
    assert torch.equal(alone, whole[33:133])
    assert torch.equal(alone, among_nan[33:133])
    assert among_nan[:33].isnan().all()
    assert among_nan[133:].isnan().all()


@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_the_bits_of_one():
    for dtype in varlen_attention.tolerance:
        sample = make_sample("", Draw.seeded(dtype), Geometry(4, 4, 64), [300, 1, 200, 17])
        with_two = varlen_attention(*sample.args)
        torch.set_num_threads(1)
        assert torch.equal(varlen_attention(*sample.args), with_two)
        torch.set_num_threads(2)


def test_what_the_triton_kernel_cannot_do_is_refused():
    pytest.importorskip("triton")
    shared, launcher = (import_module(f"millrace.kernels.{name}") for name in ("_triton", "varlen_attention.triton"))
    query, key = torch.empty(5, 4, 16), torch.empty(5, 2, 16)
    for parts, max_seq_len, message in (
        ((query, key, key[:3]), 5, r"keys of \[5, 2, 16\] and values of \[3, 2, 16\]"),
        ((query[:, :3], key, key), 5, "the number of KV heads must divide that of query heads"),
        ((query[..., :7], key[..., :7], key[..., :7]), 5, "a head has 8 to 256 numbers"),
        ((query, key.half(), key), 5, r"keys in torch\.float16"),
        ((query, key, key.mT.contiguous().mT), 5, "the numbers of a head must be contiguous"),
        ((query, key, key), 2**27, "cut the text"),
    ):
        layouts = [shared.Layout.of(part) for part in parts]
        with pytest.raises(ValueError, match=message):
            launcher.plan_launch(launcher.Call(shared.TARGETS["sm_90"], *layouts, 1, max_seq_len, 0.1, 0, 0.0, None))

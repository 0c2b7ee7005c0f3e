"""The experts of a layer on the CPU, compiled and in torch."""

from __future__ import annotations

import pytest
import torch

from millrace.kernels import experts
from millrace.kernels._library import find_library
from millrace.kernels._op import Draw
from millrace.kernels.experts import CodedMatrices, cpu

SAMPLES = [sample.name for sample in experts.samples(Draw.seeded(torch.float32))]
needs_library = pytest.mark.skipif(find_library() is None, reason="no compiled kernels here")


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Runs a test with the compiled kernel, where there is one, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_KERNELS", {})
    elif find_library() is None:
        pytest.skip("no compiled kernels here")


def inputs(num_tokens, dtype):
    """Returns the tensors for 3 of 7 experts, with odd sizes and some experts of another rank."""
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(num_tokens)]).int() - 1
    weights = torch.randn(num_tokens, 3).softmax(-1)
    return torch.randn(num_tokens, 72, dtype=dtype), *layer(dtype), ids, weights


def layer(dtype):
    return torch.randn(7, 90, 72, dtype=dtype) / 8, torch.randn(7, 72, 45, dtype=dtype) / 8


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_the_library_agree_with_the_definition(agrees, monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_KERNELS", {})
    for index in range(len(list(experts.samples(Draw.seeded(dtype))))):
        agrees(experts, experts, index, dtype)


@pytest.mark.usefixtures("way", "two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_deterministic_token_depends_on_the_others(dtype):
    hidden, w13, w2, ids, weights = inputs(60, dtype)
    whole = experts(hidden, w13, w2, ids, weights, gate="silu", deterministic=True)
    for picked in ([7], [59, 3], [*range(0, 60, 3)], [*range(40)]):
        part = experts(hidden[picked], w13, w2, ids[picked], weights[picked], gate="silu", deterministic=True)
        assert torch.equal(part, whole[picked])


CODED = [name for name in SAMPLES if name.startswith(("int4 with", "int8", "e4m3 by", "mxfp4"))]


@pytest.mark.usefixtures("way", "two_threads")
@pytest.mark.parametrize("name", CODED)
def test_no_bit_of_a_token_depends_on_the_others_with_weights_in_codes(name):
    sample = list(experts.samples(Draw.seeded(torch.float32)))[SAMPLES.index(name)]
    hidden, w13, w2, ids, weights = sample.args
    whole = experts(hidden, w13, w2, ids, weights, **sample.kwargs, deterministic=True)
    for picked in ([1], [2, 0], [*range(0, len(hidden), 3)]):
        part = experts(hidden[picked], w13, w2, ids[picked], weights[picked], **sample.kwargs, deterministic=True)
        assert torch.equal(part, whole[picked])


@needs_library
@pytest.mark.parametrize("name", CODED)
def test_codes_are_not_dequantised_outside_of_the_kernel(monkeypatch, name):
    monkeypatch.delattr(CodedMatrices, "dequantise")
    sample = list(experts.samples(Draw.seeded(torch.bfloat16)))[SAMPLES.index(name)]
    assert experts(*sample.args, **sample.kwargs).isfinite().all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_are_run_in_parts(monkeypatch, dtype):
    arguments = inputs(23, dtype)
    whole = experts(*arguments, gate="silu")
    monkeypatch.setattr(cpu, "MAX_TOKENS", 5)
    assert torch.equal(experts(*arguments, gate="silu"), whole)


@needs_library
def test_a_long_prompt_in_float32_is_left_to_the_library(monkeypatch):
    arguments = inputs(23, torch.float32)
    wanted, names = experts(*arguments, gate="silu"), []
    kernel = cpu._KERNELS[torch.float32]
    monkeypatch.setattr(cpu, "_KERNELS", {torch.float32: lambda *args: (names.append("kernel"), kernel(*args))})
    monkeypatch.setattr(cpu, "MAX_ROWS", 23 * 3 // 7)
    torch.testing.assert_close(experts(*arguments, gate="silu"), wanted)
    assert names == []
    assert torch.equal(experts(*arguments, gate="silu", deterministic=True), wanted)
    assert names == ["kernel"]

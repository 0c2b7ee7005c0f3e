"""Routers choose as transformers' do, and the ranks of a layer with experts add up to one rank."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from millrace.engine.layers import Linear, Router, RouterSpec
from millrace.engine.models import Decoder, ModelOptions
from millrace.engine.models.spec import DecoderSpec, ExpertsSpec
from millrace.engine.parallel.context import SINGLE, ParallelContext
from millrace.engine.weights.model_slots import weight_slots

CPU = torch.device("cpu")


def make_router(spec: RouterSpec, hidden_size: int) -> Router:
    """Returns a router whose memory is not filled."""
    sizes = {"dtype": torch.float32, "device": CPU}
    return Router(Linear(hidden_size, spec.num_experts, bias=spec.bias, **sizes), spec, device=CPU)


def weight_of_each_expert(expert_ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns `[num_tokens, num_experts]`: routers may name the chosen experts in any order."""
    return torch.zeros(len(weights), num_experts).scatter(1, expert_ids.long(), weights)


GROUPS = {"hidden_size": 24, "num_attention_heads": 4, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
ROUTERS = {
    "v2 without groups": (
        DeepseekV2TopkRouter(DeepseekV2Config(**GROUPS, n_routed_experts=12)),
        RouterSpec(num_experts=12, num_choices=3, renormalise=False, scale=2.5),
    ),
    "v2 with groups": (
        DeepseekV2TopkRouter(
            DeepseekV2Config(**GROUPS, n_routed_experts=12, n_group=4, topk_group=2, topk_method="group_limited_greedy")
        ),
        RouterSpec(num_experts=12, num_choices=3, renormalise=False, num_groups=4, num_chosen_groups=2, scale=2.5),
    ),
    "v3": (
        DeepseekV3TopkRouter(DeepseekV3Config(**GROUPS, n_routed_experts=12, n_group=4, topk_group=2)),
        RouterSpec(
            num_experts=12,
            num_choices=3,
            scores="sigmoid",
            correction=True,
            num_groups=4,
            num_chosen_groups=2,
            num_group_scores=2,
            scale=2.5,
        ),
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@torch.inference_mode()
def test_groups_of_experts_are_chosen_as_in_transformers(name: str) -> None:
    reference, spec = ROUTERS[name]
    generator = torch.Generator().manual_seed(5)
    reference.weight.copy_(torch.randn(reference.weight.shape, generator=generator))
    router = make_router(spec, 24)
    router.linear.weight.copy_(reference.weight)
    if spec.correction:
        reference.e_score_correction_bias.copy_(torch.randn(12, generator=generator))
        router.correction.copy_(reference.e_score_correction_bias)
    hidden = torch.randn(33, 24, generator=generator)
    _, weights, expert_ids = reference(hidden)
    ours, own_weights = router(hidden)
    assert (ours.dtype, own_weights.dtype) == (torch.int32, torch.float32)
    torch.testing.assert_close(
        weight_of_each_expert(ours, own_weights, 12), weight_of_each_expert(expert_ids, weights, 12)
    )


@torch.inference_mode()
def test_a_router_scores_in_float32_whatever_the_model_computes_in() -> None:
    router = make_router(RouterSpec(num_experts=2, num_choices=1), 3)
    # In bfloat16 both products would be rounded to 256.
    router.linear.weight.copy_(torch.tensor([[256.0, 0.25, 0.0], [256.0, 0.0, 0.5]]))
    expert_ids, _ = router(torch.ones(1, 3, dtype=torch.bfloat16))
    assert expert_ids.item() == 1


def spec_of(**experts: Any) -> DecoderSpec:
    """Returns the spec of a small model with experts in its second layer."""
    return DecoderSpec(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        windows=(0, 0),
        embedding_size=16,
        tie_word_embeddings=False,
        rms_norm=True,
        norm_eps=1e-6,
        gated_mlp=True,
        activation="silu",
        experts=ExpertsSpec(
            layers=frozenset({1}),
            router=RouterSpec(num_experts=6, num_choices=3),
            intermediate_size=12,
            gate="clamped_swiglu",
            bias=True,
            shared_size=20,
            shared_gate=True,
            **experts,
        ),
    )


def make_mlp(parallel: ParallelContext, whole: dict[str, torch.Tensor], *, expert_parallel: bool = False) -> nn.Module:
    """Returns a rank's feed-forward network of the layer with experts, filled from the tensors of a checkpoint."""
    options = ModelOptions(expert_parallel=expert_parallel)
    model = Decoder(spec_of(), dtype=torch.float32, device=CPU, options=options, parallel=parallel)
    for name, slot in weight_slots(model).items():
        if name.startswith("layers.1.mlp."):
            slot.fill(slot.cut(whole.setdefault(name, torch.randn(slot.whole_shape) / 3)))
    return model.layers[1].mlp


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["slices of experts", "whole experts"])
@torch.inference_mode()
def test_the_addends_of_two_ranks_are_the_result_of_one(expert_parallel: bool) -> None:
    torch.manual_seed(0)
    whole: dict[str, torch.Tensor] = {}
    one = make_mlp(SINGLE, whole)
    names = set(whole)
    ranks = [make_mlp(ParallelContext.of_rank(i, 2, 1), whole, expert_parallel=expert_parallel) for i in range(2)]
    assert set(whole) == names, "the ranks have weights that one rank does not have"
    num_weights = [sum(weight.numel() for weight in rank.experts.parameters() if weight.dim() == 3) for rank in ranks]
    assert num_weights == [6 * 3 * 16 * 12 // 2] * 2
    hidden = torch.randn(9, 16)
    torch.testing.assert_close(sum(rank(hidden) for rank in ranks), one(hidden))


def test_experts_that_a_scheme_does_not_quantise_are_named(caplog: pytest.LogCaptureFixture) -> None:
    # Neither the hidden size nor that inside the experts is a multiple of 32.
    Decoder(spec_of(), dtype=torch.float32, device=CPU, options=ModelOptions("int4"))
    assert re.search(r"\d+ more stay in full precision: quantization='int4' takes inputs in mult", caplog.text)
    caplog.clear()
    Decoder(spec_of(), dtype=torch.float32, device=CPU)
    assert not caplog.text

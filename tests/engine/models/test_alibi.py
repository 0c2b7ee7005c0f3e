"""Slopes of ALiBi for any number of heads, as Bloom and MPT compute them. Families test the maths."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from millrace.engine.models.alibi import alibi_slopes


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 7, 12, 16, 71, 112])
def test_slopes_are_those_of_hugging_face_for_any_number_of_heads(num_heads: int) -> None:
    ours = torch.tensor(alibi_slopes(num_heads))
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)
    torch.testing.assert_close(ours, bloom[:, 0, 1])
    for max_bias in (4, 8):
        mpt = build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max=max_bias)
        torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads, max_bias)), -mpt[:, 0, 0])

"""Masks of tokens: bits on the host, forbidden logits on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from millrace.engine.executor.plan_wire import decode_plan, encode_plan
from millrace.engine.step_plan import StepPlan
from millrace.engine.structured import token_masks
from millrace.engine.structured.token_masks import TokenMasks


@pytest.mark.parametrize("vocab_size", [1, 31, 64, 100])
@pytest.mark.parametrize("indices", [[0, 1, 2], [1], [0, 2]])
def test_masks_forbid_what_they_do_not_allow(vocab_size, indices, device, monkeypatch):
    monkeypatch.setattr("millrace.engine.structured.token_masks.MAX_LOGITS_AT_ONCE", 2 * vocab_size)
    rng = np.random.default_rng(vocab_size)
    allowed = rng.random((len(indices), 64)) < 0.5
    masks = TokenMasks(indices, np.packbits(allowed, axis=1, bitorder="little"))
    plan = decode_plan(encode_plan(StepPlan(token_masks=masks)))  # as other ranks get it
    logits = torch.from_numpy(rng.normal(size=(3, vocab_size)).astype(np.float32))
    expected = logits.clone()
    for index, line in zip(indices, allowed, strict=True):
        for token_id in range(vocab_size):
            if token_id >= 64 or not line[token_id]:
                expected[index, token_id] = -torch.inf
    masked = logits.to(device)
    plan.token_masks.apply(masked)
    assert torch.equal(masked.cpu(), expected)


def test_host_and_device_spread_bits_alike():
    bits = np.arange(512, dtype=np.uint8).reshape(2, 256)
    on_host = token_masks._forbidden(bits, torch.device("cpu"))
    assert torch.equal(token_masks._spread(torch.from_numpy(bits)), on_host)
    assert on_host[0, :8].all() and on_host[0, 8:10].tolist() == [False, True]

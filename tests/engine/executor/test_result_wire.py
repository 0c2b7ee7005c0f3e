"""The result of a step crosses from rank to rank as plain values and arrays."""

from __future__ import annotations

import numpy as np

from millrace.engine.executor.result_wire import pack_result, unpack_result
from millrace.engine.parallel.wire import decode, encode
from millrace.engine.step.head import HostLogprobs, StepResult


def cross(result: StepResult) -> StepResult:
    return unpack_result(decode(encode(pack_result(result))))


def make_logprobs(size: int) -> HostLogprobs:
    ids = np.arange(2 * size).reshape(size, 2)
    return HostLogprobs(np.float32(-0.5) * ids.astype(np.float32), ids, ids[:, 0] + 1)


def test_tokens_and_their_log_probabilities_cross() -> None:
    sent = StepResult([5, -1], make_logprobs(2), {3: make_logprobs(4)}, num_drawn=[1, 1])
    got = cross(sent)
    assert (got.drawn, got.num_drawn) == ([5, -1], [1, 1]) and list(got.prompt_logprobs) == [3]
    for ours, theirs in ((sent.logprobs, got.logprobs), (sent.prompt_logprobs[3], got.prompt_logprobs[3])):
        assert ours is not None and theirs is not None
        for name in ("logprobs", "token_ids", "ranks"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), strict=True)


def test_vectors_cross() -> None:
    vectors = list(np.array([[0.1, np.nan], [2, -np.inf]], np.float32))
    got = cross(StepResult(vectors))
    assert got.logprobs is None and got.prompt_logprobs == {}
    np.testing.assert_array_equal(np.stack(got.drawn), np.stack(vectors), strict=True)

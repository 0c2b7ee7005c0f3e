"""The order in which the requests of a call or of a block run."""

from __future__ import annotations

from millrace.engine import GenerateRequest, SamplingParams
from millrace.engine.request import longest_first


def test_long_outputs_go_first_and_common_beginnings_side_by_side() -> None:
    def request(ids: list[int], max_tokens: int | None) -> GenerateRequest:
        return GenerateRequest("0", None, ids, SamplingParams(max_tokens=max_tokens))

    given = [request([2, 1], 5), request([1, 1], 5), request([9], None), request([2, 2], 5), request([1, 2], 7)]
    assert [one.prompt_token_ids for one in longest_first(given)] == [[9], [1, 2], [1, 1], [2, 1], [2, 2]]

"""What requests of all kinds have in common, and the order in which they are run."""

from __future__ import annotations

from millrace.engine import GenerateRequest, LoRARequest, PoolingParams, PoolingRequest, SamplingParams
from millrace.engine.request import longest_first


def generate(ids: list[int] | None, max_tokens: int | None = 1, prompt: str | None = None) -> GenerateRequest:
    return GenerateRequest("0", prompt, ids, SamplingParams(max_tokens=max_tokens))


def pool(ids: list[int]) -> PoolingRequest:
    return PoolingRequest("0", None, ids, PoolingParams())


def test_long_outputs_go_first_and_common_beginnings_side_by_side() -> None:
    given = [generate([2, 1], 5), generate([1, 1], 5), generate([9], None), generate([2, 2], 5), generate([1, 2], 7)]
    assert [one.prompt_token_ids for one in longest_first(given)] == [[9], [1, 2], [1, 1], [2, 1], [2, 2]]


def test_texts_without_tokens_are_ordered_by_their_beginning() -> None:
    given = [generate(None, prompt=text) for text in ("mill b", "race", "mill a")]
    assert [one.prompt for one in longest_first(given)] == ["mill a", "mill b", "race"]


def test_requests_to_pool_are_ordered_by_their_prompts() -> None:
    assert [one.prompt_token_ids for one in longest_first([pool([2]), pool([1, 2]), pool([1])])] == [[1], [1, 2], [2]]


def test_a_request_says_all_that_it_has_to_read() -> None:
    assert generate([1, 2], prompt="shown only").prompts == [[1, 2]]
    assert generate(None, prompt="text").prompts == ["text"]
    assert PoolingRequest("0", "first", None, PoolingParams(), more_prompts=["second", [3]]).prompts == [
        "first",
        "second",
        [3],
    ]


def test_requests_of_an_adapter_follow_each_other_after_those_of_the_model_alone() -> None:
    names = ["b", None, "a", "b", "a", None]
    given = [
        GenerateRequest(
            str(index),
            None,
            [index],
            SamplingParams(max_tokens=1 + index),
            lora_request=None if name is None else LoRARequest(name, 1 + ord(name)),
        )
        for index, name in enumerate(names)
    ]
    assert [one.request_id for one in longest_first(given)] == ["5", "1", "4", "2", "3", "0"]

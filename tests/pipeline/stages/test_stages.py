"""Each stage by itself: what it adds to a row, and what a bad row is told, while its neighbours go through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from fake_client import EchoClient, FakeTokenizer, ForgetfulClient
from hypothesis import given
from hypothesis import strategies as st

from millrace import EngineDeadError, EngineError, SamplingParams
from millrace.pipeline import RowFailedError
from millrace.pipeline.stages.adapters import AdapterNames
from millrace.pipeline.stages.backends.generate import GenerateStage
from millrace.pipeline.stages.base import BatchStage, Row, RowError, Stage
from millrace.pipeline.stages.declared.chat_template import ChatTemplateStage
from millrace.pipeline.stages.declared.detokenize import DetokenizeStage
from millrace.pipeline.stages.declared.tokenize import TokenizeStage
from millrace.pipeline.stages.user_function import PostprocessStage, PreprocessStage

CHAT = [{"role": "user", "content": "hi", "name": None}]


def rows_of(*columns: dict[str, Any]) -> list[Row]:
    return [Row.read(one) for one in columns]


def run(stage: Stage, *columns: dict[str, Any]) -> list[Row]:
    rows = rows_of(*columns)
    stage.run(rows)
    return rows


def generate_stage(**changes: Any) -> GenerateStage:
    adapters = AdapterNames(("this",), {"one": "/adapters/one"})
    settings = {"client": EchoClient(), "default_params": SamplingParams(temperature=0), "adapters": adapters}
    return GenerateStage(**{**settings, **changes})


def errors(rows: Sequence[Row]) -> list[str]:
    return [str(row.error or "") for row in rows]


def test_preprocess_merges_and_cannot_change_the_row_as_read() -> None:
    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        row["id"] = "changed"
        return {"prompt": "p"}

    (row,) = run(PreprocessStage(preprocess), {"id": 1})
    assert row.data == {"id": 1, "prompt": "p"}
    assert row.input == {"id": 1}


def test_preprocess_takes_further_arguments() -> None:
    stage = PreprocessStage(lambda row, a, b: {"sum": row["x"] + a + b}, fn_args=[10], fn_kwargs={"b": 100})
    assert run(stage, {"x": 1})[0].data["sum"] == 111


def test_postprocess_replaces_the_row() -> None:
    (row,) = run(PostprocessStage(lambda row: {"y": row["x"]}), {"x": 1, "z": 2})
    assert row.data == {"y": 1}


def test_what_a_user_function_returns_must_be_columns() -> None:
    (row,) = run(PreprocessStage(lambda row: None), {"x": 1})
    assert str(row.error) == "preprocess: UserError: preprocess must return a dict of columns; got NoneType"


def test_an_error_stays_with_its_row() -> None:
    rows = run(PreprocessStage(lambda row: {"y": 1 / row["x"]}), {"x": 1}, {"x": 0}, {"x": 2})
    assert [row.data.get("y") for row in rows] == [1.0, None, 0.5]
    assert errors(rows) == ["", "preprocess: ZeroDivisionError: division by zero", ""]


def test_a_failed_row_passes_later_stages_by() -> None:
    calls: list[Any] = []
    rows = run(PreprocessStage(lambda row: {"y": 1 / row["x"]}), {"x": 0})
    PostprocessStage(calls.append).run(rows)
    assert not calls


def test_stopping_raises_with_stage_class_and_message() -> None:
    stage = PreprocessStage(lambda row: {"y": row["x"]})
    stage.stop_on_error = True
    with pytest.raises(RowFailedError, match="a row failed in preprocess: KeyError: 'x'"):
        run(stage, {})


def test_chat_template_renders_and_tokenises_without_special_tokens() -> None:
    rows = run(ChatTemplateStage(FakeTokenizer(), {"k": 1}), {"messages": CHAT}, {"prompt": "plain"})
    assert rows[0].data["prompt"] == "<user>hi<assistant>k=1"
    assert rows[0].data["tokenized_prompt"] == [ord(letter) for letter in "<user>hi<assistant>k=1"]
    assert rows[1].data == {"prompt": "plain"}


def test_messages_win_over_a_prompt() -> None:
    (row,) = run(ChatTemplateStage(FakeTokenizer()), {"messages": CHAT, "prompt": "old", "tokenized_prompt": [1]})
    assert row.data["prompt"] == "<user>hi<assistant>"
    assert row.data["tokenized_prompt"] != [1]


def test_a_conversation_that_ends_with_the_assistant_is_continued() -> None:
    messages = np.array([*CHAT, {"role": "assistant", "content": "he"}], dtype=object)
    (row,) = run(ChatTemplateStage(FakeTokenizer()), {"messages": messages})
    assert row.data["prompt"] == "<user>hi<assistant>he"


@pytest.mark.parametrize("messages", ["hi", 3, [], ["hi"], [{"content": "hi"}], [{"role": "user", "content": None}]])
def test_bad_messages_fail_alone(messages: Any) -> None:
    rows = run(ChatTemplateStage(FakeTokenizer()), {"messages": CHAT}, {"messages": messages}, {"messages": CHAT})
    assert [row.error is None for row in rows] == [True, False, True]
    assert errors(rows)[1].startswith("chat_template: ChatTemplateError: ")


def test_a_row_brings_variables_tools_and_a_template_of_its_own() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": None}}
    rows = run(
        ChatTemplateStage(FakeTokenizer(), {"k": 1, "j": 2}),
        {"messages": CHAT, "chat_template_kwargs": {"k": 9, "absent": None}},
        {"messages": CHAT, "chat_template_kwargs": '{"k": null}', "tools": np.array([tool], dtype=object)},
        {"messages": CHAT, "tools": json.dumps([tool]), "chat_template": "{{ x }}"},
        {"messages": CHAT, "chat_template_kwargs": None, "tools": [], "chat_template": None},
    )
    assert [row.data["prompt"].removeprefix("<user>hi<assistant>") for row in rows] == [
        "k=9j=2",
        "k=Nonej=2tools=[{'type': 'function', 'function': {'name': 'f'}}]",
        f"k=1j=2tools={[tool]}chat_template={{{{ x }}}}",
        "k=1j=2",
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"chat_template_kwargs": 3}, "column 'chat_template_kwargs' must map names to values; got 3"),
        ({"chat_template_kwargs": "{"}, "column 'chat_template_kwargs' holds text that is no JSON"),
        ({"tools": "[1]"}, "column 'tools' must be a list of descriptions of tools; got [1]"),
        ({"tools": {"name": "f"}}, "column 'tools' must be a list"),
        ({"chat_template": 3}, "column 'chat_template' must be Jinja text; got 3"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "must be a dict with a 'function'; got 'f'"),
        ({"chat_template_kwargs": {"messages": []}}, "multiple values for argument 'messages'"),
    ],
)
def test_what_a_row_says_of_its_template_fails_alone(columns: dict[str, Any], said: str) -> None:
    rows = run(ChatTemplateStage(FakeTokenizer()), {"messages": CHAT}, {"messages": CHAT, **columns})
    assert [row.error is None for row in rows] == [True, False]
    assert said in errors(rows)[1]


def test_messages_may_be_json_text() -> None:
    (row,) = run(ChatTemplateStage(FakeTokenizer()), {"messages": json.dumps(CHAT)})
    (same,) = run(ChatTemplateStage(FakeTokenizer()), {"messages": CHAT})
    assert row.data["prompt"] == same.data["prompt"]


def test_sampling_parameters_may_be_json_text() -> None:
    rows = run(
        generate_stage(),
        {"prompt": "a", "sampling_params": '{"n": 2, "temperature": 1.0}'},
        {"prompt": "a", "sampling_params": "{"},
    )
    assert len(rows[0].data["outputs"]) == 2
    assert "column 'sampling_params' holds text that is no JSON" in errors(rows)[1]


@pytest.mark.parametrize("arguments", ['{"x": ', "", "not JSON", "[1]"])
def test_arguments_that_a_model_wrote_badly_reach_the_template_as_text(arguments: str) -> None:
    seen: list[Any] = []

    class Listening(FakeTokenizer):
        def render_chat(self, messages: Any, **kw: Any) -> str:
            seen.extend(messages)
            return ""

    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    (row,) = run(ChatTemplateStage(Listening()), {"messages": [*CHAT, turn]})
    assert row.error is None
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == (arguments or {})


def test_calls_of_an_earlier_turn_reach_the_template_as_dicts() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    seen: list[Any] = []

    class Listening(FakeTokenizer):
        def render_chat(self, messages: Any, **kw: Any) -> str:
            seen.extend(messages)
            return ""

    (row,) = run(ChatTemplateStage(Listening()), {"messages": [*CHAT, turn]})
    assert row.error is None
    assert seen[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert call["function"]["arguments"] == '{"x": 1}', "the row as it was read stays as it was"


def test_tokenize_is_one_call_for_all_rows() -> None:
    tokenizer = FakeTokenizer()
    rows = run(TokenizeStage(tokenizer), {"prompt": "a"}, {"prompt": "bc"}, {"tokenized_prompt": [9]})
    assert [row.data["tokenized_prompt"] for row in rows] == [[1, 97], [1, 98, 99], [9]]
    assert tokenizer.num_calls == 1


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": 3}, "PromptTypeError: column 'prompt' must be text; got int 3"),
        ({"prompt": b"x"}, "PromptTypeError: column 'prompt' must be text; got bytes b'x'"),
        ({"prompt": None}, "PromptTypeError: column 'prompt' is missing its value (got None)"),
        ({"prompt": float("nan")}, "PromptTypeError: column 'prompt' is missing its value (got nan)"),
        ({"text": "x"}, "PromptTypeError: the row has no column 'prompt' or 'messages'"),
        ({"prompt": "\0"}, "UnicodeError: a text holds a zero byte"),
    ],
)
def test_a_prompt_that_is_no_text_fails_alone(columns: dict[str, Any], said: str) -> None:
    rows = run(TokenizeStage(FakeTokenizer()), {"prompt": "a"}, columns, {"prompt": "b"})
    assert [row.error is None for row in rows] == [True, False, True]
    assert said in errors(rows)[1]


def test_generate_adds_the_columns_of_ray_data_llm_and_ours() -> None:
    (row,) = run(generate_stage(), {"id": 1, "prompt": "abc"})
    assert row.data["generated_text"] == "ABC0"
    assert row.data["num_generated_tokens"] == len(row.data["generated_tokens"]) == 5
    assert row.data["num_input_tokens"] == len(row.data["prompt_token_ids"]) == 3
    assert row.data["finish_reason"] == "stop"
    assert row.data["id"] == 1
    wanted = {"request_id", "batch_uuid", "time_taken_llm", "params", "metrics", "logprobs", "prompt_logprobs"}
    assert wanted | {"stop_reason", "num_cached_tokens", "outputs", "attempt", "replica_id"} <= row.data.keys()


def test_a_row_runs_with_the_adapter_that_it_names() -> None:
    client = EchoClient()
    rows = run(
        generate_stage(client=client), {"prompt": "a", "model": "one"}, {"prompt": "b", "model": "/adapters/one"}
    )
    assert [row.error is None for row in rows] == [True, False]
    assert "AdapterError: column 'model' asks for '/adapters/one'" in errors(rows)[1]
    (request,) = client.seen
    assert request.lora_request is not None
    assert (request.lora_request.lora_name, request.lora_request.lora_path) == ("one", "/adapters/one")
    assert rows[0].data["model"] == "one"


def test_outputs_find_their_rows_whatever_their_order() -> None:
    rows = run(generate_stage(), *({"prompt": f"p{index}"} for index in range(5)))
    assert [row.data["generated_text"] for row in rows] == [f"P{index}0" for index in range(5)]


def test_several_sequences_are_all_there() -> None:
    sampling = {"n": 3, "temperature": 1.0, "seed": 1}
    (row,) = run(generate_stage(detokenize_later=True), {"prompt": "a", "sampling_params": sampling})
    (row,) = (row, DetokenizeStage(FakeTokenizer()).run([row]))[:1]
    assert [one["text"] for one in row.data["outputs"]] == ["A0", "A1", "A2"]
    assert row.data["generated_text"] == "A0"
    assert row.data["num_generated_tokens"] == 9


def test_text_is_left_to_the_later_stage_where_that_gives_the_same() -> None:
    client = EchoClient()
    stops = {"prompt": "a", "sampling_params": {"stop": ["x"], "temperature": 0}}
    rows = run(generate_stage(client=client, detokenize_later=True), {"prompt": "a"}, stops)
    assert [request.sampling_params.detokenize for request in client.seen] == [False, True]
    assert [row.data["generated_text"] for row in rows] == [None, "A0"]
    DetokenizeStage(FakeTokenizer()).run(rows)
    assert [row.data["generated_text"] for row in rows] == ["A0", "A0"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "fail"}, "generate: NumericalError: NaN in the logits"),
        ({"prompt": ""}, "generate: EmptyPromptError: the prompt has no token"),
        ({"prompt": 3}, "generate: PromptTypeError: column 'prompt' must be text"),
        ({"prompt": "x", "sampling_params": {"max_tokns": 3}}, "did you mean 'max_tokens'?"),
        ({"prompt": "x", "sampling_params": {"temperature": 9}}, "temperature must be a number from 0 to 2"),
        ({"prompt": "x", "sampling_params": 3}, "must be a dict or SamplingParams; got int 3"),
        (
            {"prompt": "x", "model": "other"},
            "asks for 'other', and all rows run on 'this' or one of the adapters 'one'",
        ),
        ({"tokenized_prompt": [1, "x"]}, "must be a list of token ids"),
        ({"tokenized_prompt": 3}, "must be a list of token ids"),
    ],
)
def test_a_bad_row_is_told_why_and_its_neighbours_go_through(columns: dict[str, Any], said: str) -> None:
    rows = run(generate_stage(), {"prompt": "a"}, columns, {"prompt": "b", "model": "this"})
    assert [row.error is None for row in rows] == [True, False, True]
    assert said in errors(rows)[1]
    assert rows[1].error is not None
    assert rows[1].error.stage == "generate"


def test_engine_faults_are_worth_a_retry_and_mistakes_are_not() -> None:
    rows = run(generate_stage(), {"prompt": "fail"}, {"prompt": 3})
    assert [row.error.retryable for row in rows if row.error] == [True, False]


def test_long_outputs_of_a_block_go_first() -> None:
    client = EchoClient()
    limits = {"a": 3, "b": 7, "c": None, "d": 7}
    rows = run(
        generate_stage(client=client),
        *({"prompt": prompt, "sampling_params": {"max_tokens": limit}} for prompt, limit in limits.items()),
    )
    assert [request.prompt for request in client.seen] == ["c", "b", "d", "a"]
    assert [row.data["generated_text"] for row in rows] == ["A0", "B0", "C0", "D0"]


def test_a_pool_that_dies_ends_the_job_not_the_row() -> None:
    with pytest.raises(EngineDeadError, match="no replica is left"):
        run(generate_stage(), {"prompt": "dead"})


def test_an_output_that_never_comes_is_an_error_of_the_job() -> None:
    with pytest.raises(EngineError, match="without an output for 1 of 2 rows"):
        run(generate_stage(client=ForgetfulClient()), {"prompt": "a"}, {"prompt": "b"})


def test_numpy_values_of_a_row_are_taken() -> None:
    client = EchoClient()
    params = {"stop_token_ids": np.array([3, 4]), "max_tokens": np.int64(5), "temperature": np.float32(0)}
    (row,) = run(generate_stage(client=client), {"tokenized_prompt": np.array([97, 98]), "sampling_params": params})
    assert row.error is None
    assert client.seen[0].prompt_token_ids == [97, 98]
    assert client.seen[0].sampling_params.stop_token_ids == [3, 4]


class Fragile(BatchStage):
    """Fails for numbers under zero: for all rows of a call, as a batch does."""

    name = "fragile"

    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if any(row["x"] < 0 for row in rows):
            raise ValueError("under zero")
        return [{"y": row["x"] + 1} for row in rows]


class Short(BatchStage):
    """Returns a result too few."""

    name = "short"

    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{} for _ in rows[1:]]


@given(st.lists(st.integers(-3, 3)))
def test_rows_are_conserved_and_only_the_bad_fail(numbers: list[int]) -> None:
    rows = run(Fragile(), *({"x": number} for number in numbers))
    assert [row.input["x"] for row in rows] == numbers
    assert [row.error is not None for row in rows] == [number < 0 for number in numbers]
    assert [row.data["y"] for row in rows if row.error is None] == [number + 1 for number in numbers if number >= 0]


@pytest.mark.parametrize(("size", "calls"), [(None, [7]), (3, [3, 3, 1]), (1, [1] * 7), (20, [7])])
def test_a_stage_gets_as_many_rows_at_once_as_was_said(size: int | None, calls: list[int]) -> None:
    seen: list[int] = []

    class Counting(Fragile):
        def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            seen.append(len(rows))
            return super().process_batch(rows)

    stage, rows = Counting(), rows_of(*({"x": number} for number in range(8)))
    stage.batch_size = size
    rows[2].error = RowError("earlier", "E", "failed")
    stage.run(rows)
    assert seen == calls
    assert [row.data.get("y") for row in rows] == [1, 2, None, 4, 5, 6, 7, 8]


def test_a_stage_that_loses_results_fails_its_rows_rather_than_mixing_them() -> None:
    assert all(row.error is not None for row in run(Short(), {"x": 1}, {"x": 2}))

"""The model's text taken apart: reasoning, tool calls and the rest, for every family and for any text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_client import FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

from millrace import ConfigError
from millrace.pipeline import EngineProcessorConfig
from millrace.pipeline.answers.reasoning import REASONING_FORMATS, split_reasoning
from millrace.pipeline.answers.tool_calls import TOOL_CALL_FORMATS, parse_tool_calls
from millrace.pipeline.processor.assemble import make_stages
from millrace.pipeline.processor.engine_stages import stages_on
from millrace.pipeline.processor.operators import run_stages, to_columns
from millrace.pipeline.stages.base import Row
from millrace.pipeline.stages.declaration import Side
from millrace.pipeline.stages.declared.reasoning import ReasoningStage
from millrace.pipeline.stages.declared.tool_call import ToolCallStage
from millrace.pipeline.stages.tokenizers import load_tokenizer
from millrace.pipeline.stages.user_function import PostprocessStage, UserFunction

THINK = REASONING_FORMATS["qwen3"]
ALWAYS = REASONING_FORMATS["deepseek_r1"]
HERMES = TOOL_CALL_FORMATS["hermes"]
LLAMA = TOOL_CALL_FORMATS["llama3_json"]
MISTRAL = TOOL_CALL_FORMATS["mistral"]

MARKS = sorted(
    {mark for kind in [*REASONING_FORMATS.values(), *TOOL_CALL_FORMATS.values()] for mark in kind.marks}
    | {'{"name": "f", "arguments": {}}', '{"name":', "[", "]", "{", "}", ";", '"\\ud800"', "[ARGS]", "f"}
)
TEXTS = st.lists(st.sampled_from(MARKS) | st.text(max_size=8)).map("".join)
PLAIN = st.text(st.characters(exclude_characters="<[|", exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), st.dictionaries(PLAIN, JSON, max_size=3)))


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "reasoning", "answer"),
    [
        (THINK, "<user>hi", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        (THINK, "<user>hi", "\n<think>hm", "hm", None),
        (THINK, "<user>hi", "yes", None, "yes"),
        (THINK, "<user>hi", "hm</think>yes", "hm", "yes"),
        (THINK, "<user>hi<think>\n", "hm</think>yes", "hm", "yes"),
        (THINK, "<user>hi<think>\n", "hm, it", "hm, it", None),
        (THINK, "<think>\n\n</think>\n\n", "yes", None, "yes"),
        (THINK, "<user>hi", "<think>\n\n</think>\n\nyes", None, "yes"),
        (THINK, "<user>hi", "the tag <think> opens, </think> closes", None, "the tag <think> opens, </think> closes"),
        (THINK, "<user>hi", "hm</think>the tag <think>", "hm", "the tag <think>"),
        (THINK, None, "hm, it", None, "hm, it"),
        (ALWAYS, None, "hm, it", "hm, it", None),
        (ALWAYS, "<user>hi", "hm, it", None, "hm, it"),
        (ALWAYS, "<user>hi<think>", "a <think> b</think>c", "a <think> b", "c"),
        (REASONING_FORMATS["mistral"], None, "[THINK]hm[/THINK]yes", "hm", "yes"),
    ],
)
def test_reasoning_is_told_from_the_answer(
    kind: Any, prompt: str | None, text: str, reasoning: str | None, answer: str | None
) -> None:
    assert split_reasoning(kind, text, prompt) == (reasoning, answer)


@given(TEXTS, st.none() | TEXTS, st.sampled_from(sorted(REASONING_FORMATS)))
def test_no_text_breaks_a_reasoning_parser(text: str, prompt: str | None, name: str) -> None:
    kind = REASONING_FORMATS[name]
    reasoning, answer = split_reasoning(kind, text, prompt)
    assert all(part is None or part in text for part in (reasoning, answer))
    if not any(mark in text for mark in kind.marks) and prompt is not None and kind.opening not in prompt:
        assert (reasoning, answer) == (None, text)


@given(PLAIN, PLAIN, st.booleans(), st.sampled_from(sorted(REASONING_FORMATS)))
def test_what_was_joined_is_split(reasoning: str, answer: str, opened_by_prompt: bool, name: str) -> None:
    kind = REASONING_FORMATS[name]
    opening = kind.opening
    prompt, text = ("hi" + opening, "") if opened_by_prompt else ("hi", opening)
    found = split_reasoning(kind, f"{text}{reasoning}{kind.closing}{answer}", prompt)
    assert found == (reasoning.strip() or None, answer.strip() or None)


def written(name: str, calls: list[tuple[str, Any]]) -> str:
    """Writes calls as the models of a family do."""
    if name == "llama3_json":
        return "; ".join(json.dumps({"name": one, "parameters": arguments}) for one, arguments in calls)
    if name == "mistral":
        return "[TOOL_CALLS]" + json.dumps([{"name": one, "arguments": arguments} for one, arguments in calls])
    if name == "mistral named":
        return "".join(f"[TOOL_CALLS]{one}[ARGS]{json.dumps(arguments)}" for one, arguments in calls)
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': one, 'arguments': arguments})}\n</tool_call>" for one, arguments in calls
    )


@given(CALLS.filter(bool), st.sampled_from([*sorted(TOOL_CALL_FORMATS), "mistral named"]))
def test_calls_that_were_written_are_read(calls: list[tuple[str, Any]], name: str) -> None:
    parsed = parse_tool_calls(TOOL_CALL_FORMATS[name.split(maxsplit=1)[0]], written(name, calls))
    assert (parsed.content, parsed.error) == (None, None)
    functions = [one["function"] for one in parsed.tool_calls]
    assert [(one["name"], json.loads(one["arguments"])) for one in functions] == calls
    assert len({one["id"] for one in parsed.tool_calls}) == len(calls)


@given(TEXTS, st.sampled_from(sorted(TOOL_CALL_FORMATS)))
def test_no_text_breaks_a_tool_call_parser(text: str, name: str) -> None:
    parsed = parse_tool_calls(TOOL_CALL_FORMATS[name], text)
    assert parsed.tool_calls or parsed.content == text
    for call in parsed.tool_calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert to_columns([{"tool_calls": parsed.tool_calls}])["tool_calls"].to_pylist() == [parsed.tool_calls]


CALL = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    ("kind", "text", "content", "names", "error"),
    [
        (HERMES, f"I look. <tool_call>{CALL}</tool_call> Done.", "I look.  Done.", ["f"], None),
        (HERMES, f"<tool_call>{CALL}", None, ["f"], None),
        (HERMES, f"<tool_call>{CALL[:-3]}", f"<tool_call>{CALL[:-3]}", [], "Expecting"),
        (HERMES, f"<tool_call>{CALL}</tool_call><tool_call>no</tool_call>", "<tool_call>no</tool_call>", ["f"], "'no'"),
        (HERMES, "<tool_call></tool_call>", "<tool_call></tool_call>", [], "a call is empty"),
        (HERMES, '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', [], "with a 'name'"),
        (HERMES, '<tool_call>{"name": "f", "arguments": 3}', '<tool_call>{"name": "f", "arguments": 3}', [], "object"),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}', None, ["f"], None),
        (HERMES, '<tool_call>{"name": "f"}', None, ["f"], None),
        (HERMES, CALL, CALL, [], None),
        (LLAMA, CALL, None, ["f"], None),
        (LLAMA, f"<|python_tag|>{CALL}; {CALL}", None, ["f", "f"], None),
        (LLAMA, f"I look.<|python_tag|>{CALL}", "I look.", ["f"], None),
        (LLAMA, '{"total": 3}', '{"total": 3}', [], None),
        (LLAMA, f"{CALL} and so on", f"{CALL} and so on", [], "ends before 'and so on'"),
        (MISTRAL, f"I look.[TOOL_CALLS] [{CALL}, {CALL}]", "I look.", ["f", "f"], None),
        (MISTRAL, '[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g[CALL_ID]a1[ARGS]{}', None, ["f", "g"], None),
        (MISTRAL, "[TOOL_CALLS]f(1)", "[TOOL_CALLS]f(1)", [], "a JSON list, or a name"),
    ],
)
def test_calls_leave_the_text_and_what_is_none_stays(
    kind: Any, text: str, content: str | None, names: list[str], error: str | None
) -> None:
    parsed = parse_tool_calls(kind, text)
    assert parsed.content == content
    assert [one["function"]["name"] for one in parsed.tool_calls] == names
    assert (error is None) == (parsed.error is None)
    assert error is None or (parsed.error is not None and error in parsed.error)


def test_ids_repeat_with_the_row_and_differ_between_rows() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    (one,), (same,), (other,) = (parse_tool_calls(HERMES, text, key).tool_calls for key in ("a", "a", "b"))
    assert one["id"] == same["id"] != other["id"]
    (short,) = parse_tool_calls(MISTRAL, f"[TOOL_CALLS][{CALL}]").tool_calls
    assert len(short["id"]) == 9


def generated(text: str, **columns: Any) -> Row:
    """A row as the stages before leave it: without special tokens in its text, with them in its tokens."""
    shown = text.replace("[TOOL_CALLS]", "")
    tokens = {"generated_tokens": [*map(ord, text), 0], "prompt_token_ids": [7], "finish_reason": "stop"}
    return Row.read({"generated_text": shown, "prompt": "hi", **tokens, "outputs": None, **columns})


def test_stages_follow_each_other() -> None:
    row = generated(f"<think>hm</think>Look: <tool_call>{CALL}</tool_call>", content="a column of the input")
    ReasoningStage(FakeTokenizer(), THINK).run([row])
    ToolCallStage(FakeTokenizer(), HERMES, reads_content=True).run([row])
    assert row.data["reasoning_content"] == "hm"
    assert row.data["content"] == "Look:"
    assert [call["function"] for call in row.data["tool_calls"]] == [{"name": "f", "arguments": '{"x": 1}'}]
    assert row.data["tool_call_error"] is None


def test_a_text_cut_off_in_its_reasoning_holds_no_calls() -> None:
    row = generated(f"<think>I could <tool_call>{CALL}</tool_call>")
    ReasoningStage(FakeTokenizer(), THINK).run([row])
    ToolCallStage(FakeTokenizer(), HERMES, reads_content=True).run([row])
    assert (row.data["content"], row.data["tool_calls"]) == (None, [])


def test_marks_that_are_special_tokens_are_found() -> None:
    row = generated(f"[TOOL_CALLS][{CALL}]")
    ToolCallStage(FakeTokenizer(), MISTRAL).run([row])
    assert len(row.data["tool_calls"]) == 1


def test_each_of_several_sequences_is_read() -> None:
    texts = ["<think>a</think>b", "<think>c"]
    sequences = [{"text": text, "token_ids": [1], "finish_reason": "length"} for text in texts]
    row = generated(texts[0], outputs=sequences)
    ReasoningStage(FakeTokenizer(), THINK).run([row])
    assert [(one["reasoning_content"], one["content"]) for one in row.data["outputs"]] == [("a", "b"), ("c", None)]
    assert to_columns([row.data])["outputs"].to_pylist()[0][1]["reasoning_content"] == "c"


def test_a_parser_must_be_named(model_folder: Any) -> None:
    def config(**fields: Any) -> EngineProcessorConfig:
        return EngineProcessorConfig(model_source=str(model_folder), **fields)

    with pytest.raises(ConfigError, match="no parser ''; known: deepseek_r1, mistral, qwen3"):
        config(reasoning_stage=True)
    with pytest.raises(ConfigError, match="no parser 'llama3'; did you mean 'llama3_json'"):
        config(tool_call_stage={"parser": "llama3"})
    assert config(tool_call_stage={"parser": "hermes"}).tool_call_stage.enabled
    assert not config().tool_call_stage.enabled


def test_the_stages_of_a_processor_read_what_a_model_wrote() -> None:
    """With a real tokenizer; a special token in the middle of a text is no part of it."""
    config = EngineProcessorConfig(
        model_source="bundled:invoices",
        reasoning_stage={"parser": "deepseek_r1"},
        tool_call_stage={"parser": "qwen", "batch_size": 1},
    )
    stages = make_stages(stages_on(Side.AFTER_ENGINE, config), UserFunction(PostprocessStage), stop_on_error=False)
    assert [stage.name for stage in stages] == ["detokenize", "reasoning", "tool_call"]
    tokenizer = load_tokenizer("bundled:invoices")
    assert tokenizer.special_tokens == {"<|im_start|>", "<|im_end|>", "<|pad|>"}
    text = f"hm</think>Look:<|pad|> <tool_call>{CALL}</tool_call><|im_end|>"
    (tokens,) = tokenizer.encode_batch([text], add_special_tokens=False)
    made = {"generated_text": None, "generated_tokens": tokens, "prompt_token_ids": [3, 4], "finish_reason": "stop"}
    rows = [Row.read({**made, "prompt": "<think>", "outputs": None})]
    run_stages(stages, rows)
    assert rows[0].error is None
    assert rows[0].data["reasoning_content"] == "hm"
    assert rows[0].data["content"] == "Look:"
    assert [one["function"]["name"] for one in rows[0].data["tool_calls"]] == ["f"]

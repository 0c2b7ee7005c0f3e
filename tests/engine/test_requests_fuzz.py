"""Prompts, conversations and parameters of any type cost themselves at most: their neighbours and the engine go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import ANYTHING, TEXT, check_error, check_serves, fuzz, only_user_errors
from millrace.engine.llm import LLM
from millrace.engine.lora.request import LoRARequest
from millrace.engine.pooling.params import PoolingParams
from millrace.engine.sampling_params import FIELD_NAMES, SamplingParams
from running import PROMPT, one

pytestmark = pytest.mark.soak

GREEDY = SamplingParams(temperature=0, max_tokens=4)
ON_ERROR = st.sampled_from(["return", "raise"])
TOKEN_IDS = st.lists(
    st.integers(0, 383) | st.integers() | st.sampled_from([True, 1.5, np.int32(7), -1, 384]), max_size=9
)
NAMES = st.sampled_from(["prompt", "prompt_token_ids", "cache_salt", "prompt_embeds"])
PROMPTS = (
    ANYTHING
    | TEXT
    | TOKEN_IDS
    | st.sampled_from(["a " * 5000, [5] * 300, [[[5]]], {}, {"prompt": "x", "extra": 1}, [5, None]])
    | st.dictionaries(NAMES, ANYTHING | TOKEN_IDS | TEXT, max_size=3)
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]) | ANYTHING, "text": TEXT | ANYTHING})
CALLS = st.fixed_dictionaries(
    {}, optional={"id": ANYTHING, "type": ANYTHING, "function": st.dictionaries(TEXT, ANYTHING, max_size=2) | ANYTHING}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | ANYTHING,
            "content": TEXT | st.lists(PARTS, max_size=2) | ANYTHING,
            "tool_calls": st.lists(CALLS, max_size=2) | ANYTHING,
            "name": ANYTHING,
        },
    )
    | ANYTHING,
    max_size=3,
)
CHAT_ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "tools": ANYTHING,
        "chat_template": st.sampled_from(["{{ messages }}", "{{ 1 / 0 }}", "{% for", "{{ tools }}"]) | ANYTHING,
        "chat_template_kwargs": st.dictionaries(st.sampled_from(["messages", "self", "tokenize"]) | TEXT, ANYTHING)
        | ANYTHING,
        "chat_template_content_format": ANYTHING,
        "cache_salt": ANYTHING,
        "priority": ANYTHING,
        "lora_request": ANYTHING,
        "add_generation_prompt": ANYTHING,
        "continue_final_message": ANYTHING,
    },
)


@pytest.fixture(scope="module")
def served(tiny_model) -> Iterator[tuple[LLM, list[int]]]:
    with LLM(
        str(tiny_model("llama")), dtype="float32", max_num_seqs=16, enable_prompt_embeds=True, enable_lora=True
    ) as llm:
        yield llm, one(llm, max_tokens=4).token_ids


@pytest.fixture(scope="module")
def embedder(tiny_model) -> Iterator[LLM]:
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=16, runner="pooling") as llm:
        yield llm


def check_alone(outputs: list[Any], expected: list[int]) -> None:
    """Checks that only the prompt in the middle may have failed, and that its neighbours have the right tokens."""
    before, asked, after = outputs
    for output in (before, after):
        assert output.error is None and output.outputs[0].token_ids == expected
    if asked.error is not None:
        check_error(asked.error)


@given(
    st.dictionaries(
        st.sampled_from(sorted(FIELD_NAMES)),
        ANYTHING | st.integers(0, 3) | st.lists(st.integers(-1, 400), max_size=3) | st.lists(TEXT, max_size=2),
        max_size=3,
    )
)
@fuzz
def test_parameters_of_any_type_are_run_or_refused_by_name(served, values):
    llm, expected = served
    with only_user_errors():
        params = SamplingParams.from_dict({"max_tokens": 4, **values})
        params = params.clone(n=min(params.n, 3))
        check_alone(llm.generate([PROMPT] * 3, [GREEDY, params, GREEDY], use_tqdm=False, on_error="return"), expected)
    check_serves(llm, expected)


@given(ANYTHING)
@fuzz
def test_a_wrong_element_of_the_parameters_is_the_error_of_its_prompt(served, params):
    llm, expected = served
    check_alone(llm.generate([PROMPT] * 3, [GREEDY, params, GREEDY], use_tqdm=False, on_error="return"), expected)
    with only_user_errors():
        llm.generate([PROMPT] * 2, params, use_tqdm=False, on_error="return")
    check_serves(llm, expected)


@given(ANYTHING, st.fixed_dictionaries({"lora_name": ANYTHING, "lora_int_id": ANYTHING, "lora_path": TEXT | ANYTHING}))
@fuzz
def test_a_wrong_adapter_of_any_type_is_the_error_of_its_prompt(served, request, fields):
    llm, expected = served
    settings = {"use_tqdm": False, "on_error": "return"}
    outputs = llm.generate([PROMPT] * 3, GREEDY, lora_request=[None, request, None], **settings)
    check_alone(outputs, expected)
    with only_user_errors():
        llm.generate([PROMPT] * 2, GREEDY, lora_request=request, **settings)
    with only_user_errors():
        LoRARequest(**fields)
    check_serves(llm, expected)


@given(PROMPTS, ON_ERROR)
@fuzz
def test_a_prompt_of_any_type_fails_alone(served, prompt, on_error):
    llm, expected = served
    with only_user_errors():
        outputs = llm.generate([PROMPT, prompt, PROMPT], GREEDY, use_tqdm=False, on_error=on_error)
        check_alone(outputs, expected)
    with only_user_errors():
        llm.generate(prompt, SamplingParams(max_tokens=2), use_tqdm=False, on_error=on_error)
    check_serves(llm, expected)


@given(PROMPTS)
@fuzz
def test_with_errors_returned_no_prompt_ends_the_call(served, prompt):
    llm, expected = served
    check_alone(llm.generate([PROMPT, prompt, PROMPT], GREEDY, use_tqdm=False, on_error="return"), expected)


@given(MESSAGES, CHAT_ARGUMENTS, ON_ERROR)
@fuzz
def test_a_conversation_of_any_type_fails_alone(served, messages, arguments, on_error):
    llm, expected = served
    plain = [{"role": "user", "content": "hello"}]
    (truth,) = llm.chat(plain, GREEDY, use_tqdm=False)
    check_alone(
        llm.chat([plain, messages, plain], GREEDY, use_tqdm=False, on_error="return"), truth.outputs[0].token_ids
    )
    with only_user_errors():
        llm.chat(messages, SamplingParams(max_tokens=2), use_tqdm=False, on_error=on_error, **arguments)
    with only_user_errors():
        llm.chat([plain, messages], SamplingParams(max_tokens=2), use_tqdm=False, on_error=on_error, **arguments)
    check_serves(llm, expected)


@given(ANYTHING, ANYTHING, ANYTHING)
@fuzz
def test_other_arguments_of_any_type_are_taken_or_refused(served, priority, use_tqdm, on_error):
    llm, expected = served
    if not callable(use_tqdm):
        with only_user_errors():
            llm.generate(
                [PROMPT] * 2, GREEDY, False if use_tqdm is None else use_tqdm, priority=priority, on_error="return"
            )
    with only_user_errors():
        llm.generate([PROMPT] * 2, GREEDY, False, on_error=on_error)
    check_serves(llm, expected)


@given(PROMPTS, ANYTHING, st.dictionaries(st.sampled_from(["task", "dimensions", "normalize"]), ANYTHING), ON_ERROR)
@fuzz
def test_a_prompt_of_any_type_is_embedded_or_fails_alone(embedder, prompt, params, values, on_error):
    (truth,) = embedder.embed(PROMPT, use_tqdm=False)
    outputs = embedder.embed(
        [PROMPT, prompt, PROMPT],
        pooling_params=[PoolingParams(), params, PoolingParams()],
        use_tqdm=False,
        on_error="return",
    )
    with only_user_errors():
        made = PoolingParams.from_dict(values)
        outputs += embedder.embed([PROMPT, prompt, PROMPT], pooling_params=made, use_tqdm=False, on_error=on_error)[:0]
    for output in (outputs[0], outputs[2]):
        np.testing.assert_allclose(output.outputs.embedding, truth.outputs.embedding, atol=1e-5)
    if outputs[1].error is not None:
        check_error(outputs[1].error)
    with only_user_errors():
        embedder.encode(prompt, use_tqdm=False, pooling_task=params, on_error=on_error)
    with only_user_errors():
        embedder.score(prompt, params, use_tqdm=False)
    embedder.llm_engine.check_integrity()

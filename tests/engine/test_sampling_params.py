"""Sampling parameters are checked when they are made, and say what is wrong with what."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from millrace.engine.errors import SamplingParamsError, quote
from millrace.engine.sampling_params import SamplingParams

WRONG = [
    ({"n": 0}, "n must be an integer from 1"),
    ({"n": 2, "temperature": 0}, "equal sequences"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": 2.5}, "temperature must be"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"temperature": "warm"}, "temperature must be"),
    ({"top_p": 0}, "top_p must be a number above 0"),
    ({"top_p": 1.1}, "top_p must be"),
    ({"top_k": -2}, "top_k must be"),
    ({"top_k": 1.5}, "top_k must be"),
    ({"min_p": 1.5}, "min_p must be"),
    ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty must be"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty must be a number from 1e-6 to 1e6"),
    ({"repetition_penalty": 0}, "repetition_penalty must be"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
    ({"max_tokens": 0}, "max_tokens must be"),
    ({"max_tokens": True}, "max_tokens must be"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens=4"),
    ({"logprobs": -2}, "logprobs must be"),
    ({"prompt_logprobs": -2}, "prompt_logprobs must be"),
    ({"stop": [""]}, "stop must be non-empty strings"),
    ({"stop": [3]}, "stop must be non-empty strings"),
    ({"stop": "x", "detokenize": False}, "detokenize"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids must be"),
    ({"stop_token_ids": 3}, "stop_token_ids must be a list"),
    ({"allowed_token_ids": []}, "allowed_token_ids must be at least one"),
    ({"bad_words": [""]}, "bad_words must be"),
    ({"logit_bias": {"a": 1}}, "logit_bias must be"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias must be .* finite"),
    ({"logit_bias": {1: 10**400}}, "logit_bias must be"),
    ({"logit_bias": {1.5: 1}}, "logit_bias must be"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias must be"),
    ({"logit_bias": 3}, "logit_bias must be a mapping"),
    ({"bad_words": ["a" * 1001]}, "bad_words must be words of at most 1000 characters"),
    ({"bad_words": ["\ud800"]}, "bad_words must be non-empty strings of valid Unicode"),
    ({"stop": ["\udfff"]}, "stop must be non-empty strings of valid Unicode"),
    ({"stop": [["x"]]}, "stop must be a list of strings"),
    ({"stop": b"x"}, "stop must be a list"),
    ({"stop_token_ids": np.array(5)}, "stop_token_ids must be a list"),
    ({"stop_token_ids": [{}]}, "stop_token_ids must be a list"),
    ({"seed": np.zeros(2)}, "seed must be"),
    ({"top_k": np.zeros(2)}, "top_k must be"),
    ({"temperature": 10**400}, "temperature must be"),
    ({"max_tokens": "x" * 100_000}, "max_tokens must be"),
    ({"structured_outputs": {"regex": "x" * 5000, "choice": 3}}, "exactly one"),
    ({"seed": 2**64}, "seed must be"),
    ({"tempreature": 1}, "did you mean 'temperature'"),
    ({10**5000: 1}, "SamplingParams has no field"),
    ({"x" * 5000: 1}, "SamplingParams has no field"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[quote(values, 60) for values, _ in WRONG])
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(SamplingParamsError, match=message) as caught:
        SamplingParams.from_dict(values)
    assert isinstance(caught.value, ValueError) and len(str(caught.value)) < 500
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_values_are_brought_to_one_form():
    params = SamplingParams(stop="x", seed=-1, top_k=-1, logprobs=True, logit_bias={"3": 200}, stop_token_ids=[4, 4])
    assert (params.stop, params.seed, params.top_k, params.logprobs) == (["x"], None, 0, 1)
    assert (params.logit_bias, params.stop_token_ids) == ({3: 100.0}, [4])
    greedy = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.5)
    assert greedy.is_greedy and (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0, 1, 0, 0)


def test_a_tiny_temperature_is_raised_with_a_warning(caplog):
    assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "temperature" in caplog.text


def test_numbers_of_a_dataset_row_become_python_numbers():
    params = SamplingParams.from_dict({"temperature": np.float32(0.5), "max_tokens": np.int64(7), "stop": None})
    assert (type(params.temperature), type(params.max_tokens)) == (float, int)
    assert (params.temperature, params.max_tokens, params.stop) == (0.5, 7, None)
    assert SamplingParams.from_dict({"max_tokens": None}).max_tokens is None


def test_limits_of_the_model_are_checked():
    SamplingParams(stop_token_ids=[99], logprobs=20).check_against_model(100, 20)
    for values in ({"stop_token_ids": [100]}, {"allowed_token_ids": [-1]}, {"logit_bias": {100: 1}}, {"logprobs": 21}):
        with pytest.raises(SamplingParamsError):
            SamplingParams(**values).check_against_model(100, 20)
    SamplingParams(logprobs=-1).check_against_model(100, -1)

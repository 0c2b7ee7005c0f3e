"""Messages between ranks hold plain values, arrays and errors, and nothing else can be read out of one."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.errors import CheckpointError, ModelExecutionError
from millrace.engine.parallel.wire import decode, encode

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=10,
)


@given(PLAIN)
def test_plain_values_come_back(value) -> None:
    assert decode(encode(value)) == value


def test_arrays_come_back_in_their_places() -> None:
    sent = {"x": [np.arange(6).reshape(2, 3)[:, 1:], np.zeros((0, 4), np.float32)], "y": np.array([True, False])}
    got = decode(encode(sent))
    for ours, theirs in zip([*sent["x"], sent["y"]], [*got["x"], got["y"]], strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
        assert theirs.flags.writeable and theirs.flags.aligned


def test_an_error_comes_back_as_its_class() -> None:
    error = decode(encode(CheckpointError("no config.json")))
    assert type(error) is CheckpointError and str(error) == "no config.json"
    assert type(decode(message({"__error__": ["SystemExit", "3"]}))) is ModelExecutionError


def message(value, content: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<I", len(text)) + text + content


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        pickle.dumps(3),
        encode([1]) + b"x",
        encode([1])[:-1],
        message({"__array__": ["O", [1]]}, bytes(8)),
        message({"__array__": ["B", [-1]]}),
        message({"__array__": ["q", [2**62, 0, 1 << 40]]}, bytes(8)),
        message({"__array__": ["q", [2**62]]}, bytes(8)),
    ],
    ids=["empty", "pickle", "longer", "shorter", "objects", "negative", "rest", "huge"],
)
def test_what_is_no_message_is_an_error(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=r"message|Expecting|array"):
        decode(wrong)

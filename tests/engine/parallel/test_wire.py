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

KEYS = st.sampled_from(["a", "b", "", "array", "error", "__array__", '"_', *("_" * length for length in range(1, 5))])
"""Names in dicts; some are those that messages themselves use."""

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=10,
)


@given(PLAIN)
def test_plain_values_come_back(value) -> None:
    assert decode(encode(value)) == value


@given(PLAIN, st.dictionaries(KEYS, PLAIN))
def test_no_name_of_a_dict_is_taken_for_an_array_or_an_error(value, named) -> None:
    got = decode(encode([value, np.arange(3), named, {"_": CheckpointError("x"), "__": [named]}]))
    assert (got[0], got[2], got[3]["__"]) == (value, named, [named])
    np.testing.assert_array_equal(got[1], np.arange(3))
    assert type(got[3]["_"]) is CheckpointError


def test_arrays_come_back_in_their_places() -> None:
    sent = {"x": [np.arange(6).reshape(2, 3)[:, 1:], np.zeros((0, 4), np.float32)], "y": np.array([True, False])}
    got = decode(encode(sent))
    for ours, theirs in zip([*sent["x"], sent["y"]], [*got["x"], got["y"]], strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
        assert theirs.flags.writeable and theirs.flags.aligned


def test_an_error_comes_back_as_its_class() -> None:
    error = decode(encode(CheckpointError("no config.json")))
    assert type(error) is CheckpointError and str(error) == "no config.json"
    assert type(decode(message({"_": ["error", "SystemExit", "3"]}))) is ModelExecutionError


def message(value, content: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<II", len(text), 1) + text + content


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        pickle.dumps(3),
        encode([1]) + b"x",
        encode([1])[:-1],
        message({"_": ["array", "O", [1]]}, bytes(8)),
        message({"_": ["array", "B", [-1]]}),
        message({"_": ["array", "q", [2**62, 0, 1 << 40]]}, bytes(8)),
        message({"_": ["array", "q", [2**62]]}, bytes(8)),
        message({"_": 3}),
        message({"_": ["array", [], 1]}),
        struct.pack("<II", 2**31, 1) + b"[1]",
        struct.pack("<II", 3, 2**31) + b"[1]",
    ],
    ids=["empty", "pickle", "longer", "shorter", "objects", "negative", "rest", "huge", "odd", "types", "size", "mark"],
)
def test_what_is_no_message_is_an_error(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=r"message|Expecting|array"):
        decode(wrong)

"""Text of outputs: whole characters, found stop strings, nothing of the prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.detokenizer import StopStringMatcher, decode_continuation


class Bytes:
    """A tokenizer of bytes, the hardest one: a character has up to four tokens. 256 is a special token."""

    def decode_ids(self, token_ids, skip_special_tokens):
        parts = b"".join(bytes([i]) if i < 256 else b"" if skip_special_tokens else b"<s>" for i in token_ids)
        return parts.decode(errors="replace")


class Words:
    """A tokenizer that strips the space before a first word, as sentencepiece ones do."""

    def decode_ids(self, token_ids, skip_special_tokens):
        return "".join(f" {'abcdefgh'[i % 8]}" for i in token_ids).lstrip()


@given(prompt=st.text(max_size=12), output=st.text(max_size=12))
def test_an_output_continues_its_prompt(prompt, output):
    prompt, output = prompt.encode(errors="replace"), output.encode(errors="replace")
    assert decode_continuation(Bytes(), list(prompt), list(output), True) == output.decode()


def test_the_space_between_prompt_and_output_belongs_to_the_output():
    assert decode_continuation(Words(), [0, 1], [2, 3], True) == " c d"
    assert decode_continuation(Words(), [], [2, 3], True) == "c d"


def test_a_character_split_between_prompt_and_output_is_the_outputs():
    euro = "€".encode()
    assert decode_continuation(Bytes(), [97, *euro[:1]], [*euro[1:], 98], True) == "€b"


@given(
    text=st.text(alphabet="abé€😀 ", max_size=30),
    stops=st.lists(st.text(alphabet="abé€😀 ", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_the_first_completed_stop_string_cuts(text, stops, include):
    matcher = StopStringMatcher(Bytes(), list(b"prompt"), stops, include_stop=include)
    for byte in text.encode():
        if matcher.push(byte):
            break
    # Characters arrive whole: a match completes with the character that ends it.
    ends = {text.find(stop) + len(stop): stop for stop in reversed(stops) if stop in text}
    if not ends:
        assert matcher.matched is None and matcher.text == text
        return
    end = min(ends)
    assert matcher.matched == ends[end] or text[:end].endswith(matcher.matched)
    begin = end - len(matcher.matched)
    assert matcher.text == text[: end if include else begin]


@pytest.mark.parametrize("may_stop", [True, False])
def test_a_stop_string_before_min_tokens_does_not_count(may_stop):
    matcher = StopStringMatcher(Bytes(), [], ["ab"])
    for byte in b"ab":
        matcher.push(byte, may_stop)
    assert (matcher.matched is not None) == may_stop
    matcher.push(ord("b"))
    assert (matcher.matched is not None) == may_stop

"""Text of outputs: whole characters, found stop strings, nothing of the prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from millrace.engine.text.detokenizer import StopStringMatcher, decode_continuation


class Bytes:
    """A tokenizer of bytes, the hardest one: a character has up to four tokens. 256 is a special token."""

    def decode_ids(self, token_ids, skip_special_tokens):
        parts = b"".join(bytes([i]) if i < 256 else b"" if skip_special_tokens else b"<s>" for i in token_ids)
        return parts.decode(errors="replace")


def byte_fallback() -> Tokenizer:
    """A tokenizer as sentencepiece makes them: a character it does not know is a run of byte tokens."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


class ByteFallback:
    """Decodes a run of byte tokens all together or not at all."""

    def __init__(self) -> None:
        self.tokenizer = byte_fallback()

    def decode_ids(self, token_ids, skip_special_tokens):
        return self.tokenizer.decode(list(token_ids))


@pytest.mark.parametrize("prompt", ["日本", "😀😀", "x😀", "a", "日本語の長い文"])
def test_an_output_after_a_run_of_byte_tokens_is_whole(prompt):
    decoder, prompt_ids, output_ids = ByteFallback(), list(prompt.encode()), list("😀é!".encode())
    assert decode_continuation(decoder, prompt_ids, output_ids, True) == "😀é!"
    matcher = StopStringMatcher(decoder, prompt_ids, ["!"])
    assert [matcher.push(token_id) for token_id in output_ids][-1]
    assert matcher.text == "😀é"


def test_text_does_not_depend_on_whether_there_is_a_stop_string():
    start, rest = "日".encode()[:1], "日".encode()[1:]
    prompt, output = [97, 98, *start], [*rest, ord("x")]
    matcher = StopStringMatcher(Bytes(), prompt, ["never"])
    for token_id in output:
        matcher.push(token_id)
    assert matcher.text == decode_continuation(Bytes(), prompt, output, True) == "日x"


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

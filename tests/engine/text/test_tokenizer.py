"""Prompts: conversations in the form that a template reads, and special tokens that are added once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from checkpoints import tiny_tokenizer
from millrace.engine.errors import ChatTemplateError, ConfigError
from millrace.engine.text.tokenizer import Tokenizer

AS_TEXT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
AS_PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endfor %}"
)
AS_EITHER = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
CALLS = "{% for call in messages[0]['tool_calls'] %}{{ call['function']['arguments'] | tojson }}{% endfor %}"
PARTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": "up?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    hf = tiny_tokenizer()
    hf.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "joined"), [(AS_TEXT, "What is\nup?"), (AS_PARTS, "What isup?"), (AS_EITHER, "What isup?")]
)
def test_a_template_gets_contents_in_the_form_that_it_reads(tokenizer, template, joined):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
    assert tokenizer.render_chat(messages, chat_template=template) == f"<system>Be brief.<user>{joined}"


def test_the_form_of_contents_can_be_set(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages, chat_template=AS_TEXT, content_format="openai") == (
        "<user>[{'type': 'text', 'text': 'hi'}]"
    )
    assert tokenizer.render_chat([{"role": "user", "content": PARTS}], chat_template=AS_EITHER, content_format="string")
    with pytest.raises(ConfigError, match="must be one of auto, string, openai; got 'parts'"):
        tokenizer.render_chat(messages, content_format="parts")


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ('{"city": "Oslo", "unit": null}', {"city": "Oslo", "unit": None}),
        ({"city": "Oslo", "unit": None}, {"city": "Oslo", "unit": None}),
        ("", {}),
        ('{"city": "Os', '{"city": "Os'),
    ],
    ids=["text", "dict", "empty", "cut off"],
)
def test_arguments_of_tool_calls_reach_the_template_as_objects(tokenizer, arguments, rendered):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert json.loads(tokenizer.render_chat(messages, chat_template=CALLS)) == rendered
    assert call["function"]["arguments"] == arguments, "the caller's message is not changed"


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        [3],
        [{"content": "hi"}],
        [{"role": 3, "content": "hi"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["hi"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x" * 10_000}]}],
    ],
)
def test_what_is_no_conversation_is_named_in_short(tokenizer, messages):
    with pytest.raises(ChatTemplateError, match="message") as error:
        tokenizer.render_chat(messages)
    assert len(str(error.value)) < 300


def test_a_text_that_begins_with_the_beginning_token_gets_no_second_one(tokenizer):
    plain, rendered, twice = tokenizer.encode_batch(["hi", "<s>hi", "<s><s>hi"])
    assert plain == rendered == [1, *tokenizer.encode_batch(["hi"], add_special_tokens=False)[0]]
    assert twice == [1, *rendered]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as SentencePiece makes them: a mark for a space, also at the start of a text, and bytes."""
    names = ["<unk>", "</s>", "▁", "-", "a", "b", "d", "▁b", "ad", "bad", "▁bad"]
    vocab = {name: i for i, name in enumerate([*names, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("▁", "b"), ("a", "d"), ("b", "ad"), ("▁b", "ad")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("pieces")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("drawn", [["-", "bad"], ["-", "b", "ad"], ["▁bad"], ["▁b", "ad"], ["b", "a", "d"]])
def test_a_bad_word_is_known_in_any_spelling(pieces, drawn):
    words = [pieces.hf.convert_ids_to_tokens(ids) for ids in pieces.bad_word_ids(["bad", " bad"])]
    assert any(drawn[-len(word) :] == word for word in words)


def test_spellings_have_a_limit(tokenizer):
    words = [f"{i} reasonably long words" for i in range(100)]
    assert len(tokenizer.bad_word_ids(words)) <= 100 * 2 + 1024
    assert len(tokenizer.bad_word_ids(["long " * 1000])) <= 2

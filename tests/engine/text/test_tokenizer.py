"""Prompts: conversations in the form that a template reads, and special tokens that are added once."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from checkpoints import tiny_tokenizer
from millrace.engine.errors import ChatTemplateError, ConfigError
from millrace.engine.text.spellings import END, START
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


BY_ROLE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
)
SYSTEM_NEEDED = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + AS_PARTS
VARIANT_NEEDED = "{% if variant is undefined %}{{ raise_exception('no variant') }}{% endif %}" + AS_PARTS
IN_CAPITALS = AS_PARTS.replace("{{ part['text'] }}", "{{ part['text'] | upper | replace(' ', '_') }}")
NOT_THE_LAST = AS_PARTS.replace("in messages %}", "in messages[:-1] %}")
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
VISION = (  # As in Llama 3.2 Vision: the user's content in either form, the others' as text.
    "{% for m in messages %}<{{ m.role }}>{% if m.role != 'user' or m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "system", "user"),
    [
        (BY_ROLE, "Be\nbrief", "What isup?"),
        (VISION, "Be\nbrief", "What isup?"),
        (FIRST_PART, "Be\nbrief", "What is\nup?"),
        (SYSTEM_NEEDED, "Bebrief", "What isup?"),
        (VARIANT_NEEDED, "Bebrief", "What isup?"),
        (IN_CAPITALS, "BEBRIEF", "WHAT_ISUP?"),
        (NOT_THE_LAST, "Bebrief", "What isup?"),
    ],
    ids=["by role", "vision", "first part", "system needed", "variant needed", "in capitals", "not the last"],
)
@pytest.mark.parametrize("as_parts", [True, False])
def test_each_role_gets_contents_in_the_form_that_a_template_reads(tokenizer, template, system, user, as_parts):
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
    contents = {"system": (parts, system), "user": (PARTS, user), "assistant": (parts, system), "tool": (parts, system)}
    messages = [
        {"role": role, "content": given if as_parts else shown} for role, (given, shown) in contents.items()
    ] + [{"role": "user", "content": "end"}]
    expected = "".join(f"<{role}>{shown}" for role, (_, shown) in contents.items())
    rendered = tokenizer.render_chat(messages, chat_template=template, variant=1)
    assert rendered.lower() == (expected + ("" if template == NOT_THE_LAST else "<user>end")).lower()


def test_a_template_that_refuses_a_form_in_one_role_is_tried_in_the_others(tokenizer):
    template = "{% if messages[0].content is not string %}{{ raise_exception('text!') }}{% endif %}" + BY_ROLE
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages, chat_template=template) == "<system>Be brief<user>hi"


def test_a_role_whose_text_reaches_no_prompt_is_named_once(tokenizer, caplog):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    assert [tokenizer.render_chat(messages, chat_template=template) for _ in range(2)] == ["hi", "hi"]
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template shows no text of messages with the role 'system'"
    ]


def test_a_template_of_a_call_is_no_path(tokenizer, tmp_path):
    """A template may come from a row, which must not read files; `LLM.chat` reads the file that its caller names."""
    path = tmp_path / "chat.jinja"
    path.write_text(AS_TEXT)
    with pytest.raises(ChatTemplateError, match="must be Jinja text"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}], chat_template=str(path))
    assert tokenizer.read_template(str(path)) == AS_TEXT
    assert tokenizer.read_template(AS_TEXT) == AS_TEXT
    with pytest.raises(ConfigError, match="neither Jinja text nor a readable file"):
        tokenizer.read_template(str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["messages", "conversations", "self"])
def test_a_variable_that_stands_for_something_else_is_refused(tokenizer, name):
    with pytest.raises(ChatTemplateError, match="can be named conversations, messages, self"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}], **{name: 1})


@pytest.mark.parametrize("name", ["tools", "add_generation_prompt", "continue_final_message", "chat_template"])
def test_an_argument_of_a_wrong_type_is_named(tokenizer, name):
    for value in (np.array([1, 2]), object()):
        with pytest.raises(ChatTemplateError, match=f"(?i){name}"):
            tokenizer.render_chat([{"role": "user", "content": "hi"}], **{"chat_template": AS_TEXT, name: value})


WHAT_JSON_LACKS = {
    "ids": np.array([1, 2]),
    "when": date(2024, 5, 1),
    "at": np.datetime64("2024-05-01T12:30"),
    "price": Decimal("1.50"),
    "id": UUID(int=5),
    "names": {"a"},
    "data": b"ab",
    "score": np.float32(0.5),
    "big": 12345678901234567890123,
    "none": None,
}
AS_JSON = {
    "ids": [1, 2],
    "when": "2024-05-01",
    "at": "2024-05-01T12:30:00",
    "price": "1.50",
    "id": "00000000-0000-0000-0000-000000000005",
    "names": ["a"],
    "data": "ab",
    "score": 0.5,
    "big": 12345678901234567890123,
    "none": None,
}


def test_values_that_json_lacks_reach_the_prompt_as_they_are_written_in_json(tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": WHAT_JSON_LACKS}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert json.loads(tokenizer.render_chat(messages, chat_template=CALLS)) == AS_JSON
    for name in ("tools", "documents", "given"):
        template = AS_TEXT + f"|{{{{ {name}[0] | tojson }}}}"
        rendered = tokenizer.render_chat(
            [{"role": "user", "content": "hi"}], chat_template=template, **{name: [WHAT_JSON_LACKS]}
        )
        assert json.loads(rendered.partition("|")[2]) == AS_JSON


@pytest.mark.parametrize("value", [object(), b"\xff", print], ids=["object", "bytes", "function"])
def test_a_value_that_json_has_no_form_for_is_refused(tokenizer, value):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"x": value}}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ChatTemplateError, match="messages must hold values that JSON has"):
        tokenizer.render_chat(messages, chat_template=CALLS)
    with pytest.raises(ChatTemplateError, match="chat_template_kwargs must hold values that JSON has"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}], chat_template=AS_TEXT, given=value)


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


def is_forbidden(tokenizer: Tokenizer, words: list[str], token_ids: list[int]) -> bool:
    """Returns whether the last of some tokens ends a bad word that tokens before it begin."""
    reached = {START}
    for token_id in token_ids:
        edges = [
            edge for edge in tokenizer.bad_word_edges(words).tolist() if edge[0] in reached and edge[1] == token_id
        ]
        reached = {START} | {after for _, _, after, _ in edges}
    return END in reached


@pytest.mark.parametrize(
    "drawn",
    [["-", "bad"], ["-", "b", "ad"], ["▁bad"], ["▁b", "ad"], ["▁b", "a", "d"], ["b", "a", "d"], ["<0x62>", "ad"]],
    ids="".join,
)
def test_a_bad_word_is_known_in_any_spelling(pieces, drawn):
    assert is_forbidden(pieces, ["bad"], pieces.hf.convert_tokens_to_ids(drawn))
    assert not is_forbidden(pieces, ["bad"], pieces.hf.convert_tokens_to_ids(["ad", *drawn[:-1]]))


def test_a_bad_word_is_known_after_a_space_in_another_token_and_in_parts_of_characters(tokenizer):
    for word, parts in {"the": [" t", "he"], "水": [b"\xe6", b"\xb0", b"\xb4"], "down": [" do", "w", "n"]}.items():
        ids = [ids_of(tokenizer, part) for part in parts]
        assert is_forbidden(tokenizer, [word], [token_id for part in ids for token_id in part]), word
    assert not is_forbidden(tokenizer, ["own"], ids_of(tokenizer, " down")), "it begins in the middle of a token"


def ids_of(tokenizer: Tokenizer, part: str | bytes) -> list[int]:
    """Returns the tokens of a text, or of bytes of which each is a token."""
    if isinstance(part, str):
        return tokenizer.encode_batch([part], add_special_tokens=False)[0]
    names = bytes_to_unicode()
    return [tokenizer.hf.convert_tokens_to_ids(names[byte]) for byte in part]


def test_all_spellings_of_many_words_take_little_memory(tokenizer):
    words = [f"{i} reasonably long words" for i in range(100)]
    edges = tokenizer.bad_word_edges(words)
    assert edges is tokenizer.bad_word_edges(words), "all rows with the same words share them"
    assert edges.nbytes < 100 * 16 * 120
    assert is_forbidden(tokenizer, words[50:51], ids_of(tokenizer, words[50].encode()))


def test_spellings_have_a_limit_that_is_told(tokenizer, caplog):
    long = "long " * 100
    assert len(tokenizer.bad_word_edges([long])) <= 2 * len(tokenizer.encode_batch([long])[0])
    assert not caplog.records
    edges = tokenizer.bad_word_edges([f"{i} other long words of which there are many" for i in range(1000)])
    assert len(edges) < (1 << 14) + 1000 * 2 * 50
    assert "some are known in their usual spellings only" in caplog.text

"""Chat templates of strangers: one that runs for ever or grows is an error, and others render as transformers does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from checkpoints import tiny_tokenizer
from millrace.engine.errors import ChatTemplateError
from millrace.engine.text import template_sandbox
from millrace.engine.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return Tokenizer(folder)


def again(step: str, start: str = "'ab'", end: str = "") -> str:
    """Returns a template that changes `ns.x` a hundred times; `end` is what follows."""
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(100) %}}{step}{{% endfor %}}{end}"


ENDLESS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested lists": "{% set l = range(99)|list %}" + "{% for a in l %}" * 9 + "{% endfor %}" * 9,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "comparisons": "{% set a = 'a' * 10**6 %}{% set b = 'a' * 10**6 %}"
    "{% for i in range(90000) %}{% if a == b or a in b %}{% endif %}{% endfor %}",
    "sum of lists": "{{ ([[1]] * 100000)|sum(start=[]) }}",
}

GROWING = {
    "text": "{{ 'a' * 10**9 }}",
    "list": "{{ ([0] * 10**9)|length }}",
    "power": "{{ 10**(10**9) }}",
    "squares": again("{% set ns.x = ns.x * ns.x %}", "3"),
    "doubled": again("{% set ns.x = ns.x + ns.x %}"),
    "joined": again("{% set ns.x = ns.x ~ ns.x %}"),
    "block": again("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "lists of lists": again("{% set ns.x = [ns.x, ns.x] %}", end="{{ ns.x }}"),
    "dictionaries": again("{% set ns.x = {1: ns.x, 2: ns.x} %}", end="{{ ns.x | tojson }}"),
    "calls of dict": again("{% set ns.x = dict(a=ns.x, b=ns.x) %}", end="{{ ns.x | string }}"),
    "views": again("{% set ns.x = {1: ns.x, 2: ns.x}.items() %}", end="{{ ns.x }}"),
    "namespaces": again("{% set ns.x = namespace(a=ns.x, b=ns.x) %}", end="{{ ns.x }}"),
    "namespaces as text": again("{% set ns.x = namespace(a=ns.x, b=ns.x) %}", end="{{ ns.x | string }}"),
    "a namespace in one of its own": "{% set n = namespace() %}{% set n.x = n %}{{ n }}",
    "namespaces in a format": again("{% set ns.x = namespace(a=ns.x, b=ns.x) %}", end="{{ '%s' % ns }}"),
    "arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*('a' * 10**7)) }}",
    "title": "{{ ('a ' * 10**6) | title }}",
    "wordwrap of one word": "{{ ('a' * 10**7) | wordwrap(1) }}",
    "sorted again and again": "{% set x = range(99999) | list %}"
    "{% for i in range(999) %}{% set y = x | sort %}{% endfor %}",
    "batches": "{% for i in range(999) %}{% set x = ('a' * 10**5) | batch(2) | list %}{% endfor %}",
    "long": "{{ x }}" * 100_000,
    "constant": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "center": "{{ 'a' | center(10**9) }}",
    "center known before": "{{ 'a' | center(1000000000) | length }}",
    "center of a block": "{% filter center(10**9) %}a{% endfilter %}",
    "center of each": "{{ (['a'] * 1000) | map('center', 10**8) | list }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "ljust by name": "{{ ('a' | attr('ljust'))(10**9) }}",
    "zfill": "{{ 'a'['zfill'](10**9) }}",
    "bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%.1000000000f' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a format": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "join": "{{ range(99999) | join('a' * 100000) }}",
    "join method": "{{ ('a' * 100000).join('b' * 100000) }}",
    "join of a generator": "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "indent": "{{ ('a\n' * 1000) | indent(10**8) }}",
    "tojson": "{{ [1, 2] | tojson(indent=10**9) }}",
    "tojson text": "{{ (range(99999) | list) | tojson(indent='a' * 100000) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "wordwrap": "{{ ('a ' * 100000) | wordwrap(1, true, 'b' * 100000) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
}


@pytest.mark.parametrize("template", {**ENDLESS, **GROWING}.values(), ids={**ENDLESS, **GROWING}.keys())
def test_a_template_without_end_is_an_error_and_the_next_one_renders(tokenizer, template, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 50_000)  # The limit itself takes seconds.
    with pytest.raises(ChatTemplateError, match="the chat template refuses the conversation") as error:
        tokenizer.render_chat(MESSAGES, chat_template=template, content_format="string")
    assert len(str(error.value)) < 500
    assert tokenizer.render_chat(MESSAGES, chat_template="{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
        ("{{ ''.__class__.mro() }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "loader"),
        ("{{ " + "(" * 200_000, "more than 131,072 characters"),
    ],
)
def test_a_template_that_fails_says_why(tokenizer, template, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        tokenizer.render_chat(MESSAGES, chat_template=template, content_format="string")


@pytest.mark.parametrize(
    "name", ["messages", "self", "conversations", "chat_template", "tokenize", "add_generation_prompt"]
)
def test_a_variable_may_have_the_name_of_an_argument(tokenizer, name):
    with contextlib.suppress(ChatTemplateError):
        tokenizer.render_chat(MESSAGES, **{name: object()})


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Öslo <b>", "unit": None}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is\nup? <é> & 'so'"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSun.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "user", "content": "Go on."},
]
ORDINARY = {
    "its own": None,
    "reversed": "{% for m in messages[::-1] %}{{ m.role ~ ':' ~ loop.index0 }}{% endfor %}",
    "loop": "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}"
    "{{ loop.previtem.role if loop.previtem }}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.content | trim }}{% endfor %}",
    "loop with a condition": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.role }}"
    "{% else %}none{% endfor %}",
    "items": "{% for name, value in messages[0].items() %}{{ name }}={{ value }}{% endfor %}"
    "{{ messages[0] | dictsort }}",
    "tools": "{% if tools is defined and tools %}{{ tools | tojson(indent=4) }}{% endif %}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, text='') %}{% for m in messages %}"
    "{% if m.content is string and not ns.found %}"
    "{% set ns.found = m.role == 'user' %}{% set ns.text = ns.text + m['content'] %}{% endif %}{% endfor %}"
    "{{ ns.text }}",
    "macro": "{% macro show(m, last=false) %}<{{ m.role|upper }}>{{ caller(m) if caller }}{% endmacro %}"
    "{% for m in messages %}{% call(x) show(m) %}{{ x.content }}{% endcall %}{% endfor %}",
    "splits": "{{ messages[2].content.split('</think>')[-1].lstrip('\n') }}{{ '</think>' in messages[2].content }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ [3, 1, 2] | sort | sum }}"
    "{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='content') | first }}",
    "numbers": "{{ (messages | length - 1) % 2 == 0 }}{{ 7 // 2 + 2 ** 3 - 1.5 * 2 }}{{ 1730000000 + 1 }}"
    "{{ '=' * 20 }}",
    "formats": "{{ '%s has %d' % (messages[0].role, 3) }}{{ '{} {:>5}'.format('a', 1730000000) }}"
    "{{ '%5.2f' | format(3.14159) }}",
    "set block": "{% set x %}[{{ bos_token }}]{% endset %}{{ x }}{% filter upper %}abc{% endfilter %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "undefined": "{{ nothing }}|{{ nothing | default('x') }}|{{ messages[0].nothing }}|{{ nothing is defined }}",
    "replace": "{{ messages[1].content | replace('\n', '\n    ') | indent(4) }}"
    "{{ messages[1].content.replace('is', 'was') }}",
    "justify": "{{ 'a'.center(20) }}{{ '7'.zfill(3) }}{{ 'b'.ljust(100) }}|{{ 'c' | center(70) }}",
    "tuple": "{% set a, b = ('x', [1, 'y', {'z': none}]) %}{{ a }}{{ b }}{{ (1, 2) }}{{ b[1:] }}{{ range(3) | list }}",
}


@pytest.mark.parametrize("template", ORDINARY.values(), ids=ORDINARY.keys())
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_an_ordinary_template_renders_as_transformers_does(tokenizer, template, tools):
    expected = tokenizer.hf.apply_chat_template(
        CHAT, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.render_chat(CHAT, chat_template=template, tools=tools) == expected


def test_a_turn_that_goes_on_renders_as_transformers_does(tokenizer):
    chat = [*CHAT, {"role": "assistant", "content": "It is "}]
    expected = tokenizer.hf.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert tokenizer.render_chat(chat, continue_final_message=True) == expected


def test_a_long_conversation_is_within_the_limits(tokenizer):
    chat = [{"role": "user", "content": "word " * 1000}] * 1000
    expected = tokenizer.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(chat) == expected

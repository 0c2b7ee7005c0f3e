"""Whatever a job file holds, it is a job or an error in a few words that names the file; the next file is read."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.engine.errors import ConfigError, UserError
from millrace.pipeline import JobConfig, load_job
from millrace.pipeline.job.run import prepare_job

MAX_EXAMPLES = int(os.environ.get("MILLRACE_FUZZ_EXAMPLES", "300"))

GOOD = {
    "model": "model",
    "input": "in.jsonl",
    "output": "out",
    "prompt": "'{line}'",
    "columns": "[id]",
    "batch_size": "16",
    "sampling": "{temperature: 0, max_tokens: 8}",
    "engine": "{max_num_seqs: 32}",
}
MORE = {
    "sampling": "{stop: ['\\n'], logit_bias: {5: 1.0}, structured_outputs: {json: {type: object}}}",
    "messages": "[{role: user, content: '{line}'}]",
    "prices": "{per_accelerator_hour: {H100: 2.5}, currency: EUR}",
    "columns_as_text": "[id]",
    "key": "[id]",
}
FIELDS = sorted(JobConfig.model_fields)
NAMES = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from([f"{name}s" for name in FIELDS] + [name.upper() for name in FIELDS]),
    st.sampled_from(
        [
            *(
                "null",
                "~",
                "yes",
                "0x10",
                "1.5",
                "2024-01-01",
                "<<",
                "''",
                "' '",
                "!!str model",
                "&a model",
                "*a",
                "? [a]",
            ),
            *(
                "? {a: 1}",
                "!!binary aGk=",
                "=",
                "sampling.top_p",
                "__class__",
                "model_config",
                "self",
                "a" * 5000,
                '"\\0"',
            ),
            *('"\\ud800"', "'a\n\n  b'", "!x y", "values", "loc", "engine: {x", "model_fields", "- a"),
        ]
    ),
)
SCALARS = st.sampled_from(
    [
        *(
            "yes",
            "no",
            "on",
            "~",
            "null",
            "",
            "0x10",
            "0o17",
            "017",
            "1_000",
            "12:30:45",
            "2024-01-01",
            "2024-13-45",
            "=",
            "<<",
        ),
        *(
            ".inf",
            "-.inf",
            ".nan",
            "1e400",
            "1e5",
            "-1",
            "0",
            "1",
            "1.5",
            "9" * 30,
            "9" * 5000,
            "true",
            "'12'",
            "''",
            "' '",
        ),
        *(
            "!!binary aGk=",
            "!!set {a}",
            "!!omap [a: 1]",
            "!!int x",
            "!!float x",
            "!!bool maybe",
            "!!timestamp x",
            "!!null x",
        ),
        *(
            "!!python/object/apply:os.getcwd []",
            "!unknown x",
            "!!str 12",
            "!!int '12'",
            "!!map []",
            "!!seq {}",
            "!!merge x",
        ),
        *(
            "text",
            '"\\ud800"',
            '"\\0"',
            '"\\x"',
            "'{line'",
            "'{line!r}'",
            "'{0}'",
            "'{}'",
            "'" + "x" * 5000 + "'",
            "'" + "{a}" * 3000 + "'",
        ),
        *(
            "*nowhere",
            "&a [*a]",
            "&a x",
            "[" * 200 + "]" * 200,
            "{a: " * 200 + "}" * 200,
            "[" * 3000,
            "|\n  a\n  b",
            "[a, [b, {c: 1}]]",
        ),
        *(
            "{<<: {a: 1}}",
            "{<<: [1]}",
            "{a: 1, a: 2}",
            "{null: 1}",
            "{? [a]: 1}",
            "bundled:nothing",
            "model\x00",
            "\x85",
            "\ufeff",
        ),
        *(
            "parquet",
            "jsonl",
            "csv",
            "input",
            "row",
            "stop",
            "2024-01-01T00:00:00Z",
            "[" + "x, " * 3000 + "]",
            "[" + "{}, " * 500 + "]",
        ),
        *(
            "0777",
            "+1",
            "1e-400",
            "-0",
            "0b11",
            "0.0",
            "1.",
            ".5",
            "190:20:30",
            "- a",
            "? a",
            "a: b",
            "#",
            "%",
            "@x",
            "`x`",
            "!",
        ),
        *(
            "[3, null, 2.5, yes]",
            "{json: {$ref: '#/x'}}",
            "{json: '{'}",
            "{regex: '('}",
            "{choice: []}",
            "[null]",
            "[[]]",
            "{'': ''}",
        ),
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        st.lists(st.tuples(NAMES, inner), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{name}: {value}" for name, value in pairs) + "}"
        ),
    ),
    max_leaves=4,
)
SUBFIELDS = st.sampled_from(
    [
        *(
            ("engine", name)
            for name in ("max_model_len", "seed", "dtype", "device", "num_threads", "hf_overrides", "x")
        ),
        *(
            ("engine", name)
            for name in ("tensor_parallel_size", "quantization", "block_size", "kv_cache_bytes", "tokenizer")
        ),
        *(
            ("sampling", name)
            for name in ("n", "top_p", "stop", "seed", "logit_bias", "bad_words", "structured_outputs")
        ),
        *(
            ("sampling", name)
            for name in ("max_tokens", "logprobs", "min_tokens", "stop_token_ids", "allowed_token_ids")
        ),
        *(("prices", name) for name in ("per_accelerator_hour", "currency", "per_replica_hour", "x")),
    ]
)


@st.composite
def job_texts(draw: Any) -> bytes:
    """Draws the text of a job file: a good one after some changes."""
    fields = dict(GOOD)
    for name in draw(st.lists(st.sampled_from(sorted(MORE)), max_size=2)):
        fields[name] = MORE[name]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(FIELDS) | NAMES)
        fields[name] = draw(VALUES)
    if draw(st.booleans()):
        name, inside = draw(SUBFIELDS)
        fields[name] = f"{{{inside}: {draw(VALUES)}}}"
    for name in draw(st.lists(st.sampled_from(sorted(GOOD)), max_size=1)) if draw(st.booleans()) else []:
        fields.pop(name, None)
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    change = draw(st.sampled_from([*["none"] * 8, "tab", "cut", "insert", "twice", "many", "yaml", "crlf", "wrapped"]))
    at = draw(st.integers(0, len(text)))
    text = {
        "tab": text[:at] + "\t" + text[at:],
        "cut": text[:at],
        "insert": text[:at] + draw(st.text(max_size=5)) + text[at:],
        "twice": text + text,
        "many": f"{text}---\n{text}",
        "yaml": f"%YAML 9.9\n---\n{text}",
        "crlf": text.replace("\n", "\r\n"),
        "wrapped": f"[{text}]",
    }.get(change, text)
    encoding = draw(st.sampled_from([*["utf-8"] * 8, "utf-8-sig", "utf-16", "latin-1"]))
    return text.encode(encoding, "replace") + draw(st.sampled_from([*[b""] * 8, b"\x00", b"\xff", b"..."]))


@pytest.mark.soak
@settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=job_texts())
def test_any_job_file_is_a_job_or_is_refused_in_words(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "in.jsonl").write_text('{"id": 1, "line": "a"}\n')
        file = folder / "job.yaml"
        file.write_bytes(content)
        try:
            job = load_job(file)
        except ConfigError as error:
            assert "job.yaml" in str(error)  # noqa: PT017  # many are read
            assert len(str(error)) < 1500  # noqa: PT017  # many are read
        else:
            check_prepared(job)
        good = folder / "good.yaml"
        good.write_text("".join(f"{name}: {value}\n" for name, value in GOOD.items()))
        assert load_job(good).sampling == {"temperature": 0, "max_tokens": 8}


def check_prepared(job: JobConfig) -> None:
    """A job that was read can be checked and described, or is refused in words."""
    try:
        prepared = prepare_job(job)
    except UserError as error:
        assert len(str(error)) < 1500  # noqa: PT017  # many are read
    else:
        json.dumps(dataclasses.asdict(prepared.state), allow_nan=False).encode()

"""Embeddings in batch files: what a line may ask, what the answer is, and whole files of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import BatchError, CreateEmbeddingResponse

from millrace.engine import LLM, PoolingParams
from millrace.engine.errors import ConfigError
from millrace.pipeline import columns
from millrace.pipeline.openai_batch.batch_config import BatchConfig
from millrace.pipeline.openai_batch.job import prepare_batch, run_batch
from millrace.pipeline.openai_batch.lines.embedding import EmbeddingRequest
from millrace.pipeline.openai_batch.lines.line_error import LineError
from millrace.pipeline.openai_batch.lines.request import RequestReader
from millrace.pipeline.openai_batch.lines.response import answer_line

READER = RequestReader(("m",), task="embed")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def line(custom_id: str = "a", url: str = "/v1/embeddings", **body: Any) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": url}
    return json.dumps({**fields, "body": {"model": "m", **body}}).encode()


def answer(read: EmbeddingRequest, vectors: Any) -> dict[str, Any]:
    row = {columns.EMBEDDINGS: vectors, columns.NUM_INPUT_TOKENS: 5}
    return json.loads(answer_line(read, row, 0, "fp"))["response"]["body"]


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("one", ["one"]),
        (["one"], ["one"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_input_takes_every_form(given: Any, inputs: list[Any]) -> None:
    read = READER.read(line(input=given, dimensions=8, user="me"))
    assert isinstance(read, EmbeddingRequest)
    assert (read.inputs, read.pooling) == (inputs, PoolingParams(task="embed", dimensions=8))
    name = columns.PROMPT if isinstance(inputs[0], str) else columns.TOKENIZED_PROMPT
    assert (read.columns[name], read.columns[columns.MORE_PROMPTS]) == (inputs[0], inputs[1:])


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a", 5]}, "invalid_type", "input"),
        ({"input": [[5], "a"]}, "invalid_type", "input"),
        ({"input": [[5], 6]}, "invalid_type", "input"),
        ({"input": [True]}, "invalid_type", "input"),
        ({"input": {"text": "a"}}, "invalid_type", "input"),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": "8"}, "invalid_type", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"input": "a", "temperature": 1}, "unknown_parameter", "temperature"),
        ({"input": "a", "model": "other"}, "model_not_found", "model"),
    ],
)
def test_a_wrong_body_is_named(body: dict[str, Any], code: str, param: str) -> None:
    read = READER.read(line(**body))
    assert isinstance(read, LineError)
    assert (read.code, read.param) == (code, param)


def test_the_answer_is_one_of_openais() -> None:
    one = READER.read(line(input="a"))
    assert isinstance(one, EmbeddingRequest)
    read = CreateEmbeddingResponse.model_validate(answer(one, [0.5, -0.25]), strict=True)
    assert [item.embedding for item in read.data] == [[0.5, -0.25]]
    assert (read.model, read.usage.prompt_tokens, read.usage.total_tokens) == ("m", 5, 5)
    two = READER.read(line(input=["a", "b"], encoding_format="base64"))
    assert isinstance(two, EmbeddingRequest)
    data = answer(two, [[0.5, 1.0], [0.1, 3.0]])["data"]
    assert [item["index"] for item in data] == [0, 1]
    assert np.frombuffer(base64.b64decode(data[1]["embedding"]), "<f4").tolist() == np.float32([0.1, 3.0]).tolist()


def test_parsers_of_answers_have_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"broken\n" + line(input="a") + b"\n")
    files = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    assert prepare_batch(BatchConfig(model="bundled:invoices", **files)).processor.task_type == "embed"
    with pytest.raises(ConfigError, match="one of embeddings"):
        prepare_batch(BatchConfig(model="bundled:invoices", tool_call_parser="hermes", **files))


@pytest.mark.slow
def test_a_file_of_embeddings_comes_back_as_those_of_the_engine(cluster: None, tmp_path: Path) -> None:
    texts = [f"Inv #{i} - due {i} March '24" for i in range(20)]
    lines = [line(f"e{i}", input=text) for i, text in enumerate(texts)]
    lines += [line("many", input=texts[:3], dimensions=8), line("ids", input=[[5, 6], [7]], encoding_format="base64")]
    broken = [
        (line("chat", "/v1/chat/completions", messages=CHAT["messages"]), "unsupported_endpoint"),
        (line("wide", input="a", dimensions=100_000), "invalid_value"),
        (line("long", input=["a", "total " * 3000]), "context_length_exceeded"),
        (line("word", input=[[5], [10**6]]), "invalid_value"),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*lines, *(text for text, _ in broken)]) + b"\n")
    files = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    summary = run_batch(BatchConfig(model="bundled:invoices", batch_size=8, **files))
    assert (summary.num_rows_in, summary.num_rows_failed) == (26, 4)

    bodies = {}
    for text in (tmp_path / "out.jsonl").read_text().splitlines():
        whole = json.loads(text)
        bodies[whole["custom_id"]] = whole["response"]["body"]
    assert list(bodies) == [json.loads(text)["custom_id"] for text in lines]
    with LLM("bundled:invoices", runner="pooling") as llm:
        expected = [one.outputs.data for one in llm.encode([*texts, [5, 6], [7]], pooling_task="embed", use_tqdm=False)]
        eight = llm.embed(texts[:3], pooling_params=PoolingParams(dimensions=8), use_tqdm=False)
    for i in range(20):
        read = CreateEmbeddingResponse.model_validate(bodies[f"e{i}"], strict=True)
        np.testing.assert_allclose(read.data[0].embedding, expected[i], atol=2e-2)
    for item, wanted in zip(bodies["many"]["data"], eight, strict=True):
        np.testing.assert_allclose(item["embedding"], wanted.outputs.embedding, atol=2e-2)
    for item, wanted in zip(bodies["ids"]["data"], expected[20:], strict=True):
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), wanted, atol=2e-2)
    assert bodies["ids"]["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    errors = [json.loads(text)["error"] for text in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [BatchError.model_validate(one, strict=True).code for one in errors] == [code for _, code in broken]

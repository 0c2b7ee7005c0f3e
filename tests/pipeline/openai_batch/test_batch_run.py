"""Whole batches: every line is in one of two files, whatever is wrong with it and whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion

from millrace.pipeline.cli import app
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.openai_batch import job, run_batch

sys.path.insert(0, str(Path(__file__).parent))

from batch_driver import batch_config

DEADLINE_S = 120.0
MODEL = "gpt-4o"


SCHEMA = {"type": "json_schema", "json_schema": {"name": "digit", "strict": True, "schema": {"enum": [1, 22]}}}
TOOL = {"type": "function", "function": {"name": "pay", "parameters": {"enum": [{}]}}}
CALL = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 99}


def line(number: int, **changes: Any) -> bytes:
    """Returns a line: a chat, or every third time a completion; log-probabilities, two answers, a schema or a forced
    call now and then."""
    text = f"Inv #{number} - due {number % 28 + 1} March '24 - total USD {number}.50"
    common = {"model": MODEL, "max_tokens": 2 + number % 3, "temperature": number % 2}
    asked = {**common, "messages": [{"role": "user", "content": text}], "logprobs": number % 5 == 0}
    asked |= {"response_format": SCHEMA} if number % 4 == 1 else CALL if number % 8 == 2 else {}
    completion = {**common, "prompt": text, "n": 1 + number % 2, "echo": number % 6 == 0}
    url, body = ("completions", completion) if number % 3 == 0 else ("chat/completions", asked)
    fields = {"custom_id": f"request-{number}", "method": "POST", "url": f"/v1/{url}", "body": body}
    return json.dumps({**fields, **changes}).encode()


def with_body(number: int, **changes: Any) -> bytes:
    whole = json.loads(line(number))
    return json.dumps({**whole, "body": {**whole["body"], **changes}}).encode()


def chat(number: int, messages: Any) -> bytes:
    return line(number, url="/v1/chat/completions", body={"model": MODEL, "messages": messages})


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
LONG = [{"role": "user", "content": "total " * 2000}]

BROKEN = (
    ("invalid_json_line", lambda number: line(number)[:-20]),
    ("invalid_url", lambda number: line(number, url="/v1/chat")),
    ("duplicate_custom_id", lambda number: line(number, custom_id="request-1")),
    ("unknown_parameter", lambda number: with_body(number, temprature=1)),
    ("invalid_json_line", lambda number: line(number).replace(b"total", b"\xff")),
    ("invalid_method", lambda number: line(number, method="GET")),
    ("missing_required_parameter", lambda number: line(number, custom_id=None)),
    ("unsupported_value", lambda number: chat(number, IMAGE)),
    ("context_length_exceeded", lambda number: chat(number, LONG)),
    ("model_not_found", lambda number: with_body(number, model="gpt-9")),
)  # fmt: skip


def batch_lines(num_lines: int, num_broken: int) -> Iterator[tuple[bytes, str | None]]:
    """Yields lines and the codes of the errors that they will be."""
    every = num_lines // num_broken
    for number in range(num_lines):
        if number % every == every - 1:
            code, make = BROKEN[number // every % len(BROKEN)]
            yield make(number), code
        else:
            yield line(number), None


def write_input(folder: Path, num_lines: int, num_broken: int) -> list[tuple[bytes, str | None]]:
    lines = list(batch_lines(num_lines, num_broken))
    assert sum(code is not None for _, code in lines) == num_broken
    (folder / "in.jsonl").write_bytes(b"\n".join(text for text, _ in lines) + b"\n\n")
    return lines


def check_output(folder: Path, lines: list[tuple[bytes, str | None]]) -> None:
    """Checks that both files hold every line once, in order, and that OpenAI's types take them."""
    answers = [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]
    asked = [json.loads(text) for text, code in lines if code is None]
    assert [one["custom_id"] for one in answers] == [one["custom_id"] for one in asked]
    for request, answer in zip(asked, answers, strict=True):
        check_answer(request["body"], answer)
    assert '"finish_reason":"tool_calls"' in (folder / "out.jsonl").read_text()
    errors = [json.loads(text) for text in (folder / "out.errors.jsonl").read_text().splitlines()]
    wanted = [(number, code) for number, (_, code) in enumerate(lines, start=1) if code is not None]
    read = [BatchError.model_validate(one["error"], strict=True) for one in errors]
    assert [(one.line, one.code) for one in read] == wanted
    assert len({one["id"] for one in [*answers, *errors]}) == len(lines)


def check_answer(body: dict[str, Any], answer: dict[str, Any]) -> None:
    assert set(answer) == {"id", "custom_id", "response", "error"}
    assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
    kind = ChatCompletion if "messages" in body else Completion
    read = kind.model_validate(answer["response"]["body"], strict=True)
    assert (read.model, len(read.choices)) == (MODEL, body.get("n", 1))
    assert {choice.finish_reason for choice in read.choices} <= {"tool_calls" if "tools" in body else "stop", "length"}
    assert read.usage is not None
    assert read.usage.completion_tokens <= body["max_tokens"] * len(read.choices)
    for choice in read.choices:
        assert (choice.logprobs is not None) == bool(body.get("logprobs"))
        if "response_format" in body:
            assert choice.message.content in ("1", "22", "2")[: 2 + (choice.finish_reason == "length")]
        if choice.finish_reason == "tool_calls":
            calls = [call.function for call in choice.message.tool_calls]
            assert {(call.name, call.arguments) for call in calls} == {("pay", "{}")}
        if body.get("echo"):
            assert choice.text.startswith(body["prompt"])


def test_a_file_without_lines_makes_two_empty_files_even_after_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n")
    config = batch_config(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))

    def fail(*_: object) -> int:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_answers", fail)
        with pytest.raises(OSError, match="disk full"):
            run_batch(config)
    assert not (tmp_path / "out.jsonl").exists()
    summary = run_batch(config)
    assert (summary.num_rows_in, summary.num_empty, summary.is_complete) == (0, 1, True)
    assert [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.errors.jsonl")] == [b"", b""]


@pytest.mark.soak
@pytest.mark.slow
def test_a_killed_batch_goes_on_to_two_whole_files(cluster: None, tmp_path: Path) -> None:
    lines = write_input(tmp_path, 200, 20)
    work = tmp_path / ".out.jsonl.millrace" / "work" / "results"
    arguments = [ray.get_runtime_context().gcs_address, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    script = Path(__file__).with_name("batch_driver.py")
    driver = subprocess.Popen([sys.executable, "-P", str(script), *arguments], stderr=subprocess.PIPE, text=True)
    until_s = time.monotonic() + DEADLINE_S
    while not list(work.glob("*.flush")):
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        assert time.monotonic() < until_s
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert not (tmp_path / "out.jsonl").exists()

    summary = run_batch(batch_config(*arguments[1:]))
    assert (summary.num_rows_in, summary.num_rows_out, summary.num_rows_failed, summary.num_empty) == (200, 200, 20, 1)
    check_output(tmp_path, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]


@pytest.mark.soak
def test_five_thousand_lines_are_all_accounted_for(tmp_path: Path) -> None:
    lines = write_input(tmp_path, 5000, 50)
    code = "from millrace.pipeline.cli import main; main()"
    command = [sys.executable, "-c", code, "batch", "in.jsonl", "out.jsonl", "--model", "bundled:invoices"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "5,000 in, 4,950 answered, 50 not, 1 empty" in done.stdout
    assert "5 x duplicate_custom_id: custom_id 'request-1' stands in an earlier line" in done.stdout
    assert "Traceback" not in done.stderr
    check_output(tmp_path, lines)
    print(done.stdout)


@pytest.mark.soak
def test_a_batch_in_a_bucket(tmp_path: Path, bucket: Storage) -> None:
    lines = write_input(tmp_path, 100, 10)
    (bucket / "in.jsonl").write_bytes((tmp_path / "in.jsonl").read_bytes())
    code = "from millrace.pipeline.cli import main; main()"
    files = [(bucket / name).url for name in ("in.jsonl", "out.jsonl")]
    where = ["--model", "bundled:invoices", "--endpoint-url", str(bucket.options.endpoint_url)]
    command = [sys.executable, "-c", code, "batch", *files, *where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert sorted(one.name for one in bucket.walk()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]
    for name in ("out.jsonl", "out.errors.jsonl"):
        (tmp_path / name).write_bytes((bucket / name).read_bytes())
    check_output(tmp_path, lines)


COMMAND = ["batch", "in.jsonl", "out.jsonl", "--model"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([*COMMAND, "facebook/opt-125m"], "is no local folder"),
        (["batch", "nowhere.jsonl", "out.jsonl", "--model", "bundled:invoices"], "'nowhere.jsonl' does not exist"),
        ([*COMMAND, "bundled:invoices", "--engine", "max_num_sqs=3"], "did you mean 'max_num_seqs'?"),
        ([*COMMAND, "bundled:invoices", "--engine", "eager"], "--engine takes KEY=VALUE"),
        ([*COMMAND, "bundled:invoices", "--tool-call-parser", "herms"], "did you mean 'hermes'?"),
        ([*COMMAND, "bundled:invoices", "--errors", "in.jsonl"], "input and errors are both"),
        ([*COMMAND, "bundled:invoices", "--errors", "there.jsonl"], "pass --overwrite to replace it"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    tmp_path: Path, args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("in.jsonl", "there.jsonl"):
        (tmp_path / name).write_bytes(line(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as caught:
        app(args)
    assert caught.value.code == 2
    (shown,) = capfd.readouterr().err.splitlines()
    assert said in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "there.jsonl"]

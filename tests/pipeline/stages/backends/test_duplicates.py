"""Identical requests run once, whoever asks, and each row is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_client import EchoClient

from millrace.engine import GenerateRequest, RequestOutput, SamplingParams
from millrace.engine.errors import EngineError
from millrace.pipeline import columns
from millrace.pipeline.stages.adapters import AdapterNames
from millrace.pipeline.stages.backends.duplicates import Duplicates, Inbox, request_key
from millrace.pipeline.stages.backends.generate import GenerateStage
from millrace.pipeline.stages.base import Row


def stage_of(client: Any, **changes: Any) -> GenerateStage:
    adapters = AdapterNames(("m",), {"a": "x", "b": "y"})
    settings = {"default_params": SamplingParams(temperature=0.0), "adapters": adapters}
    return GenerateStage(client, **{**settings, **changes})


def rows_of(*prompts: str, **params: Any) -> list[Row]:
    return [Row.read({"prompt": prompt, **({"sampling_params": params} if params else {})}) for prompt in prompts]


def texts(rows: list[Row]) -> list[str | None]:
    return [row.data.get(columns.GENERATED_TEXT) for row in rows]


def test_of_identical_rows_one_runs_and_each_has_a_result() -> None:
    client = EchoClient()
    stage = stage_of(client)
    rows = rows_of("a", "b", "a", "a")
    stage.run(rows)
    assert len(client.seen) == 2
    assert texts(rows) == ["A0", "B0", "A0", "A0"]
    assert [bool(row.data.get(columns.IS_DUPLICATE)) for row in rows] == [False, False, True, True]
    assert len({row.data[columns.REQUEST_ID] for row in rows}) == 4
    later = rows_of("a")
    stage.run(later)
    assert texts(later) == ["A0"]
    assert len(client.seen) == 2


@pytest.mark.parametrize("params", [{"max_tokens": 5}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}])
def test_other_parameters_are_another_request(params: dict[str, Any]) -> None:
    client = EchoClient()
    rows = [*rows_of("a", temperature=0.5, max_tokens=6), *rows_of("a", **params)]
    stage_of(client).run(rows)
    assert len(client.seen) == 2


def test_rows_that_draw_are_identical_too_since_their_seed_is() -> None:
    client = EchoClient()
    stage_of(client).run(rows_of("a", "a", temperature=0.9))
    assert len(client.seen) == 1


def test_every_row_runs_where_asked_for() -> None:
    client = EchoClient()
    stage_of(client, duplicates=False).run(rows_of("a", "a"))
    assert len(client.seen) == 2


@pytest.mark.parametrize("name", [columns.ROW_ID, columns.POSITION, None])
def test_equal_rows_that_each_run_have_draws_of_their_own_and_repeat_them(name: str | None) -> None:
    seeds = []
    for _ in range(2):
        client = EchoClient()
        rows = rows_of(*"a" * 8, temperature=1.5)
        for number, row in enumerate(rows):
            row.data |= {} if name is None else {name: bytes([number])}
        stage_of(client, duplicates=False).run(rows)
        seeds.append([request.sampling_params.seed for request in client.seen])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 8


def test_a_failure_is_that_of_all() -> None:
    rows = rows_of("fail", "fail")
    stage_of(EchoClient()).run(rows)
    assert [row.error.kind for row in rows if row.error] == ["NumericalError"] * 2


class HeldClient(EchoClient):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.let = threading.Event(), threading.Event()

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        self.asked.set()
        assert self.let.wait(60)
        yield from super().generate(requests)


@pytest.mark.parametrize("prompt", ["a", "dead"])
def test_a_block_waits_for_the_request_of_another_and_shares_its_end(prompt: str) -> None:
    client = HeldClient()
    stage = stage_of(client)
    first, second = rows_of(prompt), rows_of(prompt)
    errors: list[BaseException] = []

    def run(rows: list[Row]) -> None:
        try:
            stage.run(rows)
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[rows]) for rows in (first, second)]
    threads[0].start()
    assert client.asked.wait(60)
    threads[1].start()
    client.let.set()
    for thread in threads:
        thread.join(60)
    if prompt == "dead":
        assert len(errors) == 2
    else:
        assert texts(first) == texts(second) == ["A0"]
        assert len(client.seen) == 1


def test_finished_outputs_are_kept_while_there_is_room() -> None:
    duplicates, inbox = Duplicates(max_tokens_kept=250), Inbox()
    for key in (b"a", b"b", b"c"):
        assert duplicates.claim(key, inbox, key)
        (output,) = EchoClient().generate([GenerateRequest("0", "x", None, SamplingParams())])
        duplicates.finish(key, output)
    assert not duplicates.claim(b"c", inbox, "item")
    assert inbox.get().item == "item"
    assert duplicates.claim(b"a", inbox, "item")


def test_a_key_is_prompt_and_parameters() -> None:
    def key(prompt: str | None, ids: list[int] | None, params: str) -> bytes:
        return request_key(GenerateRequest("0", prompt, ids, SamplingParams()), params)

    keys = {key("a", None, "p"), key("b", None, "p"), key("a", None, "q"), key("a", [1], "p"), key(None, [2], "p")}
    assert len(keys) == 5
    assert key("a", [1], "p") == key(None, [1], "p")


def test_rows_with_equal_prompts_run_once_for_each_adapter() -> None:
    client = EchoClient()
    models = [None, "a", "b", "a", "m", "b"]
    rows = [Row.read({"prompt": "same", "model": model}) for model in models]
    stage_of(client).run(rows)
    assert [None if one.lora_request is None else one.lora_request.lora_name for one in client.seen] == [None, "a", "b"]
    assert [row.data.get("__is_duplicate", False) for row in rows] == [False, False, False, True, True, True]
    assert [row.data.get("__adapter") for row in rows] == [None, "a", "b", "a", None, "b"]

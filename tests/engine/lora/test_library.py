"""Adapters in the memory of the host: read beside the steps, dropped when they are unused, failed alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest

from adapters import make_adapter
from millrace.engine.errors import AdapterError, ConfigError
from millrace.engine.llm import LLM
from millrace.engine.lora.adapter import Adapter
from millrace.engine.lora.library import AdapterLibrary
from millrace.engine.lora.request import LoRARequest
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.sequence import Sequence

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class FakeReader:
    """Reads adapters when the test allows it.

    Attributes:
        names: Names of the adapters whose loads have begun, in order.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, request: LoRARequest) -> Adapter:
        self.names.append(request.lora_name)
        assert self.may_end.wait(10)
        if request.lora_name.startswith("bad"):
            raise AdapterError(f"the adapter {request.lora_name!r} is damaged")
        return Adapter(request.lora_name, request.lora_name.encode().ljust(16), {}, 0)


def make_sequence(name: str) -> Sequence:
    made = {"num_prompt_tokens": 1, "max_tokens_total": 3, "stop_token_ids": {}, "arrival": int(name)}
    return Sequence(name, 0, GREEDY, 0, [1], **made)  # type: ignore[arg-type]


def ask(number: int, name: str | None = None) -> LoRARequest:
    return LoRARequest(name or f"tune-{number}", number, f"/adapters/{number}")


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


@pytest.fixture
def library(reader: FakeReader):
    library = AdapterLibrary(reader, max_adapters=2)
    yield library
    reader.may_end.set()
    library.close()


def end_loads() -> None:
    """Waits for the loads that are going on, so that it does not matter which of them ends first."""
    for thread in threading.enumerate():
        if thread.name == "adapters":
            thread.join(10)


def settle(library: AdapterLibrary) -> tuple[list[Any], list[Any]]:
    """Waits for all loads for which there is room."""
    ready, failed = library.take_ready()
    while library.is_loading:
        library.wait()
        end_loads()
        more, worse = library.take_ready()
        ready, failed = ready + more, failed + worse
    return ready, failed


def test_a_sequence_waits_until_its_adapter_is_read_and_then_has_a_salt_of_its_own(library, reader) -> None:
    reader.may_end.clear()
    sequences = [make_sequence(str(i)) for i in range(2)]
    for sequence, number in zip(sequences, (1, 2), strict=True):
        library.ask(ask(number), sequence)
    assert library.take_ready() == ([], []) and library.num_waiting == 2
    reader.may_end.set()
    assert settle(library) == (sequences, [])
    assert library.num_waiting == 0 and sequences[0].cache_salt != sequences[1].cache_salt
    assert library.ids() == {1, 2} and library.num_loads == 2


def test_an_adapter_of_unfinished_sequences_stays_and_the_one_unused_for_longest_goes(library, reader) -> None:
    first, second, third = (make_sequence(str(i)) for i in range(3))
    library.ask(ask(1), first)
    library.ask(ask(2), second)
    settle(library)
    library.ask(ask(3), third)
    assert settle(library) == ([], []) and library.ids() == {1, 2}
    library.leave(second)
    assert settle(library) == ([third], []) and library.ids() == {1, 3}
    assert sorted(reader.names[:2]) == ["tune-1", "tune-2"] and reader.names[2:] == ["tune-3"]


def test_a_failed_load_fails_its_sequences_alone_and_is_tried_again(library, reader) -> None:
    good, bad, again = (make_sequence(str(i)) for i in range(3))
    library.ask(ask(1, "bad"), bad)
    library.ask(ask(2), good)
    assert settle(library) == ([good], [bad])
    assert bad.is_finished and bad.error is not None and bad.error.kind == "AdapterError"
    library.ask(ask(1, "bad"), again)
    assert settle(library) == ([], [again]) and sorted(reader.names) == ["bad", "bad", "tune-2"]


def test_an_adapter_that_cannot_be_reached_holds_up_no_other(reader) -> None:
    def read(request: LoRARequest) -> Adapter:
        if request.lora_name == "far":
            assert reader.may_end.wait(10)
        return Adapter(request.lora_name, request.lora_name.encode().ljust(16), {}, 0)

    reader.may_end.clear()
    library = AdapterLibrary(read, max_adapters=3)
    far, near = make_sequence("0"), make_sequence("1")
    library.ask(ask(1, "far"), far)
    library.ask(ask(2), near)
    ready, failed = library.take_ready()
    while not ready:
        library.wait()
        ready, failed = library.take_ready()
    assert (ready, failed) == ([near], []) and library.num_waiting == 1
    reader.may_end.set()
    assert settle(library) == ([far], [])
    library.close()


def test_loads_start_and_adapters_are_handed_out_in_the_order_of_the_first_sequences(library, reader) -> None:
    """The adapters take the places of one that is in use; one of them is asked for again and again."""
    library.ask(ask(1), first := make_sequence("0"))
    library.ask(ask(2), second := make_sequence("1"))
    assert settle(library) == ([first, second], [])
    sequences = [make_sequence(str(2 + i)) for i in range(5)]
    for sequence, number in zip(sequences, (3, 4, 5, 3, 3), strict=True):
        library.ask(ask(number), sequence)
        assert settle(library) == ([], [])
    library.leave(first)
    assert settle(library) == ([sequences[0], sequences[3], sequences[4]], []) and reader.names[2:] == ["tune-3"]
    library.ask(ask(6), make_sequence("7"))
    for user in sequences[0], sequences[3], sequences[4], second:
        library.leave(user)
    assert settle(library) == (sequences[1:3], []) and set(reader.names[3:]) == {"tune-4", "tune-5"}
    for sequence, number in ((late := make_sequence("9"), 4), (early := make_sequence("8"), 5)):
        library.ask(ask(number), sequence)
    assert settle(library) == ([early, late], [])


def test_an_adapter_that_nobody_needs_goes_with_its_name_and_its_number(library, reader) -> None:
    for number in range(1, 6):
        library.ask(ask(number), sequence := make_sequence(str(number)))
        settle(library)
        library.leave(sequence)
    assert library.ids() == {4, 5}
    library.ask(ask(4), used := make_sequence("6"))
    settle(library)
    library.leave(used)
    reader.may_end.clear()
    library.ask(ask(1, "new"), waiting := make_sequence("7"))
    library.take_ready()
    assert library.ids() == {4}, "the adapter that was unused for the longest time has gone"
    library.ask(ask(2, "never read"), queued := make_sequence("8"))
    with pytest.raises(ConfigError, match="lora_int_id=2 is the number of the adapter 'never read'"):
        library.check(ask(2, "other"))
    assert library.leave(queued) and library.leave(waiting) and not library.leave(waiting)
    library.check(ask(2, "other"))
    with pytest.raises(ConfigError, match="lora_int_id=1 is the number of the adapter 'new'"):
        library.check(ask(1, "other"))


def test_closing_waits_for_no_load(reader) -> None:
    ended = threading.Event()

    def read(request: LoRARequest) -> Adapter:
        reader.may_end.wait(5)
        ended.set()
        return Adapter(request.lora_name, b"", {}, 0)

    reader.may_end.clear()
    library = AdapterLibrary(read, max_adapters=9)
    for number in range(1, 8):
        library.ask(ask(number), make_sequence(str(number)))
    library.take_ready()
    loads = [thread for thread in threading.enumerate() if thread.name == "adapters"]
    assert loads and all(thread.daemon for thread in loads), "the end of the interpreter would wait for a load"
    library.close()
    assert not ended.is_set() and not library.is_loading
    reader.may_end.set()


def test_an_error_that_no_reader_should_raise_names_the_adapter(library, monkeypatch) -> None:
    monkeypatch.setattr(library, "_read", lambda request: 1 / 0)
    library.ask(ask(1), make_sequence("0"))
    _, (failed,) = settle(library)
    assert "'tune-1' cannot be read: ZeroDivisionError" in failed.error.message
    with pytest.raises(AdapterError, match="'tune-1' cannot be read: ZeroDivisionError"):
        library.add(ask(1))


def test_a_number_or_a_name_stands_for_one_adapter(library) -> None:
    library.add(ask(1))
    with pytest.raises(ConfigError, match="lora_int_id=1 is the number of the adapter 'tune-1'"):
        library.check(ask(1, "other"))
    with pytest.raises(ConfigError, match=r"was read from '/adapters/1'.*load_inplace=True"):
        library.check(LoRARequest("tune-1", 1, "/elsewhere"))
    with pytest.raises(ConfigError, match=r"'tune-1' has lora_int_id=1, and a request names it with lora_int_id=2"):
        library.check(LoRARequest("tune-1", 2, "/adapters/1", load_inplace=True))
    library.add(LoRARequest("tune-1", 1, "/elsewhere", load_inplace=True))
    assert library.ids() == {1} and library.num_loads == 2


def test_pinned_adapters_stay_and_removed_ones_go(library) -> None:
    library.add(ask(1))
    library.add(ask(2))
    assert library.pin(1) and library.pin(2)
    with pytest.raises(ConfigError, match=r"no room for the adapter 'tune-3'.*max_cpu_loras"):
        library.add(ask(3))
    assert library.remove(2) and not library.remove(2)
    assert library.add(ask(3)) and not library.add(ask(3)) and library.ids() == {1, 3}
    with pytest.raises(ConfigError, match="lora_int_id=9"):
        library.pin(9)


def test_load_inplace_reads_an_adapter_again_once_for_all_sequences_that_wait(library, reader) -> None:
    again = LoRARequest("tune-1", 1, "/adapters/1", load_inplace=True)
    library.add(ask(1))
    assert library.pin(1) and library.add(again) and library.add(again)
    assert reader.names == ["tune-1"] * 3
    sequences = [make_sequence(str(i)) for i in range(3)]
    for sequence in sequences:
        library.ask(again, sequence)
    with pytest.raises(ConfigError, match="requests wait for the adapter 'tune-1' from '/adapters/1'"):
        library.ask(LoRARequest("tune-1", 1, "/elsewhere", load_inplace=True), make_sequence("3"))
    assert settle(library) == (sequences, []) and reader.names == ["tune-1"] * 4
    with pytest.raises(ConfigError, match="unfinished requests"):
        library.remove(1)


def test_an_adapter_for_which_pinned_ones_leave_no_room_fails_its_sequences(library) -> None:
    for number in (1, 2):
        library.add(ask(number))
        library.pin(number)
    library.ask(ask(3), sequence := make_sequence("0"))
    assert settle(library) == ([], [sequence])
    assert sequence.error is not None and "no room for the adapter 'tune-3'" in sequence.error.message
    library.ask(LoRARequest("tune-1", 1, "/adapters/1", load_inplace=True), again := make_sequence("1"))
    assert settle(library) == ([again], []) and library.ids() == {1, 2}


@pytest.mark.parametrize("name", ["tune", "bad"])
def test_a_load_whose_sequences_have_left_keeps_neither_room_nor_a_name_after_its_end(reader, name) -> None:
    library, sequence = AdapterLibrary(reader, max_adapters=1), make_sequence("1")
    reader.may_end.clear()
    library.ask(ask(1, name), sequence)
    library.take_ready()
    library.reset()  # As after an interrupt: no step comes that would notice the end of the load.
    with pytest.raises(ConfigError, match="in use, pinned or being read"):
        library.add(ask(2))
    reader.may_end.set()
    end_loads()
    assert library.add(ask(2)) and library.ids() == {2}
    library.check(ask(3, name))


def test_an_adapter_in_use_is_not_removed(library) -> None:
    first, second = make_sequence("0"), make_sequence("1")
    for sequence in (first, second):
        library.ask(ask(1), sequence)
        settle(library)
    for sequence in (first, second):
        with pytest.raises(ConfigError, match="unfinished requests use the adapter 'tune-1'"):
            library.remove(1)
        assert not library.leave(sequence) and not library.leave(sequence)
    assert library.remove(1)


def test_a_reset_ends_all_sequences_and_keeps_the_adapters(library, reader) -> None:
    library.ask(ask(1), make_sequence("0"))
    settle(library)
    reader.may_end.clear()
    for number in (1, 2, 3):
        library.ask(ask(number), make_sequence(str(number)))
    library.take_ready()
    library.reset()
    reader.may_end.set()
    assert library.num_waiting == 0 and settle(library) == ([], []) and library.ids() == {1, 2}
    assert library.remove(1) and library.remove(2) and not library.remove(3)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def requests(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    made = tmp_path_factory.mktemp("adapters")
    ranks = [1 + index % 8 for index in range(64)]
    paths = [make_adapter(made / str(i), folder, rank=rank, seed=i) for i, rank in enumerate(ranks)]
    return [LoRARequest(f"tune-{i}", i + 1, str(path)) for i, path in enumerate(paths)]


def test_64_adapters_in_4_slots_are_all_right_and_few_are_read_twice(folder: Path, requests: list[LoRARequest]) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "enable_lora": True, "block_size": 4, "max_num_seqs": 24}
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13] for _ in range(256)]  # One prompt, so that a shared block would show.
    asked = [requests[index % 64] for index in range(256)]
    random.Random(0).shuffle(asked)
    with LLM(str(folder), max_loras=4, **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=asked)
        llm.llm_engine.check_integrity()
        stats = llm.stats()
    assert 64 <= stats.num_adapter_loads <= 80 and 64 <= stats.num_adapter_uploads <= 96
    with LLM(str(folder), max_loras=1, enable_prefix_caching=False, **settings) as alone:
        wanted = {
            request.lora_name: alone.generate(prompts[0], GREEDY, use_tqdm=False, lora_request=request)[0]
            for request in requests
        }
    for output, request in zip(outputs, asked, strict=True):
        assert output.outputs[0].token_ids == wanted[request.lora_name].outputs[0].token_ids
    assert len({tuple(one.outputs[0].token_ids) for one in wanted.values()}) > 40


def test_the_same_prompt_under_adapters_in_turn_shares_no_block_but_with_itself(folder, requests) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "enable_lora": True, "block_size": 4, "max_loras": 2}
    prompt = list(range(5, 30))
    with LLM(str(folder), **settings) as llm:
        for request in (None, requests[0], requests[1], requests[2]):
            (output,) = llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=request)
            assert output.num_cached_tokens == 0
        for request in (requests[1], None, requests[0]):
            (output,) = llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=request)
            assert output.num_cached_tokens == 24


def test_steps_go_on_and_end_while_an_adapter_is_read(folder, requests, monkeypatch) -> None:
    with LLM(str(folder), dtype="float32", enable_lora=True) as llm:
        engine = llm.llm_engine
        assert engine.adapters is not None
        read, may_end = engine.adapters._read, threading.Event()
        monkeypatch.setattr(engine.adapters, "_read", lambda request: may_end.wait(20) and read(request))
        engine.add_request(GenerateRequest("slow", None, [5, 6, 7], GREEDY, lora_request=requests[0]))
        assert [engine.step() for _ in range(3)] == [[]] * 3, "a step with nothing to run ends before the load does"
        engine.add_request(GenerateRequest("plain", None, [5, 6, 7], GREEDY))
        ended: list[str] = []
        while not ended:
            ended = [output.request_id for output in engine.step()]
        assert ended == ["plain"] and engine.stats().num_waiting == 1 and not may_end.is_set()
        may_end.set()
        while engine.has_unfinished_requests():
            ended += [output.request_id for output in engine.step()]
        assert ended == ["plain", "slow"]


def test_sequences_that_waited_for_adapters_keep_their_places(folder, requests, monkeypatch) -> None:
    with LLM(str(folder), dtype="float32", enable_lora=True, max_loras=2, max_num_seqs=1) as llm:
        engine = llm.llm_engine
        assert engine.adapters is not None
        read, may_end = engine.adapters._read, threading.Event()
        monkeypatch.setattr(engine.adapters, "_read", lambda request: may_end.wait(20) and read(request))
        for name, adapter in enumerate((None, 0, 1, 0, None)):
            request = None if adapter is None else requests[adapter]
            engine.add_request(GenerateRequest(str(name), None, [5, 6, 7], GREEDY, lora_request=request))
        ended = [output.request_id for output in engine.step()]
        may_end.set()
        futures.wait([entry.loading for entry in engine.adapters._loading.values() if entry.loading is not None])
        while engine.has_unfinished_requests():
            ended += [output.request_id for output in engine.step()]
        assert ended == ["0", "1", "2", "3", "4"]


def test_requests_that_wait_for_an_adapter_can_be_aborted(folder, requests, monkeypatch) -> None:
    with LLM(str(folder), dtype="float32", enable_lora=True) as llm:
        engine = llm.llm_engine
        monkeypatch.setattr(engine.adapters, "_read", lambda request: time.sleep(0.2))
        engine.add_request(GenerateRequest("slow", None, [5, 6, 7], GREEDY, lora_request=requests[0]))
        engine.step()
        engine.abort(["slow"])
        assert not engine.has_unfinished_requests() and engine.stats().num_waiting == 0
        engine.check_integrity()

"""One output has one writer: who holds it, who is refused, who goes on, and who finds out that it was followed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from millrace import ConfigError, MillraceError
from millrace.engine.errors import OutputInUseError
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.ledger import claim
from millrace.pipeline.ledger.claim import Claim
from s3 import CREDENTIALS, S3Server

HOLD = (
    "from millrace.pipeline.ledger.claim import *; import sys, time\n"
    "with Claim.held(Storage.at(sys.argv[1]), 'out'): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The folder of claims of an output, here or in a bucket."""
    if request.param == "local":
        return Storage.at(tmp_path / "writers")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server: S3Server = request.getfixturevalue("s3")
    return Storage.at(f"s3://{server.make_bucket()}/writers", server.url)


def left_by_another_machine(folder: Storage, age_s: float) -> None:
    about = {"host": "far", "machine": "far", "pid": 1, "process_start": "1", "since": "then", "token": "t"}
    (folder / "000001.json").write_bytes(json.dumps(about).encode())
    (folder / "000001.beat").write_bytes(str(time.time() - age_s).encode())


def test_a_second_writer_is_refused_with_who_holds_the_output_since_when_and_what_to_do(folder: Storage) -> None:
    with (
        Claim.held(folder, "out") as held,
        pytest.raises(
            ConfigError, match=f"process {os.getpid()} on .*, since {re.escape(held.holder.since)}.*--take-over"
        ),
        Claim.held(folder, "out"),
    ):
        pass
    assert not folder.list()
    with Claim.held(folder, "out") as again:
        again.check()


def test_the_claim_is_given_back_when_the_run_fails(folder: Storage) -> None:
    with pytest.raises(RuntimeError), Claim.held(folder, "out"):
        raise RuntimeError
    with Claim.held(folder, "out"):
        pass


def test_of_writers_at_the_same_moment_one_gets_the_output(folder: Storage) -> None:
    together, over = threading.Barrier(6), threading.Event()

    def try_to_write(_: int) -> bool:
        together.wait()
        try:
            with Claim.held(folder, "out") as held:
                held.check()
                over.wait()
                return True
        except OutputInUseError:
            refused.append(1)
            if len(refused) == 5:
                over.set()
            return False

    refused: list[int] = []
    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(try_to_write, range(6))) == 1


def test_a_writer_that_was_taken_over_finds_out_and_leaves_the_claim_of_its_follower(folder: Storage) -> None:
    with Claim.held(folder, "out") as first, Claim.held(folder, "out", take_over=True) as second:
        with pytest.raises(
            OutputInUseError, match=f"another run .*since {re.escape(second.holder.since)}.* has taken over"
        ):
            first.check()
        first._release()
        second.check()


def test_a_writer_finds_out_although_its_follower_has_finished_and_a_third_began(folder: Storage) -> None:
    with Claim.held(folder, "out") as first:
        with Claim.held(folder, "out", take_over=True):
            pass
        with pytest.raises(OutputInUseError):
            first.check()
        with Claim.held(folder, "out") as third:
            assert third.number == first.number
            with pytest.raises(OutputInUseError):
                first.check()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_the_claim_of_a_killed_process_is_void_at_once(tmp_path: Path, is_reaped: bool) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLD, str(tmp_path / "writers")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(OutputInUseError), Claim.held(Storage.at(tmp_path / "writers"), "out"):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if is_reaped:
        process.wait()
    with Claim.held(Storage.at(tmp_path / "writers"), "out") as held:
        assert held.number == 2
    process.communicate()


def test_the_number_of_a_dead_process_may_belong_to_another_one_now(tmp_path: Path) -> None:
    folder = Storage.at(tmp_path)
    about = {**claim.asdict(claim.Holder.this_process()), "process_start": "1"}
    (folder / "000001.json").write_bytes(json.dumps(about).encode())
    with Claim.held(folder, "out") as held:
        assert held.number == 2


def test_a_writer_on_another_machine_is_gone_when_its_claim_is_old_and_stays_so(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claim, "WATCH_S", 0.1)
    monkeypatch.setattr(claim, "WATCH_STEP_S", 0.05)
    left_by_another_machine(folder, age_s=5.0)
    with pytest.raises(OutputInUseError, match="process 1 on far, since then"), Claim.held(folder, "out"):
        pass
    left_by_another_machine(folder, age_s=3600.0)
    with Claim.held(folder, "out"):
        assert "no longer renews" in caplog.text


def test_an_old_claim_that_is_renewed_is_held_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Storage.at(tmp_path)
    left_by_another_machine(folder, age_s=3600.0)
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: left_by_another_machine(folder, age_s=3500.0))
    with pytest.raises(OutputInUseError), Claim.held(folder, "out"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b'{"host": "\xff'])
def test_a_damaged_claim_is_one_of_an_unknown_process(tmp_path: Path, content: bytes) -> None:
    folder = Storage.at(tmp_path)
    (folder / "000001.json").write_bytes(content)
    (folder / "000001.beat").write_bytes(str(time.time()).encode())
    with pytest.raises(MillraceError, match="unknown host"), Claim.held(folder, "out"):
        pass
    with Claim.held(folder, "out", take_over=True):
        pass


def test_a_claim_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    beats: list[Any] = []
    renewed = threading.Event()

    def beat_file(folder: Storage, number: int) -> Storage:
        beats.append(number)
        if len(beats) > 3:
            renewed.set()
        return folder / f"{number:06}.beat"

    monkeypatch.setattr(claim, "_beat_file", beat_file)
    with Claim.held(Storage.at(tmp_path), "out"):
        assert renewed.wait(60)


def test_a_claim_with_any_content_is_refused_or_one_of_an_unknown_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "WATCH_S", 0.0)
    about = {"host": "far", "machine": "far", "pid": 1, "process_start": "1", "since": "then", "token": "t"}
    odd = [5, [], {}, about | {"pid": "\0"}, about | {"host": "\x1b[2J"}, about | {"since": "x" * 999}, "[" * 200_000]
    for content in odd:
        (tmp_path / "000001.json").write_text(content if isinstance(content, str) else json.dumps(content))
        assert str(claim.Holder.read(Storage.at(tmp_path / "000001.json"))).startswith("process 0 on an unknown host")
    with Claim.held(Storage.at(tmp_path), "out"):
        pass


def test_a_claim_that_is_no_file_is_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH_S", 0.0)
    os.mkfifo(tmp_path / "000001.json")
    os.mkfifo(tmp_path / "000001.beat")
    (tmp_path / "000002.json").mkdir()
    (tmp_path / f"{'9' * 250}.json").touch()
    with Claim.held(Storage.at(tmp_path), "out") as held:
        assert held.number == 3
    (tmp_path / "000001.beat").mkdir()
    with pytest.raises(MillraceError, match="is a folder"), Claim.held(Storage.at(tmp_path), "out"):
        pass


@pytest.mark.parametrize("beat", ["nan", "NaN", "Infinity", "1e999", "9" * 400, str(time.time() + 9e9), "[]"])
def test_the_claim_of_another_machine_grows_old_whatever_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beat: str
) -> None:
    monkeypatch.setattr(claim, "WATCH_S", 0.0)
    left_by_another_machine(Storage.at(tmp_path), 0)
    (tmp_path / "000001.beat").write_text(beat)
    with Claim.held(Storage.at(tmp_path), "out") as held:
        assert held.number == 2


def test_only_files_of_claims_are_removed_at_the_end_however_large_their_number(tmp_path: Path) -> None:
    (tmp_path / "000000001.txt").touch()
    (tmp_path / "900000000.json").touch()
    with Claim.held(Storage.at(tmp_path), "out", take_over=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["000000001.txt"]


@pytest.mark.parametrize("name", ["link", "loop", "file", "x" * 300])
def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    folder = Storage.at(tmp_path / name) / "_millrace" / "writers"
    with pytest.raises(ConfigError, match="output 'out' cannot be written"), Claim.held(folder, "out"):
        pass

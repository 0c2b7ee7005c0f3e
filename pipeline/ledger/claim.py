"""`Claim`: the right of one process to write an output, which no two processes hold at once.

Claims are numbered files in a folder of the output, and each is made by an exclusive create, so that of several
processes one makes a number. The newest claim counts. A process that takes an output over makes the next number and
leaves the older file as it is. So no process overwrites the claim of another one, and a process that was taken for
dead sees that it has been followed (`Claim.check`) before it publishes.

    000001.json          host, process, start, random token
    000001.beat          the time at which the process last renewed the claim

The claim of a process that has ended is void at once on the machine of that process. Elsewhere it is void when it has
not been renewed for `STALE_S`. Clocks of machines differ, so such a claim is also watched for `WATCH_S` first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ...engine.errors import ConfigError, DamagedOutputError, MillraceError, OutputInUseError
from ..files.storage import Storage

logger = logging.getLogger(__name__)

BEAT_S = 10.0
"""Seconds after which a process renews its claim."""
STALE_S = 60.0
"""Seconds without a renewal after which the claim of another machine's process may be void."""
WATCH_S = 30.0
"""Seconds for which such a claim is watched before it is void."""
WATCH_STEP_S = 0.5

MAX_CHARS = 300
"""Longest text in a claim that is shown."""
FILE_NAME = re.compile(r"([0-9]{6,9})\.(json|beat)")


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a claim.

    Attributes:
        host: Name of its machine, for people.
        machine: Text that tells apart machines, boots of a machine and containers with process numbers of their own.
        pid: Number of the process.
        process_start: Time at which the process started, as its system counts; empty where that is not known.
        since: Time of the claim, for people.
        token: Random text that no other claim has.
    """

    host: str
    machine: str
    pid: int
    process_start: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        """Returns the description of this process with a new token."""
        pid, since = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(platform.node(), _machine(), pid, _process_start(pid) or "", since, uuid.uuid4().hex)

    @classmethod
    def read(cls, file: Storage) -> Holder:
        """Reads a claim. A claim that is damaged is held by an unknown process."""
        try:
            holder = cls(**file.read_json())
        except (ValueError, TypeError):
            return UNKNOWN
        texts = (holder.host, holder.machine, holder.process_start, holder.since, holder.token)
        is_plain = all(isinstance(text, str) and text.isprintable() and len(text) <= MAX_CHARS for text in texts)
        return holder if is_plain and isinstance(holder.pid, int) and 0 <= holder.pid < 2**31 else UNKNOWN

    @property
    def has_ended(self) -> bool | None:
        """Whether the process has ended; None if it is one of another machine, so that this is not known."""
        if self.machine != _machine():
            return None
        start = _process_start(self.pid)
        return start is None or start != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


UNKNOWN = Holder("an unknown host", "", 0, "", "an unknown time", "")


@dataclass
class Claim:
    """The claim of this process on an output.

    Attributes:
        folder: Folder of the claims.
        output: Name of the output in messages.
        number: Number of the claim.
        holder: This process.
    """

    folder: Storage
    output: str
    number: int
    holder: Holder
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    @contextlib.contextmanager
    def held(cls, folder: Storage, output: str, take_over: bool = False) -> Iterator[Claim]:
        """Holds the claim on an output for the time of a block, and renews it from another thread.

        Args:
            folder: Folder of the claims.
            output: Name of the output in messages.
            take_over: Whether to take the output over from a process that holds it.

        Raises:
            OutputInUseError: Another process holds the claim.
        """
        claim = cls._take(folder, output, take_over)
        threading.Thread(target=claim._renew_on, name="millrace-claim", daemon=True).start()
        try:
            yield claim
        finally:
            claim._release()

    def check(self) -> None:
        """Checks that no other process has taken the output over.

        Raises:
            OutputInUseError: Another process has.
        """
        newest = _newest(self.folder)
        if newest == self.number and _read(self.folder, newest) == self.holder:
            return
        follower = None if newest is None else _read(self.folder, newest)
        by = "another run" if follower in (None, self.holder) else f"another run ({follower})"
        raise OutputInUseError(
            f"{by} has taken over output {self.output!r}, and this run has stopped; the rows it finished are kept"
        )

    @classmethod
    def _take(cls, folder: Storage, output: str, take_over: bool) -> Claim:
        try:
            return cls._create(folder, output, take_over)
        except MillraceError:
            raise
        except OSError as error:
            raise ConfigError(f"output {output!r} cannot be written: {error!s:.300}; pass another folder") from error

    @classmethod
    def _create(cls, folder: Storage, output: str, take_over: bool) -> Claim:
        holder = Holder.this_process()
        content = json.dumps(asdict(holder)).encode()
        while True:
            newest = _newest(folder)
            if newest is not None and not take_over:
                refuse_if_held(folder, output)
            number = (newest or 0) + 1
            with contextlib.suppress(FileNotFoundError):  # The last holder has just removed the empty folder.
                beat = _beat_file(folder, number)
                if beat.is_dir():  # No process writes a folder, and none could renew the claim.
                    raise DamagedOutputError(f"{beat.url!r} is a folder, and no run has made it; remove it")
                beat.write_bytes(str(time.time()).encode())
                if (folder / _file_name(number)).create(content):
                    return cls(folder, output, number, holder)

    def _renew_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self.check()
                _beat_file(self.folder, self.number).write_bytes(str(time.time()).encode())
            except OutputInUseError:
                return
            except (OSError, MillraceError) as error:
                logger.debug("the claim on %s cannot be renewed: %s", self.output, error)

    def _release(self) -> None:
        """Removes all claims, the own one last, unless another process has taken the output over."""
        self._ended.set()
        try:
            self.check()
            for number in sorted(_numbers(self.folder, "beat", "json")):
                if number <= self.number:
                    _beat_file(self.folder, number).remove()
                    (self.folder / _file_name(number)).remove()
            if self.folder.is_local:
                Path(self.folder.url).rmdir()
        except OutputInUseError:
            pass
        except (OSError, MillraceError) as error:
            logger.debug("the claim on %s cannot be given back: %s", self.output, error)


def refuse_if_held(folder: Storage, output: str, watch: bool = True) -> None:
    """Raises an error if another process holds the claim on an output.

    Args:
        folder: Folder of the claims.
        output: Name of the output in messages.
        watch: Whether to watch a claim that seems void. Without it, only a claim that is surely held is refused.

    Raises:
        OutputInUseError: A process holds the claim. The message names it.
    """
    newest = _newest(folder)
    holder = None if newest is None else _read(folder, newest)
    if newest is None or holder is None or holder.has_ended:
        return
    beat = _beat_file(folder, newest)
    if holder.has_ended is None and not watch and _is_old(beat):
        return
    if holder.has_ended is None and _has_stopped(beat):
        logger.warning("%s no longer renews its claim on %s: this run goes on with the output", holder, output)
        return
    raise OutputInUseError(
        f"another run writes to output {output!r}: {holder}. Wait for it or stop it; if it is gone, pass --take-over "
        "(in Python take_over=True), or name another output"
    )


def _has_stopped(beat: Storage) -> bool:
    """Returns whether a claim is no longer renewed: its time is old, and does not change while it is watched."""
    if not _is_old(beat):
        return False
    last = _time_of(beat)
    until_s = time.monotonic() + WATCH_S
    while time.monotonic() < until_s:
        time.sleep(WATCH_STEP_S)
        if _time_of(beat) != last:
            return False
    return True


def _is_old(beat: Storage) -> bool:
    """Returns whether the time of a claim is long ago, or further ahead than the clocks of two machines can differ."""
    return abs(time.time() - _time_of(beat)) >= STALE_S


def _time_of(beat: Storage) -> float:
    try:
        time_s = float(beat.read_json())
    except (FileNotFoundError, ValueError, TypeError, OverflowError):
        return 0.0
    return time_s if math.isfinite(time_s) else 0.0


def _newest(folder: Storage) -> int | None:
    return max(_numbers(folder, "json"), default=None)


def _numbers(folder: Storage, *suffixes: str) -> set[int]:
    """Returns the numbers of the claims in a folder that have a file with one of the suffixes."""
    found = [FILE_NAME.fullmatch(one.name) for one in folder.list()]
    return {int(one[1]) for one in found if one is not None and one[2] in suffixes}


def _read(folder: Storage, number: int) -> Holder | None:
    try:
        return Holder.read(folder / _file_name(number))
    except FileNotFoundError:
        return None


def _file_name(number: int) -> str:
    return f"{number:06}.json"


def _beat_file(folder: Storage, number: int) -> Storage:
    return folder / f"{number:06}.beat"


def _machine() -> str:
    """Returns a text for this machine since its boot and this container; where Linux does not say, for the machine."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def _process_start(pid: int) -> str | None:
    """Returns the start of a process, empty where the system does not tell it; None if no such process runs."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""

"""`AdapterLibrary`: the adapters in the memory of the host, read beside the steps of the engine.

A request names its adapter. If the library does not have the adapter, the sequences of the request wait here, outside
the scheduler, and others run. A few threads read the adapters, in the order of their first waiting sequences, so that
one that is slow or cannot be reached holds up no others. When the library is full, it forgets the adapter that was
unused for the longest time; an adapter of unfinished sequences stays.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from threading import Thread

from ..errors import AdapterError, ConfigError, RequestError, UserError, quote
from ..sequence import Sequence
from .adapter import Adapter
from .request import LoRARequest

__all__ = ["AdapterLibrary"]

NUM_THREADS = 4
"""Most adapters that are read at once for sequences; `add` reads one more."""

MAX_WAIT_S = 0.05
"""Longest time that `wait` takes. A step that has nothing to run but waits for loads must end soon: between two steps
new requests are taken in, and a watchdog takes a step that does not end for a stuck one."""


@dataclass(slots=True, eq=False)
class Entry:
    """An adapter that is in memory, or that a sequence waits for.

    Attributes:
        request: The request that names it.
        loading: The load that is going on; None before it begins and after its end was noticed.
        adapter: The adapter, once it was read.
        waiting: Sequences that wait for the adapter, in the order in which they asked; the values mean nothing.
        num_users: Number of unfinished sequences that have the adapter.
    """

    request: LoRARequest
    loading: Future[Adapter] | None = None
    adapter: Adapter | None = None
    waiting: dict[Sequence, None] = field(default_factory=dict)
    num_users: int = 0

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.request.lora_name


class AdapterLibrary:
    """Holds the adapters in the memory of the host, and reads the missing ones on threads of its own.

    Args:
        read: Reads an adapter; called on a thread of the library, on several at once.
        max_adapters: Most adapters in memory at once (`max_cpu_loras`).

    Attributes:
        num_loads: Number of adapters that were read so far.
    """

    def __init__(self, read: Callable[[LoRARequest], Adapter], max_adapters: int) -> None:
        self.num_loads = 0
        self._read = read
        self._max_adapters = max_adapters
        # The entries by the name of the adapter. Each is queued, is loading, or has its adapter.
        self._entries: dict[str, Entry] = {}
        self._pinned: set[str] = set()
        self.reset()

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait for their adapters."""
        return len(self._waiting)

    @property
    def is_loading(self) -> bool:
        """Whether a load is going on, or has ended and was not noticed yet."""
        return bool(self._loading)

    def check(self, request: LoRARequest) -> None:
        """Checks that a request agrees with the requests of the adapters that are in memory or waited for.

        Raises:
            ConfigError: The number of the request names another adapter, or its name another number or folder.
        """
        self._notice_abandoned()
        if (known := self._entries.get(request.lora_name)) is not None:
            _check_same(known, request)
        owner = self._names.get(request.lora_int_id, request.lora_name)
        if owner != request.lora_name:
            raise ConfigError(
                f"lora_int_id={request.lora_int_id} is the number of the adapter {quote(owner)}; give "
                f"{quote(request.lora_name)} another one"
            )

    def ask(self, request: LoRARequest, sequence: Sequence) -> None:
        """Makes a sequence wait for its adapter; `take_ready` returns the sequence when the adapter is there.

        Raises:
            ConfigError: As in `check`.
        """
        entry = self._entry(request)
        if not entry.waiting and entry.adapter is not None:
            self._ready[entry.name] = entry
            self._idle.pop(entry.name, None)
        elif not entry.waiting and entry.loading is None:
            self._queued[entry.name] = entry
        entry.waiting[sequence] = None
        self._waiting[sequence] = entry

    def leave(self, sequence: Sequence) -> bool:
        """Notes that a sequence needs its adapter no longer; does nothing for one that has none, or has left before.

        Returns:
            Whether the sequence was still waiting for its adapter, so that `take_ready` never returned it.
        """
        if (used := self._users.pop(sequence, None)) is not None:
            used.num_users -= 1
            self._rest(used)
        if (entry := self._waiting.pop(sequence, None)) is None:
            return False
        del entry.waiting[sequence]
        if not entry.waiting:
            self._ready.pop(entry.name, None)
            self._rest(entry)
            if entry.name in self._queued:
                self._forget(entry)
        return True

    def add(self, request: LoRARequest) -> bool:
        """Reads an adapter before a sequence asks for it, and waits until it is read.

        Returns:
            Whether the adapter was read; False if it was in memory.

        Raises:
            AdapterError: The adapter cannot be used.
            ConfigError: As in `check`; or there is no room, because all adapters in memory are in use or pinned.
        """
        entry = self._entry(request)
        if entry.adapter is not None:
            self._rest(entry)
            return False
        if entry.loading is None:
            self._queued.setdefault(entry.name, entry)
            if not self._make_room():
                if not entry.waiting:
                    self._forget(entry)
                raise self._no_room(entry)
            self._start_load(entry)
        assert entry.loading is not None
        wait([entry.loading])
        if (error := _error_of(entry)) is not None:
            if not entry.waiting:
                self._forget(entry)
            raise error
        self._finish_load(entry)
        return True

    def take_ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Notices the loads that have ended, and starts those for which there is room.

        Returns:
            The sequences that got their adapters, and the sequences whose adapter could not be read, which have failed.
        """
        failed: list[Sequence] = []
        for entry in list(self._loading.values()):
            if entry.loading is not None and entry.loading.done():
                failed += self._finish_load(entry)
        failed += self._start_loads()
        return self._hand_out(), failed

    def wait(self) -> None:
        """Waits until a load has ended, at most `MAX_WAIT_S`; returns at once if none is going on."""
        loads = [entry.loading for entry in self._loading.values() if entry.loading is not None]
        wait(loads, MAX_WAIT_S, return_when=FIRST_COMPLETED)

    def remove(self, lora_int_id: int) -> bool:
        """Drops an adapter; returns whether it was in memory.

        Raises:
            ConfigError: Unfinished requests use the adapter.
        """
        entry = self._of_number(lora_int_id)
        if entry is None:
            return False
        if entry.num_users or entry.waiting:
            raise ConfigError(
                f"unfinished requests use the adapter {quote(entry.name)}; wait for them or abort them first"
            )
        self._forget(entry)
        return entry.adapter is not None

    def pin(self, lora_int_id: int) -> bool:
        """Keeps an adapter in memory until it is removed.

        Raises:
            ConfigError: No adapter of this number is in memory.
        """
        entry = self._of_number(lora_int_id)
        if entry is None or entry.adapter is None:
            raise ConfigError(f"no adapter with lora_int_id={lora_int_id} is in memory; add it first (add_lora)")
        self._pinned.add(entry.name)
        self._idle.pop(entry.name, None)
        return True

    def ids(self) -> set[int]:
        """Returns the numbers of the adapters in memory."""
        return {entry.request.lora_int_id for entry in self._entries.values() if entry.adapter is not None}

    def reset(self) -> None:
        """Removes all sequences. It works in any state, also after an interrupt."""
        kept = [one for one in self._entries.values() if one.adapter is not None or one.loading is not None]
        self._entries = {entry.name: entry for entry in kept}
        self._names = {entry.request.lora_int_id: entry.name for entry in kept}
        self._pinned &= self._entries.keys()
        self._waiting: dict[Sequence, Entry] = {}
        self._users: dict[Sequence, Entry] = {}
        # The entries whose loads have not begun, in the order of their first waiting sequences.
        self._queued: dict[str, Entry] = {}
        self._loading = {entry.name: entry for entry in kept if entry.loading is not None}
        # The entries in memory that sequences wait for, and those that nobody needs; the one that was unused for the
        # longest time comes first.
        self._ready: dict[str, Entry] = {}
        self._idle: dict[str, Entry] = {}
        for entry in kept:
            entry.waiting, entry.num_users = {}, 0
            self._rest(entry)

    def close(self) -> None:
        """Forgets all adapters. Loads that are going on are not waited for; what they read is dropped."""
        self._entries.clear()
        self.reset()

    def _of_number(self, lora_int_id: int) -> Entry | None:
        name = self._names.get(lora_int_id)
        return None if name is None else self._entries[name]

    def _entry(self, request: LoRARequest) -> Entry:
        """Returns the entry of a request, which is made if it is new or if its adapter must be read again."""
        self.check(request)
        entry, is_pinned = self._entries.get(request.lora_name), request.lora_name in self._pinned
        # Sequences that wait for the adapter share one load, so that the prompts of a call do not each read it again.
        if entry is not None and (entry.waiting or not request.load_inplace):
            return entry
        if entry is not None:
            self._forget(entry)
        if is_pinned:
            self._pinned.add(request.lora_name)
        self._names[request.lora_int_id] = request.lora_name
        entry = self._entries[request.lora_name] = Entry(request)
        return entry

    def _notice_abandoned(self) -> None:
        """Notices the loads that have ended after their last sequence left; no step may come that does."""
        for entry in list(self._loading.values()):
            if entry.loading is not None and entry.loading.done() and not entry.waiting:
                self._finish_load(entry)

    def _rest(self, entry: Entry) -> None:
        """Makes an adapter that nobody needs the last one of those that may be forgotten."""
        is_held = entry.adapter is not None and self._entries.get(entry.name) is entry
        if is_held and not entry.num_users and not entry.waiting and entry.name not in self._pinned:
            self._idle.pop(entry.name, None)
            self._idle[entry.name] = entry

    def _forget(self, entry: Entry) -> None:
        """Drops an entry, so that its name and its number are free again."""
        del self._entries[entry.name], self._names[entry.request.lora_int_id]
        self._pinned.discard(entry.name)
        for some in (self._queued, self._loading, self._ready, self._idle):
            some.pop(entry.name, None)

    def _start_loads(self) -> list[Sequence]:
        """Starts loads in the order of the first sequences, as far as there are threads and room for the adapters.

        Returns:
            The sequences of adapters for which there can be no room, because all others are pinned; they have failed.
        """
        failed: list[Sequence] = []
        while self._queued and len(self._loading) < NUM_THREADS:
            entry = next(iter(self._queued.values()))
            if self._make_room():
                self._start_load(entry)
            elif len(self._pinned) >= self._max_adapters + (entry.name in self._pinned):
                failed += self._fail(entry, self._no_room(entry))
            else:
                break
        return failed

    def _start_load(self, entry: Entry) -> None:
        """Starts the load of a queued entry, on a thread that the end of the interpreter does not wait for."""
        del self._queued[entry.name]
        self._loading[entry.name] = entry
        entry.loading = Future()
        Thread(target=_load, args=(self._read, entry.request, entry.loading), name="adapters", daemon=True).start()

    def _no_room(self, entry: Entry) -> ConfigError:
        return ConfigError(
            f"there is no room for the adapter {quote(entry.name)}: the {self._max_adapters} adapters in memory are in "
            "use, pinned or being read; raise max_cpu_loras, or remove one"
        )

    def _make_room(self) -> bool:
        """Forgets an unused adapter if there is no room for one more; returns whether there is."""
        if len(self._entries) - len(self._queued) >= self._max_adapters and self._idle:
            self._forget(next(iter(self._idle.values())))
        return len(self._entries) - len(self._queued) < self._max_adapters

    def _finish_load(self, entry: Entry) -> list[Sequence]:
        """Stores the adapter of a load that has ended. If the load failed, its sequences fail and are returned."""
        assert entry.loading is not None
        if (error := _error_of(entry)) is not None:
            return self._fail(entry, error)
        entry.adapter, entry.loading = entry.loading.result(), None
        self.num_loads += 1
        del self._loading[entry.name]
        if entry.waiting:
            self._ready[entry.name] = entry
        self._rest(entry)
        return []

    def _fail(self, entry: Entry, error: UserError) -> list[Sequence]:
        """Forgets an adapter, and ends the sequences that wait for it with an error; returns them."""
        self._forget(entry)
        for sequence in entry.waiting:
            del self._waiting[sequence]
            sequence.fail_unstarted(RequestError.from_exception(error))
        return list(entry.waiting)

    def _hand_out(self) -> list[Sequence]:
        """Gives the adapters in memory to the sequences that wait for them; returns these in the order of arrival."""
        ready = [(sequence, entry) for entry in self._ready.values() for sequence in entry.waiting]
        for sequence, entry in ready:
            assert entry.adapter is not None
            sequence.adapter = entry.adapter
            # Keys and values depend on the adapter, so only sequences of the same adapter may share blocks.
            sequence.cache_salt = entry.adapter.digest + sequence.cache_salt
            self._users[sequence] = self._waiting.pop(sequence)
        for entry in self._ready.values():
            entry.num_users += len(entry.waiting)
            entry.waiting = {}
        self._ready = {}
        return sorted(sequence for sequence, _ in ready)


def _check_same(known: Entry, request: LoRARequest) -> None:
    """Raises if a request names a known adapter with another number, or another folder that must not replace it."""
    number, path = known.request.lora_int_id, known.request.lora_path
    if request.lora_int_id != number:
        raise ConfigError(
            f"the adapter {quote(known.name)} has lora_int_id={number}, and a request names it with lora_int_id="
            f"{request.lora_int_id}; give each adapter one number, or call remove_lora({number}) first"
        )
    if request.lora_path != path and not request.load_inplace:
        raise ConfigError(
            f"the adapter {quote(known.name)} was read from {quote(path)}, and a request names "
            f"{quote(request.lora_path)}; use another lora_name, or load_inplace=True to replace it"
        )
    if request.lora_path != path and known.waiting:
        raise ConfigError(
            f"requests wait for the adapter {quote(known.name)} from {quote(path)}, so it cannot be read from "
            f"{quote(request.lora_path)} now; use another lora_name"
        )


def _load(read: Callable[[LoRARequest], Adapter], request: LoRARequest, loading: Future[Adapter]) -> None:
    """Reads an adapter, and puts it or the error into the future."""
    try:
        loading.set_result(read(request))
    except BaseException as error:  # noqa: BLE001  # `_error_of` hands it to the requests.
        loading.set_exception(error)


def _error_of(entry: Entry) -> UserError | None:
    """Returns the error of a load that has ended; None if the adapter was read."""
    assert entry.loading is not None
    error = entry.loading.exception()
    if error is None or isinstance(error, UserError):
        return error
    name = quote(entry.request.lora_name)
    return AdapterError(f"the adapter {name} cannot be read: {type(error).__name__}: {error!s:.300}")

"""`AdapterLibrary`: the adapters in the memory of the host, read beside the steps of the engine.

A request names its adapter. If the library does not have the adapter, the sequences of the request wait here, outside
the scheduler, and others run. A few threads read the adapters, in the order in which they were first asked for, so that
one that is slow or cannot be reached holds up no others. When the library is full, it drops the adapter that was unused
for the longest time; an adapter of unfinished sequences stays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ..errors import AdapterError, ConfigError, RequestError, UserError, quote
from ..sequence import Sequence
from .adapter import Adapter
from .request import LoRARequest

__all__ = ["AdapterLibrary"]

NUM_THREADS = 4
"""Most adapters that are read at once."""


@dataclass(slots=True, eq=False)
class Entry:
    """An adapter that was asked for.

    Attributes:
        request: The request that names it.
        loading: The load that is going on; None before it begins and after its end was noticed.
        adapter: The adapter, once it was read.
        waiting: Sequences that wait for the adapter.
        users: Sequences that have the adapter; finished ones are dropped from time to time.
        is_pinned: Whether the adapter stays, even if it is not used.
    """

    request: LoRARequest
    loading: Future[Adapter] | None = None
    adapter: Adapter | None = None
    waiting: list[Sequence] = field(default_factory=list)
    users: list[Sequence] = field(default_factory=list)
    is_pinned: bool = False

    def is_used(self) -> bool:
        """Returns whether the adapter must stay: a sequence needs it, or it is pinned."""
        self.drop_finished()
        return self.is_pinned or bool(self.users)

    def drop_finished(self) -> None:
        """Drops finished sequences from the users."""
        self.users = [sequence for sequence in self.users if not sequence.is_finished]


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
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapters")
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        """Entries by the name of the adapter; the one that was used last comes last."""

    def check(self, request: LoRARequest) -> None:
        """Checks that a request agrees with the requests of the adapters that are known.

        Raises:
            ConfigError: The number of the request names another adapter, or its name another folder.
        """
        known = self._entries.get(request.lora_name)
        if known is not None and known.request.lora_path != request.lora_path:
            if not request.load_inplace:
                raise ConfigError(
                    f"the adapter {quote(request.lora_name)} was read from {quote(known.request.lora_path)}, and a "
                    f"request names {quote(request.lora_path)}; use another lora_name, or load_inplace=True to replace "
                    "it"
                )
            if known.waiting:
                raise ConfigError(
                    f"requests wait for the adapter {quote(request.lora_name)} from {quote(known.request.lora_path)}, "
                    f"so it cannot be read from {quote(request.lora_path)} now; use another lora_name"
                )
        for entry in self._entries.values():
            if entry.request.lora_int_id == request.lora_int_id and entry.request.lora_name != request.lora_name:
                raise ConfigError(
                    f"lora_int_id={request.lora_int_id} is the number of the adapter "
                    f"{quote(entry.request.lora_name)}; give {quote(request.lora_name)} another one"
                )

    def ask(self, request: LoRARequest, sequence: Sequence) -> None:
        """Makes a sequence wait for its adapter; `take_ready` returns the sequence when the adapter is there.

        Raises:
            ConfigError: As in `check`.
        """
        self._entry(request).waiting.append(sequence)

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
            return False
        if entry.loading is None:
            if not self._make_room():
                raise self._no_room(entry)
            entry.loading = self._threads.submit(self._read, request)
        wait([entry.loading])
        if (error := _error_of(entry)) is not None:
            if not entry.waiting:
                del self._entries[request.lora_name]
            raise error
        self._finish_load(entry)
        return True

    def take_ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Notices the loads that have ended, and starts those for which there is room.

        Returns:
            The sequences that got their adapters, and the sequences whose adapter could not be read, which have failed.
        """
        failed: list[Sequence] = []
        for entry in list(self._entries.values()):
            if entry.loading is not None and entry.loading.done():
                failed += self._finish_load(entry)
        failed += self._start_loads()
        return [sequence for entry in list(self._entries.values()) for sequence in self._hand_out(entry)], failed

    def wait(self) -> None:
        """Waits until a load has ended; returns at once if none is going on."""
        loads = [entry.loading for entry in self._entries.values() if entry.loading is not None]
        wait(loads, return_when=FIRST_COMPLETED)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait for their adapters."""
        return sum(len(entry.waiting) for entry in self._entries.values())

    def discard(self, sequence: Sequence) -> bool:
        """Removes a sequence that waits for its adapter; returns whether it did."""
        for entry in self._entries.values():
            if sequence in entry.waiting:
                entry.waiting.remove(sequence)
                return True
        return False

    def remove(self, lora_int_id: int) -> bool:
        """Drops an adapter; returns whether it was in memory.

        Raises:
            ConfigError: Unfinished requests use the adapter.
        """
        name = self._name_of(lora_int_id)
        if name is None:
            return False
        entry = self._entries[name]
        entry.is_pinned = False
        if entry.is_used() or entry.waiting:
            raise ConfigError(f"unfinished requests use the adapter {quote(name)}; wait for them or abort them first")
        del self._entries[name]
        return entry.adapter is not None

    def pin(self, lora_int_id: int) -> bool:
        """Keeps an adapter in memory until it is removed.

        Raises:
            ConfigError: No adapter of this number is in memory.
        """
        name = self._name_of(lora_int_id)
        if name is None or self._entries[name].adapter is None:
            raise ConfigError(f"no adapter with lora_int_id={lora_int_id} is in memory; add it first (add_lora)")
        self._entries[name].is_pinned = True
        return True

    def ids(self) -> set[int]:
        """Returns the numbers of the adapters in memory."""
        return {entry.request.lora_int_id for entry in self._entries.values() if entry.adapter is not None}

    def reset(self) -> None:
        """Removes all sequences."""
        for entry in self._entries.values():
            entry.waiting, entry.users = [], []

    def close(self) -> None:
        """Ends the threads; loads that are going on are finished first."""
        self._threads.shutdown(cancel_futures=True)
        self._entries.clear()

    def _name_of(self, lora_int_id: int) -> str | None:
        found = (name for name, entry in self._entries.items() if entry.request.lora_int_id == lora_int_id)
        return next(found, None)

    def _entry(self, request: LoRARequest) -> Entry:
        self.check(request)
        entry = self._entries.get(request.lora_name)
        # Sequences that wait for the adapter share one load, so that the prompts of a call do not each read it again.
        if entry is None or (request.load_inplace and not entry.waiting):
            is_pinned = entry is not None and entry.is_pinned
            entry = self._entries[request.lora_name] = Entry(request, is_pinned=is_pinned)
        self._entries.move_to_end(request.lora_name)
        return entry

    def _start_loads(self) -> list[Sequence]:
        """Starts loads in the order of the requests, as far as there is room for the adapters.

        Returns:
            The sequences of adapters for which there can be no room, because all others are pinned; they have failed.
        """
        failed: list[Sequence] = []
        for entry in list(self._entries.values()):
            if entry.adapter is None and entry.loading is None and entry.waiting:
                if self._make_room():
                    entry.loading = self._threads.submit(self._read, entry.request)
                elif sum(other.is_pinned for other in self._entries.values()) >= self._max_adapters + entry.is_pinned:
                    failed += self._fail(entry, self._no_room(entry))
                else:
                    break
        return failed

    def _no_room(self, entry: Entry) -> ConfigError:
        return ConfigError(
            f"there is no room for the adapter {quote(entry.request.lora_name)}: the {self._max_adapters} adapters in "
            "memory are in use or pinned; raise max_cpu_loras, or remove one"
        )

    def _make_room(self) -> bool:
        """Drops unused adapters until there is room for one more; returns whether there is."""
        held = [entry for entry in self._entries.values() if entry.adapter is not None or entry.loading is not None]
        for entry in held:
            if len(held) < self._max_adapters:
                break
            if entry.adapter is not None and not entry.is_used() and not entry.waiting:
                entry.adapter = None
                held = [other for other in held if other is not entry]
        return len(held) < self._max_adapters

    def _finish_load(self, entry: Entry) -> list[Sequence]:
        """Stores the adapter of a load that has ended. If the load failed, its sequences fail and are returned."""
        assert entry.loading is not None
        if (error := _error_of(entry)) is not None:
            return self._fail(entry, error)
        entry.adapter, entry.loading = entry.loading.result(), None
        self.num_loads += 1
        return []

    def _fail(self, entry: Entry, error: UserError) -> list[Sequence]:
        """Forgets an adapter, and ends the sequences that wait for it with an error; returns them."""
        self._entries = OrderedDict((name, other) for name, other in self._entries.items() if other is not entry)
        for sequence in entry.waiting:
            sequence.fail_unstarted(RequestError.from_exception(error))
        return entry.waiting

    def _hand_out(self, entry: Entry) -> Iterator[Sequence]:
        """Gives the adapter of an entry to the sequences that wait for it, and yields them."""
        if entry.adapter is None or not entry.waiting:
            return
        entry.drop_finished()
        for sequence in entry.waiting:
            sequence.adapter = entry.adapter
            # Keys and values depend on the adapter, so only sequences of the same adapter may share blocks.
            sequence.cache_salt = entry.adapter.digest + sequence.cache_salt
            entry.users.append(sequence)
            yield sequence
        entry.waiting = []


def _error_of(entry: Entry) -> UserError | None:
    """Returns the error of a load that has ended; None if the adapter was read."""
    assert entry.loading is not None
    error = entry.loading.exception()
    if error is None or isinstance(error, UserError):
        return error
    name = quote(entry.request.lora_name)
    return AdapterError(f"the adapter {name} cannot be read: {type(error).__name__}: {error!s:.300}")

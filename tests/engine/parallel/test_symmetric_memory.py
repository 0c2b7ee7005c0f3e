"""Sums in symmetric memory, on GPUs that this machine does not have: threads are ranks, and share CPU buffers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, PrefixStore

from millrace.engine.parallel import rendezvous, symmetric_memory
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.parallel.process_groups import make_group
from millrace.engine.parallel.star import Star
from millrace.engine.parallel.symmetric_memory import Registration, SymmetricCollectives, can_map
from ranks import connected_channels

SIZE = 2
BUFFER_BYTES, ONE_SHOT_BYTES = 1 << 10, 1 << 7


class Machine:
    """The symmetric memory of all ranks, and torch's kernels for it."""

    def __init__(self) -> None:
        self.buffers = [torch.zeros(BUFFER_BYTES, dtype=torch.uint8) for _ in range(SIZE)]
        self.launched: list[str] = []
        self._barrier = threading.Barrier(SIZE)

    def one_shot_all_reduce_copy_out(self, own: Any, part: Any, kind: str, name: str, out: Any) -> None:
        own.copy_(part)
        out.copy_(self._add("one shot", own))

    def two_shot_all_reduce_(self, own: Any, kind: str, name: str) -> None:
        own.copy_(self._add("two shot", own))

    def multimem_all_reduce_(self, own: Any, kind: str, name: str) -> None:
        own.copy_(self._add("multicast", own))

    def _add(self, kernel: str, own: torch.Tensor) -> torch.Tensor:
        self.launched.append(kernel)
        self._barrier.wait(10)
        views = [buffer[: own.nbytes].view(own.dtype).view(own.shape) for buffer in self.buffers]
        total = torch.stack(views).sum(0, dtype=own.dtype)
        self._barrier.wait(10)
        return total


class Nccl:
    """Collectives that note what they add, and add nothing."""

    def __init__(self) -> None:
        self.added: list[torch.Tensor] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.added.append(tensor)
        return tensor


def make_ranks(machine: Machine, multicast_ptr: int) -> list[SymmetricCollectives]:
    memory = SimpleNamespace(multicast_ptr=multicast_ptr)
    registration = Registration(None, None, 0)
    return [SymmetricCollectives(Nccl(), registration, buffer, memory) for buffer in machine.buffers]


@pytest.fixture(scope="module", autouse=True)
def small_buffers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric_memory, "BUFFER_BYTES", BUFFER_BYTES)
        patch.setattr(symmetric_memory, "ONE_SHOT_BYTES", ONE_SHOT_BYTES)
        yield


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 8, 24, 33])), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    multicast_ptr=st.sampled_from([0, 7]),
)
def test_small_sums_are_taken_in_shared_memory_and_all_others_by_nccl(shapes, dtype, multicast_ptr) -> None:
    machine = Machine()
    parts = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(SIZE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "symm_mem", machine)
        ranks = make_ranks(machine, multicast_ptr)
        inputs = [[part.clone() for part in own] for own in parts]
        with ThreadPoolExecutor(SIZE) as pool:
            results = list(pool.map(lambda rank, own: [rank.all_reduce(part) for part in own], ranks, inputs))
    kernels = []
    for i, part in enumerate(parts[0]):
        by_nccl = dtype == torch.float16 or part.nbytes % 16 > 0 or part.nbytes > BUFFER_BYTES
        for rank in range(SIZE):
            assert results[rank][i] is inputs[rank][i], "a sum replaces its tensor"
            assert any(inputs[rank][i] is added for added in ranks[rank]._nccl.added) == by_nccl
            expected = parts[rank][i] if by_nccl else parts[0][i] + parts[1][i]
            assert torch.equal(results[rank][i], expected)
        if not by_nccl:
            kernels += [
                ("one shot" if part.nbytes <= ONE_SHOT_BYTES else "multicast" if multicast_ptr else "two shot")
            ] * 2
    assert sorted(machine.launched) == sorted(kernels)


class Pads:
    """The signal pads of two ranks, and sums on rank 0 that wait for signals of rank 1, which has gone."""

    multicast_ptr, rank, world_size = 0, 0, SIZE

    def __init__(self, num_blocks: int) -> None:
        self.pads = [torch.zeros(num_blocks * SIZE, dtype=torch.int32) for _ in range(SIZE)]
        self.pads[1][0] = 1  # A signal of rank 0 that rank 1 has not taken.
        self._num_blocks = num_blocks

    def get_signal_pad(self, rank: int, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == torch.int32
        return self.pads[rank]

    def run(self, num_sums: int) -> None:
        own, other = (pad.view(self._num_blocks, SIZE) for pad in self.pads)
        for block in [*range(self._num_blocks)] * num_sums:
            for pad in (own, other):
                self._swap(pad, block, 0, 0)
            for rank in range(SIZE):
                self._swap(own, block, rank, 1)

    def _swap(self, pad: torch.Tensor, block: int, rank: int, expected: int) -> None:
        while pad[block, rank] != expected:
            pass
        pad[block, rank] = 1 - expected


def test_sums_that_wait_for_a_rank_which_has_gone_are_let_go() -> None:
    pads = Pads(num_blocks=3)
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    collectives = SymmetricCollectives(Nccl(), Registration(None, None, 0), buffer, pads)  # type: ignore[arg-type]
    sums = threading.Thread(target=pads.run, args=(4,), daemon=True)
    sums.start()
    while sums.is_alive():
        collectives._signal_for_others()
    sums.join()


def test_ranks_can_map_the_memory_of_different_gpus_of_one_host() -> None:
    assert can_map([["a", 0, "gpu 1"], ["a", 0, "gpu 2"]])
    assert not can_map([["a", 0, "gpu 1"], ["b", 0, "gpu 2"]]), "another host"
    assert not can_map([["a", 0, "gpu 1"], ["a", 0, "gpu 1"]]), "the same GPU"
    assert not can_map([["a", 0, "gpu 1"], ["a", 1, "gpu 2"]]), "another engine came before on one of the ranks"
    assert not can_map([["a", 0, "gpu 1"], None]), "a GPU without kernels"


def test_each_registration_of_a_process_has_a_number_of_its_own() -> None:
    store = HashStore()
    gloo = make_group(PrefixStore("a", store), 0, 1, "cpu", "127.0.0.1")
    made = [Registration.make(gloo, PrefixStore("b", store), 0, 1) for _ in range(2)]
    assert made[0].number < made[1].number
    found = torch.distributed.distributed_c10d._resolve_process_group(made[1].name)
    assert (found.rank(), found.size()) == (0, 1)


@pytest.mark.parametrize(("fails", "hosts"), [((), "aa"), ((0,), "aa"), ((1,), "aa"), ((), "ab")])
def test_all_ranks_share_memory_or_none_does(fails, hosts, monkeypatch, caplog) -> None:
    channels, opened = connected_channels(), []

    def open_memory(nccl: Any, registration: Registration, device: Any) -> str:
        opened.append(registration.store)
        if registration.store in fails:
            raise RuntimeError("CUDA driver error: invalid device")
        return "memory"

    monkeypatch.setattr(Registration, "make", lambda nccl, store, rank, size: Registration(None, store, 0))
    monkeypatch.setattr(rendezvous, "describe_rank", lambda known, _: [hosts[known.store], 0, f"gpu {known.store}"])
    monkeypatch.setattr(SymmetricCollectives, "open", open_memory)

    def connect(rank: int) -> Any:
        place = ParallelContext.of_rank(rank, SIZE, 1)
        world = Star([channels[rank]], rank)
        return rendezvous._map_memory(world, place, Nccl(), (None, rank), torch.device("cuda"))  # type: ignore[arg-type]

    with ThreadPoolExecutor(SIZE) as pool:
        found = list(pool.map(connect, range(SIZE)))
    assert found == ["memory" if hosts == "aa" and not fails else None] * SIZE
    assert sorted(opened) == ([0, 1] if hosts == "aa" else [])
    assert len(caplog.records) == len(fails)

"""How ranks meet, and the interface for whoever starts them: here threads, each a rank as a process would be one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import AllreduceOptions, HashStore, PrefixStore, ReduceOp
from torch.distributed.distributed_c10d import AllgatherOptions

from millrace.engine.config import EngineConfig
from millrace.engine.engine import LLMEngine
from millrace.engine.errors import CheckpointError, EngineDeadError
from millrace.engine.executor.worker import run_worker
from millrace.engine.parallel.collectives import GroupCollectives
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.parallel.process_groups import GroupLink, make_group
from millrace.engine.parallel.rendezvous import Rendezvous, Team, join
from millrace.engine.parallel.stage_link import ChannelLink
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams

CPU = torch.device("cpu")
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class RankThread(threading.Thread):
    """A rank on a thread, with the error that it ended with."""

    def __init__(self, config: EngineConfig, rank: int, address: str) -> None:
        super().__init__()
        self._arguments = config, rank, address
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            run_worker(*self._arguments)
        except Exception as error:  # noqa: BLE001  # The tests look at it.
            self.error = error


@pytest.fixture
def config(tiny_model) -> EngineConfig:
    """Two stages, which need no process group."""
    return EngineConfig(
        model=str(tiny_model("llama")), dtype="float32", device="cpu", max_num_seqs=4, pipeline_parallel_size=2
    )


def generate(engine: LLMEngine) -> list[int]:
    engine.add_request(GenerateRequest("a", None, [5, 6, 7], PARAMS))
    while not (outputs := engine.step()):
        pass
    return outputs[0].outputs[0].token_ids


def test_ranks_come_to_an_address_and_leave_when_the_engine_is_closed(config: EngineConfig) -> None:
    alone = LLMEngine.from_config(replace(config, pipeline_parallel_size=1))
    expected = generate(alone)
    alone.close()
    rendezvous = Rendezvous.open()
    rank = RankThread(config, 1, rendezvous.address)
    engine = LLMEngine.from_config(config, rendezvous)
    assert generate(engine) == expected
    engine.close()
    rank.join()
    assert rank.error is None


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "opt-350m"])
def test_pp_stages_pass_one_tensor_on_and_change_no_bit(family: str, tiny_model, monkeypatch) -> None:
    sent = []
    send = ChannelLink.send
    monkeypatch.setattr(
        ChannelLink, "send", lambda link, tensor: (sent.append(tuple(tensor.shape)), send(link, tensor))
    )
    one = EngineConfig(
        model=str(tiny_model(family)), dtype="bfloat16", device="cpu", max_num_seqs=4, enforce_eager=True, num_threads=1
    )
    logprobs = []
    for config in (one, replace(one, pipeline_parallel_size=2)):
        rendezvous = Rendezvous.open() if config.num_ranks > 1 else None
        rank = RankThread(config, 1, rendezvous.address) if rendezvous else None
        engine = LLMEngine.from_config(config, rendezvous)
        engine.add_request(GenerateRequest("a", None, [5, 6, 7], replace(PARAMS, logprobs=3, prompt_logprobs=3)))
        while not (outputs := engine.step()):
            pass
        logprobs.append((outputs[0].prompt_logprobs, outputs[0].outputs[0].logprobs))
        engine.close()
        if rank is not None:
            rank.join()
    assert logprobs[0] == logprobs[1]
    assert [shape[0] for shape in sent] == [3, 1, 1, 1] and all(len(shape) == 2 for shape in sent)


def test_the_end_of_rank_0_ends_the_others(config: EngineConfig) -> None:
    rendezvous = Rendezvous.open()
    rank = RankThread(config, 1, rendezvous.address)
    engine = LLMEngine.from_config(config, rendezvous)
    engine.executor._team.close()
    rank.join()
    assert isinstance(rank.error, EngineDeadError) and "rank 0" in str(rank.error)


def test_a_rank_that_cannot_load_tells_rank_0_why(config: EngineConfig, tmp_path) -> None:
    rendezvous = Rendezvous.open()
    rank = RankThread(replace(config, model=str(tmp_path)), 1, rendezvous.address)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        LLMEngine.from_config(config, rendezvous)
    rank.join()
    assert isinstance(rank.error, CheckpointError)


def test_a_rank_that_cannot_come_ends_the_waiting() -> None:
    def check() -> None:
        raise EngineDeadError("rank 1 has ended")

    with pytest.raises(EngineDeadError, match="rank 1 has ended"):
        join(Rendezvous.open(), ParallelContext.of_rank(0, 2, 1), CPU, check)


def test_all_ranks_agree_on_the_smallest() -> None:
    rendezvous = Rendezvous.open()
    found = {}

    def ask(rank: int) -> None:
        place = ParallelContext.of_rank(rank, 1, 3)
        team = join(rendezvous if rank == 0 else Rendezvous.at(rendezvous.address), place, CPU)
        found[rank] = team.parallel.smallest([7, 4, 9][rank]), team.num_on_host
        team.close()

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), (4, 3))


class Group:
    """A process group that notes whether its operations were aborted."""

    def __init__(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


def test_the_end_of_a_team_aborts_sums_and_transfers_that_wait_for_a_dead_rank() -> None:
    sums, transfers = Group(), Group()
    place = ParallelContext(2, 0, 2, 0, tensor=GroupCollectives(sums, 2), stages=GroupLink(transfers, 0))
    Team(place, [], num_on_host=4).close()
    assert sums.is_aborted and transfers.is_aborted


class StreamGroup:
    """A process group as NCCL's is with `asyncOp=False`: it works on the current stream and returns nothing."""

    def __init__(self) -> None:
        self.gathered_into: list[torch.Tensor] = []

    def allreduce(self, tensors: list[torch.Tensor], options: AllreduceOptions) -> None:
        assert options.asyncOp is False and options.reduceOp == ReduceOp.SUM
        tensors[0].mul_(2)

    def _allgather_base(self, output: torch.Tensor, part: torch.Tensor, options: AllgatherOptions) -> None:
        assert options.asyncOp is False
        self.gathered_into.append(output)
        output.copy_(part.repeat(2))


def test_sums_are_queued_on_the_current_stream_and_parts_gathered_into_one_tensor() -> None:
    group = StreamGroup()
    collectives = GroupCollectives(group, 2)
    assert collectives.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
    gathered = collectives.all_gather(torch.ones(1, 3))
    assert gathered.shape == (2, 1, 3) and gathered.data_ptr() == group.gathered_into[0].data_ptr()


def test_sums_and_gathered_parts_over_gloo() -> None:
    store = HashStore()

    def compute(rank: int) -> tuple[list[float], list[list[float]]]:
        collectives = GroupCollectives(make_group(PrefixStore("sums", store), rank, 2, "cpu", "127.0.0.1"), 2)
        part = torch.arange(6.0).view(2, 3)[:, rank : rank + 2]
        return collectives.all_reduce(torch.tensor([1.0, rank])).tolist(), collectives.all_gather(part).tolist()

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compute, (0, 1)))
    assert results == [([2, 1], [[[0, 1], [3, 4]], [[1, 2], [4, 5]]])] * 2


def test_recordings_are_freed_before_the_sums_in_them_end(config: EngineConfig) -> None:
    rendezvous, log = Rendezvous.open(), []
    rank = RankThread(config, 1, rendezvous.address)
    engine = LLMEngine.from_config(config, rendezvous)
    runner, team = engine.executor._runner, engine.executor._team
    runner._recorder = SimpleNamespace(close=lambda: log.append("recordings"))
    object.__setattr__(team.parallel, "tensor", SimpleNamespace(close=lambda: log.append("sums")))
    engine.close()
    rank.join()
    assert log == ["recordings", "sums"]

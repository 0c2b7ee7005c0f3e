"""Recorded decode steps: padding, sizes, and what memory they read; on a CPU with a backend that calls again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters import make_adapter
from fake_device import CallAgain
from millrace.engine.batch import ForwardBatch, KVCache
from millrace.engine.config import EngineConfig
from millrace.engine.device import Device
from millrace.engine.errors import EngineDeadError
from millrace.engine.kv_cache import shared_prefix
from millrace.engine.llm import LLM
from millrace.engine.loading.capacity import GRAPH_BYTES
from millrace.engine.loading.load import _choose_recorder, _graph_bytes
from millrace.engine.lora.request import LoRARequest
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.parallel.star import Star
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.step.cuda_graph import CudaGraphs, DecodeGraphs, graph_sizes, without_garbage_collection
from millrace.engine.step.head import Draw
from millrace.engine.step.tables import Tables
from millrace.engine.tasks.generate import Generate
from ranks import connected_channels

CPU = torch.device("cpu")
MAX_NUM_SEQS = 11


class Watched:
    """A model that notes the batches it gets, and gives NaN for padding."""

    def __init__(self, model: Any) -> None:
        self.spec, self.parallel, self.compute_logits = model.spec, model.parallel, model.compute_logits
        self.adapters = model.adapters
        self.batches: list[ForwardBatch] = []
        self._model = model

    def __call__(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        self.batches.append(batch)
        hidden = self._model(batch, kv_cache)
        if batch.num_decodes == len(batch.seq_lens):
            hidden[batch.seq_lens == 0] = torch.nan
        return hidden

    def sizes(self) -> set[int]:
        """Returns the sizes of decode steps."""
        return {len(batch.seq_lens) for batch in self.batches if batch.num_decodes == len(batch.seq_lens)}


@pytest.fixture
def llm(tiny_model) -> Iterator[LLM]:
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=MAX_NUM_SEQS, block_size=4) as llm:
        yield llm


def record_decodes(llm: LLM, sizes: list[int], draw: Draw | None = None) -> tuple[Watched, CallAgain]:
    """Lets an engine record decode steps of some sizes, and their draws with the function `draw` if it is given."""
    runner, backend = llm.llm_engine.executor._runner, CallAgain()
    runner.model = model = Watched(runner.model)
    runner._recorder = DecodeGraphs(runner._decode, sizes, backend, draw=draw)
    llm.llm_engine.reset_prefix_cache()  # So that the same prompts take the same steps again.
    return model, backend


def prompts(num_seqs: int, shared: int = 0) -> list[list[int]]:
    return [list(range(100, 100 + shared)) + [3 + (7 * i + j) % 200 for j in range(1 + 5 * i)] for i in range(num_seqs)]


def params(num_seqs: int) -> list[SamplingParams]:
    """Greedy and drawn, of different lengths, so that the batch shrinks one by one."""
    return [SamplingParams(temperature=i % 2, seed=i, max_tokens=3 + i, ignore_eos=True) for i in range(num_seqs)]


def generate(llm: LLM, inputs: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(inputs, params(len(inputs)), use_tqdm=False)
    llm.llm_engine.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("sizes", [[1, 2, 4, 8, 11], [3], [11]])
def test_padded_and_recorded_steps_give_the_tokens_of_plain_ones(sizes, llm):
    counts = [1, 2, 5, MAX_NUM_SEQS]
    expected = [generate(llm, prompts(n)) for n in counts]
    model, backend = record_decodes(llm, sizes)
    assert [generate(llm, prompts(n)) for n in counts] == expected
    padded = [batch for batch in model.batches if 0 in batch.seq_lens]
    assert padded and all(len(batch.seq_lens) in sizes for batch in padded)
    assert set(sizes) <= model.sizes()
    assert backend.num_recorded == len(sizes), "each size is recorded once"


def test_steps_that_no_size_holds_are_launched_one_by_one(llm):
    expected = generate(llm, prompts(6))
    model, backend = record_decodes(llm, [2])
    assert generate(llm, prompts(6)) == expected
    assert backend.num_recorded == 1 and model.sizes() == {2, 3, 4, 5, 6}


def test_shared_blocks_are_told_and_recorded_apart(llm, monkeypatch):
    expected = generate(llm, prompts(5, shared=21))
    monkeypatch.setattr(shared_prefix, "MIN_READS_SAVED", 3 * 20)
    model, backend = record_decodes(llm, [8])
    assert generate(llm, prompts(5, shared=21)) == expected
    assert backend.num_recorded == 2, "few sequences share too little, so both forms occur"
    told = [batch for batch in model.batches if batch.num_shared is not None]
    assert {int(batch.num_shared) for batch in told if batch.num_decodes} == {5}
    for batch in told:
        (block_tables,), (slot_mapping,) = batch.block_tables, batch.slot_mappings
        held = block_tables[: batch.num_decodes][batch.seq_lens[: batch.num_decodes] > 0]
        assert len(held) > 1 and (held[:, :5] == held[0, :5]).all()
        assert (batch.positions[: batch.num_decodes][slot_mapping[: batch.num_decodes] >= 0] >= 20).all()


@given(max_num_seqs=st.integers(1, 2000))
def test_the_ladder_wastes_little(max_num_seqs):
    sizes = graph_sizes(max_num_seqs)
    assert sizes[-1] == max_num_seqs and sizes[0] == 1
    assert all(small < large for small, large in pairwise(sizes))
    for small, large in pairwise(sizes):
        padding = (large - small - 1) / large
        assert padding < (1 / 2 if large <= 16 else 1 / 3 if large <= 128 else 1 / 5)


def test_sizes_that_were_asked_for_are_the_sizes():
    assert graph_sizes(100, [64, 8, 8, 300]) == [8, 64]
    graphs = DecodeGraphs(lambda sequences, *_: sequences, [8, 64], CallAgain())
    assert [graphs.padded_size(n) for n in (1, 8, 9, 64, 65)] == [8, 8, 64, 64, None]


def test_a_recording_reads_the_same_memory_every_time():
    seen = []

    def run(sequences: Tensor, num_shared: Tensor | None, routing: Tensor | None) -> Tensor:
        seen.append((sequences.data_ptr(), num_shared is not None and num_shared.data_ptr()))
        return sequences + (0 if num_shared is None else num_shared)

    graphs = DecodeGraphs(run, [2], CallAgain())
    for value in (1, 2, 3):
        given_plan, shared = torch.full((4, 2), value), torch.tensor([10 * value])
        assert graphs.run(given_plan, None).unique().tolist() == [value]
        assert graphs.run(given_plan, shared).unique().tolist() == [11 * value]
    assert len(set(seen)) == 2


def test_all_sizes_are_recorded_at_start_the_largest_first(llm):
    expected = generate(llm, prompts(5, shared=21))
    model, backend = record_decodes(llm, [2, 8, 11])
    recorder = llm.llm_engine.executor._runner._recorder
    recorder.record_all(torch.device("cpu"), with_shared=True)
    assert [len(batch.seq_lens) for batch in model.batches] == [11, 11, 8, 8, 2, 2]
    assert all(not batch.seq_lens.any() for batch in model.batches), "padding has no tokens"
    assert generate(llm, prompts(5, shared=21)) == expected
    assert backend.num_recorded == 6, "nothing is recorded while requests run"


def test_steps_with_adapters_are_recorded_at_start_beside_those_without(tiny_model, tmp_path):
    model_folder, path = tiny_model("llama"), str(tmp_path / "{}")
    for number, rank in enumerate((3, 1, 4, 2)):
        make_adapter(path.format(number), model_folder, rank=rank, alpha=16 * rank, seed=number)

    def run(names: list[int | None]) -> list[list[int]]:
        asked = [None if name is None else LoRARequest(str(name), name + 1, path.format(name)) for name in names]
        outputs = llm.generate(prompts(len(names)), params(len(names)), use_tqdm=False, lora_request=asked)
        return [output.outputs[0].token_ids for output in outputs]

    settings = {"dtype": "float32", "max_num_seqs": MAX_NUM_SEQS, "enable_lora": True, "max_loras": 2}
    with LLM(str(model_folder), **settings) as llm:
        batches = [[1, None, 2, 1, 2], [None] * 5, [3, 1, 2, None, 0], [2]]
        for number in range(4):  # So that prompts with and without adapters run in the same steps.
            llm.add_lora(LoRARequest(str(number), number + 1, path.format(number)))
        expected = [run(names) for names in batches]
        assert expected[0] != expected[1] != expected[2], "adapters change tokens"
        _, backend = record_decodes(llm, [2, 8, 11])
        llm.llm_engine.executor._runner._recorder.record_all(CPU, with_shared=True, num_slots=2)
        assert backend.num_recorded == 3 * 2 * 2
        assert [run(names) for names in batches] == expected
        assert backend.num_recorded == 3 * 2 * 2, "nothing is recorded while requests run"


@pytest.mark.parametrize("sizes", [[1, 2, 4, 8, 11], [11]])
def test_recorded_draws_give_the_tokens_of_launched_ones(sizes, llm):
    counts = [1, 2, 5, MAX_NUM_SEQS]
    expected = [generate(llm, prompts(n)) for n in counts]
    head = llm.llm_engine.executor._runner._head
    drawn = []
    record_decodes(llm, sizes, lambda hidden, plan: drawn.append(plan.shape[1]) or head.draw(hidden, plan))
    llm.llm_engine.executor._runner._recorder.record_all(torch.device("cpu"), with_shared=False)
    drawn.clear()
    assert [generate(llm, prompts(n)) for n in counts] == expected
    assert set(drawn) == set(sizes)


ASKS = [{"logprobs": 1}, {"presence_penalty": 0.5}, {"logit_bias": {7: 1.0}}, {"min_tokens": 2}]


@pytest.mark.parametrize("asked", ASKS, ids=str)
def test_a_step_that_asks_for_more_than_a_draw_is_not_drawn_from_a_recording(asked, llm):
    asking = [SamplingParams(temperature=1, seed=i, max_tokens=6, stop_token_ids=[5], **asked) for i in range(2)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts(2), asking, use_tqdm=False)]
    head, num_drawn = llm.llm_engine.executor._runner._head, []
    record_decodes(llm, [2], lambda hidden, plan: num_drawn.append(1) or head.draw(hidden, plan))
    tokens = [output.outputs[0].token_ids for output in llm.generate(prompts(2), asking, use_tqdm=False)]
    assert tokens == expected
    # Stop tokens are forbidden in the first two draws only, of which the first is that of the prompt.
    longest = max(map(len, tokens))
    assert len(num_drawn) == (longest - 2 + 1 if "min_tokens" in asked else 0), "and one call to record"


def test_padding_appends_no_token():
    tables = Tables(3, 8, 4, torch.device("cpu"))
    tables.tokens[:] = torch.arange(24).view(3, 8)
    before = tables.tokens.clone()
    plan = torch.tensor([[2, 1, -1, -1], [4, 0, 0, 0], [1, 1, 1, 1], [0, 1, 2, 3]], dtype=torch.int32)
    assert tables.ends(plan).tolist() == [[2, 1, 0, 0], [5, 1, 1, 1]]
    tables.append_all(plan, torch.tensor([70, -1, 80, 90]))
    before[2, 5], before[1, 1] = 70, 0
    assert torch.equal(tables.tokens, before)


class Unrecordable(CallAgain):
    """A recorder that fails for some sizes, as a recording does that the memory does not suffice for."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        if len(function()) in (2, 8):
            raise RuntimeError("CUDA error: out of memory")
        return function


def test_a_size_that_cannot_be_recorded_is_launched_and_loses_no_request(llm, caplog):
    counts = [1, 2, 5, MAX_NUM_SEQS]
    expected = [generate(llm, prompts(n)) for n in counts]
    record_decodes(llm, [2, 8, 11], llm.llm_engine.executor._runner._head.draw)
    recorder = llm.llm_engine.executor._runner._recorder
    recorder._steps._backend = recorder._draws._backend = backend = Unrecordable()
    assert [generate(llm, prompts(n)) for n in counts] == expected
    assert backend.num_recorded == 3 + 3, "a size that failed is not tried again"
    said = [record.getMessage() for record in caplog.records if "kernel by kernel" in record.getMessage()]
    assert len(said) == 2 + 2 and "out of memory" in said[0]
    assert {text.split(" with ")[0] for text in said} == {"decode steps", "draws"}


class OfRank(CallAgain):
    """A recorder of a rank, which fails for some sizes, before or in the recording, and notes what it does."""

    def __init__(self, unrecordable: tuple[int, ...] = (), failing: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._unrecordable, self._failing = unrecordable, failing

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        size = function().shape[1]
        if size in self._failing:
            raise RuntimeError("CUDA error: out of memory")
        self.calls.append(f"run {size}")

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        size = function().shape[1]
        if size in self._unrecordable:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.calls.append(f"record {size}")
        return lambda: function() + 1


def record_on_two_ranks(backends: tuple[OfRank, OfRank]) -> list[DecodeGraphs | Exception]:
    """Records steps of sizes 2 and 4 on two ranks, each a thread; a rank that fails closes its connection."""
    channels = connected_channels()

    def record(rank: int) -> DecodeGraphs | Exception:
        place = replace(ParallelContext.of_rank(rank, 2, 1), world=Star([channels[rank]], rank))
        graphs = DecodeGraphs(lambda sequences, *_: sequences.clone(), [2, 4], backends[rank], place.agree)
        try:
            graphs.record_all(CPU, with_shared=False)
        except Exception as error:  # noqa: BLE001  # The tests look at it.
            channels[rank].close()
            return error
        return graphs

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(record, (0, 1)))


@torch.inference_mode()
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_launch_a_size_that_one_cannot_record(rank, caplog):
    backends = OfRank(unrecordable=(4,) if rank == 0 else ()), OfRank(unrecordable=(4,) if rank == 1 else ())
    graphs = record_on_two_ranks(backends)
    for one in graphs:
        assert isinstance(one, DecodeGraphs)
        assert [int(one.run(torch.zeros((4, size), dtype=torch.int32), None).sum()) for size in (4, 2)] == [0, 8]
    reasons = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert sorted(reasons) == ["another rank could not record them", "operation not permitted when stream is capturing"]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_records_while_another_has_not_come_to_its_sums(rank):
    backends = OfRank(failing=(4,) if rank == 0 else ()), OfRank(failing=(4,) if rank == 1 else ())
    errors = record_on_two_ranks(backends)
    assert str(errors[rank]) == "CUDA error: out of memory"
    assert isinstance(errors[1 - rank], EngineDeadError), "the other rank does not wait for it"
    assert backends[1 - rank].calls == ["run 4"]


@pytest.mark.parametrize(("tp_size", "pp_size", "records"), [(1, 1, True), (2, 1, True), (1, 2, False), (2, 2, False)])
def test_ranks_that_share_layers_record_and_pp_stages_do_not(tp_size, pp_size, records):
    config = EngineConfig(model="nowhere", max_num_seqs=4)
    gpu = Device(torch.device("cuda"), max_num_batched_tokens=64, overlap_depth=1)
    place = ParallelContext.of_rank(0, tp_size, pp_size)
    task, model = Generate.create(config, None), SimpleNamespace(parallel=place, columns=place.shard(10))
    assert (_choose_recorder(config, gpu, task, 4, place) is not None) == records
    logits_bytes = 2 * 4 * model.columns.room * 4
    expected = 2 * len(graph_sizes(4)) * GRAPH_BYTES + logits_bytes if records else 0
    assert _graph_bytes(config, gpu, task, 4, model) == expected
    with_adapters = replace(config, enable_lora=True)
    assert _graph_bytes(with_adapters, gpu, task, 4, model) == max(0, 2 * expected - logits_bytes)


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_not_collected_inside_a_recording(fails):
    with contextlib.suppress(KeyError), without_garbage_collection():
        assert not gc.isenabled()
        if fails:
            raise KeyError
    assert gc.isenabled()


@pytest.mark.gpu
def test_a_cuda_graph_repeats_on_what_its_input_holds_now():
    x = torch.zeros(4, device="cuda")
    graphs = CudaGraphs()
    functions = (lambda: x * 2), (lambda: x * x)
    for function in functions:
        graphs.warm_up(function)
    double, square = map(graphs.record, functions)
    for value in (1.0, 3.0):
        x.fill_(value)
        assert double().tolist() == [2 * value] * 4
        assert square().tolist() == [value * value] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recorded_steps_give_the_tokens_of_launched_ones(family, tiny_model):
    tokens = []
    for enforce_eager in (True, False):
        with LLM(str(tiny_model(family)), dtype="float32", max_num_seqs=5, enforce_eager=enforce_eager) as llm:
            tokens.append([generate(llm, prompts(n)) for n in (1, 3, 5)])
    assert tokens[0] == tokens[1]

"""What a step sends, and what it becomes on the device; what a start reserves."""

from __future__ import annotations

import heapq
import logging
import random
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import tiny_config
from millrace.engine.config import EngineConfig
from millrace.engine.device import Device, HostCopies, repeat_until_idle, to_device
from millrace.engine.errors import ConfigError
from millrace.engine.kv_cache.layout import CacheShape, allocate_kv_cache
from millrace.engine.kv_cache.shared_prefix import MIN_READS_SAVED, SharedPrefix
from millrace.engine.llm import LLM
from millrace.engine.loading import load as loading
from millrace.engine.loading.capacity import Reserve, plan_capacity
from millrace.engine.loading.memory_profile import run_largest_step
from millrace.engine.lora import layer
from millrace.engine.models import describe_model
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.step import token_head
from millrace.engine.step.pooling_head import PoolingHead
from millrace.engine.step.tables import Tables
from millrace.engine.step.token_head import TokenHead
from millrace.engine.step_plan import NewRow, StepPlan
from millrace.engine.tasks.generate import Generate

CPU = torch.device("cpu")


def make_plan() -> StepPlan:
    """A decode, the end of a prompt, and the first chunk of a prompt that enters."""
    entering = SimpleNamespace(token_ids=[50, 51, 52, 53, 54, 55])
    return StepPlan(
        rows=[2, 0, 1],
        starts=[5, 2, 0],
        counts=[1, 2, 3],
        samples=[True, True, False],
        new_rows=[NewRow(1, entering, 5)],
        new_blocks=[(0, 2, 2, [9]), (0, 1, 0, [7, 8])],
        num_decodes=1,
        num_shared_blocks=3,
    )


def make_tables() -> Tables:
    tables = Tables(4, 12, 2, CPU)
    tables.tokens[:] = torch.arange(48).view(4, 12) + 100
    tables.blocks[:] = torch.arange(24).view(1, 4, 6) + 30
    return tables


def test_a_plan_enters_the_tables_and_becomes_a_batch():
    tables = make_tables()
    sent = tables.send(make_plan(), 3)
    assert tables.tokens[1].tolist() == [50, 51, 52, 53, 54, *range(117, 124)]
    assert tables.blocks[0, 2].tolist() == [42, 43, 9, 45, 46, 47] and tables.blocks[0, 1, :3].tolist() == [7, 8, 38]
    assert sent.num_shared.tolist() == [3]
    assert sent.sampled.tolist() == [[0, 2], [2, 0], [6, 4]]
    batch = tables.gather(sent.sequences, 6, 3, 1, None)
    assert batch.token_ids.tolist() == [129, 102, 103, 50, 51, 52]
    assert batch.positions.tolist() == [5, 2, 3, 0, 1, 2]
    assert [slots.tolist() for slots in batch.slot_mappings] == [[19, 62, 63, 14, 15, 16]]
    assert batch.query_start_loc.tolist() == [0, 1, 3, 6]
    assert batch.seq_lens.tolist() == [6, 4, 3]
    assert [table.tolist() for table in batch.block_tables] == [[[42, 43, 9], [30, 31, 32], [7, 8, 38]]]
    assert batch.rows.tolist() == [2, 0, 1]


def test_the_tokens_of_the_second_text_of_a_pair_have_type_1():
    tables = make_tables()
    pair, single, empty_first = (SimpleNamespace(num_first_tokens=count) for count in (2, None, 0))
    plan = SimpleNamespace(rows=[2, 0, 3], counts=[5, 3, 2])
    plan.new_rows = [NewRow(2, pair, 5), NewRow(0, single, 3), NewRow(3, empty_first, 2)]
    assert tables.token_types(plan).tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    plan.new_rows = [NewRow(2, single, 5), NewRow(3, single, 2)]
    assert tables.token_types(plan) is None, "new sequences own the rows, and all tokens have type 0"


def test_what_is_sampled_is_appended_to_its_row():
    tables = make_tables()
    sent = tables.send(make_plan(), 3)
    tables.append(sent.sampled, torch.tensor([77, -1]))
    assert tables.tokens[2, 5:8].tolist() == [129, 77, 131], "after the last token"
    assert tables.tokens[0, 4] == 0, "no token, but one that exists"


@given(num_seqs=st.integers(1, 6), num_padding=st.integers(0, 5))
def test_padding_is_inert(num_seqs, num_padding):
    tables = make_tables()
    rows = [i % 4 for i in range(num_seqs)]
    plan = StepPlan(rows=rows, starts=[3] * num_seqs, counts=[1] * num_seqs, samples=[True] * num_seqs)
    size = num_seqs + num_padding
    sent = tables.send(plan, size)
    batch = tables.gather(sent.sequences, size, 6, size, None)
    assert len(sent.sampled[0]) == num_seqs
    assert batch.query_start_loc.tolist() == list(range(size + 1))
    assert batch.seq_lens.tolist() == [4] * num_seqs + [0] * num_padding
    assert batch.rows.tolist() == rows + [-1] * num_padding
    assert batch.token_ids[num_seqs:].tolist() == batch.positions[num_seqs:].tolist() == [0] * num_padding
    (slots,) = batch.slot_mappings
    assert slots[num_seqs:].tolist() == [-1] * num_padding and (slots[:num_seqs] >= 0).all()


def test_all_of_a_plan_is_sent_in_one_copy_and_aligned(monkeypatch):
    copies = []

    def counted(values, dtype, device):
        copies.append(to_device(values, dtype, device))
        return copies[-1]

    monkeypatch.setattr("millrace.engine.step.tables.to_device", counted)
    sent = make_tables().send(make_plan(), 3)
    assert len(copies) == 1
    base = copies[0].data_ptr()
    for part in (sent.sequences, sent.num_shared, sent.sampled):
        assert (part.data_ptr() - base) % 16 == 0 and part.is_contiguous()


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.integers(0, 5)), min_size=1, max_size=9))
def test_sequences_of_one_token_come_first_the_longest_ahead(sequences):
    counts, samples, starts = ([entry[i] for entry in sequences] for i in (0, 1, 2))
    numbers = list(range(len(counts)))
    plan = StepPlan(sequences=numbers, rows=numbers[:], starts=starts, counts=counts, samples=samples)
    plan.put_decodes_first()
    assert plan.counts[: plan.num_decodes] == [1] * plan.num_decodes and 1 not in plan.counts[plan.num_decodes :]
    decodes = [i for i in numbers if sequences[i][0] == 1]
    others = [i for i in numbers if sequences[i][0] > 1]
    assert plan.rows == sorted(decodes, key=lambda i: (-sequences[i][2], i)) + others == plan.sequences
    parts = zip(plan.counts, plan.samples, plan.starts, strict=True)
    assert list(parts) == [sequences[row] for row in plan.rows]


def time_of_grid(lengths, num_heads, num_slots):
    """Returns the time of a grid over sequences and heads, over that with perfect balance.

    A program takes as long as its sequence, and starts when one of the `num_slots` places of the GPU is free.
    """
    slots = [0] * num_slots
    for length in lengths:
        for _ in range(num_heads):
            heapq.heappush(slots, heapq.heappop(slots) + length)
    return max(slots) / (sum(slots) / num_slots)


def test_longest_first_fills_a_gpu_evenly():
    draw = random.Random(0)
    lengths = [draw.randint(200, 2000) for _ in range(256)]
    plan = StepPlan(lengths[:], lengths[:], lengths, [1] * 256, [True] * 256)
    assert time_of_grid(plan.starts, num_heads=8, num_slots=4 * 132) > 1.2
    plan.put_decodes_first()
    assert time_of_grid(plan.starts, num_heads=8, num_slots=4 * 132) < 1.05


@given(data=st.data(), num_requests=st.integers(1, 5), num_shared=st.integers(0, 4))
def test_shared_blocks_are_those_all_have_before_their_last(data, num_requests, num_shared):
    block_size = MIN_READS_SAVED  # So that one block saved is enough.
    head = list(range(num_shared))
    tails = data.draw(st.lists(st.lists(st.integers(4, 6), max_size=3), min_size=num_requests, max_size=num_requests))
    requests = [SimpleNamespace(block_ids=[[*head, *tail, 100 + i]]) for i, tail in enumerate(tails)]
    held = [request.block_ids[0][:-1] for request in requests]
    columns = [len(set(column)) == 1 for column in zip(*held, strict=False)]
    expected = next((i for i, equal in enumerate(columns) if not equal), len(columns)) if num_requests > 1 else 0
    prefix = SharedPrefix(block_size)
    assert prefix.find(requests, True) == expected
    assert prefix.find(list(requests), False) == expected


def test_few_shared_tokens_are_not_worth_a_pass_of_their_own():
    requests = [SimpleNamespace(block_ids=[[1, 2, 3 + i]]) for i in range(9)]
    assert SharedPrefix(MIN_READS_SAVED // 16).find(requests, True) == 2
    assert SharedPrefix(MIN_READS_SAVED // 16 - 1).find(requests, True) == 0


def test_host_copies_give_arrays():
    copy = HostCopies(CPU).start(torch.tensor([1, 2]), torch.tensor([0.5]))
    ids, numbers = copy.wait()
    assert ids.tolist() == [1, 2] and numbers.dtype == np.float32


class Tokens(SimpleNamespace):
    """The table of tokens on a GPU that this machine does not have."""

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("head", [TokenHead, lambda model, tables: PoolingHead(model, tables, ())])
def test_a_rank_whose_results_nobody_reads_copies_nothing_to_the_host(head, monkeypatch):
    monkeypatch.setattr(token_head, "Sampler", lambda *_: None)
    model = SimpleNamespace(parallel=ParallelContext.of_rank(1, 2, 1))
    tables = SimpleNamespace(tokens=Tokens(device=torch.device("cuda")))
    source = torch.ones(2)
    copy = head(model, tables)._host_copies.start(source)
    assert copy.tensors == (source,) and copy.is_ready()


@pytest.mark.parametrize("values", [[1, 2], [[1, 2], [3, 4]], [], np.array([3, 4])])
def test_to_device_takes_lists_and_arrays(values):
    sent = to_device(values, torch.int64, CPU)
    assert sent.dtype == torch.int64 and sent.tolist() == np.asarray(values).tolist()


@pytest.mark.gpu
def test_work_beside_a_busy_gpu_is_repeated_until_it_is_idle():
    calls = []
    torch.cuda._sleep(10_000_000)
    repeat_until_idle(lambda: calls.append(1), torch.device("cuda", 0), timeout_s=10)
    assert calls and torch.cuda.default_stream().query()


@pytest.mark.gpu
def test_to_device_and_back_on_a_gpu():
    device = torch.device("cuda")
    copies = HostCopies(device)
    started = [copies.start(to_device([i, i + 1], torch.int64, device) * 2) for i in range(100)]
    assert [copy.wait()[0].tolist() for copy in started] == [[2 * i, 2 * i + 2] for i in range(100)]


@pytest.mark.parametrize("num_tokens", [1, 63, 200])
def test_the_largest_step_runs_whatever_its_size(num_tokens, tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=4) as llm:
        model = llm.llm_engine.executor._runner.model
        run_largest_step(
            model, CPU, num_tokens=num_tokens, num_seqs=4, max_model_len=63, block_size=8, kv_dtype=torch.float32
        )


def test_the_largest_step_has_the_products_of_adapters_for_all_of_its_tokens(tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr(layer, "lora", lambda *args: seen.append((len(args[0]), len(args[5]), args[6].tolist())))
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=4, enable_lora=True, max_loras=2) as llm:
        model = llm.llm_engine.executor._runner.model
        run_largest_step(model, CPU, num_tokens=63, num_seqs=4, max_model_len=40, block_size=8, kv_dtype=torch.float32)
    assert seen and set(map(str, seen)) == {str((63, 63, [0, 0, 0]))}


class SmallGpu(Device):
    """A GPU with 10,000 bytes, 4,000 of them in use."""

    def free_memory_bytes(self, utilization: float) -> int:
        return int(6000 - 10_000 * (1 - utilization))

    def used_memory_bytes(self) -> int:
        return 4000

    def measure_peak_bytes(self, work) -> int:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")


GPU = SmallGpu(torch.device("cuda", 0), max_num_batched_tokens=8, overlap_depth=1)


def test_what_a_step_and_the_graphs_take_is_not_for_the_cache():
    config = EngineConfig(model="m", max_num_seqs=64, gpu_memory_utilization=0.9)
    assert plan_capacity(config, GPU, 512, block_bytes=100).num_blocks == 50
    assert plan_capacity(config, GPU, 512, 100, Reserve(step_bytes=1000, graph_bytes=500)).num_blocks == 35


LARGE_GPU = Device(torch.device("cuda", 0), 16_384, overlap_depth=1, is_large=True)


@pytest.mark.parametrize(
    ("num_blocks", "settings", "chosen"),
    [
        (64 * 1024, {}, 1024),
        (64 * 1023, {}, 768),
        (64 * 400, {}, 384),
        (64 * 10, {}, 256),
        (8 * 1024, {"max_model_len": 128}, 1024),
        (64 * 1024, {"max_num_batched_tokens": 600}, 512),
        (64 * 10, {"max_num_seqs": 2000}, 2000),
        (64 * 1024, {"max_num_seqs": 3}, 3),
    ],
)
def test_a_large_gpu_runs_as_many_sequences_as_its_cache_holds_of_1024_tokens(num_blocks, settings, chosen, caplog):
    config = EngineConfig(model="m", num_gpu_blocks_override=num_blocks, **settings)
    with caplog.at_level(logging.INFO, "millrace.engine.loading.capacity"):
        assert plan_capacity(config, LARGE_GPU, 4096, block_bytes=100).max_num_seqs == chosen
    assert (f"max_num_seqs is {chosen}" in caplog.text) == ("max_num_seqs" not in settings)


def test_other_devices_run_256_sequences_by_default():
    for device in (Device(CPU, 2048, overlap_depth=0), Device(torch.device("cuda", 0), 8192, overlap_depth=1)):
        config = EngineConfig(model="m", num_gpu_blocks_override=1 << 20)
        assert plan_capacity(config, device, 4096, block_bytes=100).max_num_seqs == 256


def test_an_engine_says_how_many_sequences_it_runs(tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32") as llm:
        engine = llm.llm_engine
        assert engine.config.max_num_seqs == engine.scheduler.max_num_seqs == 256
        assert len(engine.executor._runner._tables.tokens) == 256


def test_an_engine_without_room_says_what_took_it():
    config = EngineConfig(model="m", gpu_memory_utilization=0.9)
    with pytest.raises(ConfigError, match=r"no room .* in use .* for a step and .* for recorded steps; raise"):
        plan_capacity(config, GPU, 512, 100, Reserve(step_bytes=4950, graph_bytes=0))


def test_a_step_without_room_says_what_to_lower(monkeypatch):
    hf_config = tiny_config("llama", dtype=torch.bfloat16, max_position_embeddings=512)
    model = SimpleNamespace(spec=describe_model(hf_config), named_modules=list)
    monkeypatch.setattr(loading, "locate_model", lambda model, hub: Path(model))
    monkeypatch.setattr(loading, "load_model", lambda *args: model)
    config = EngineConfig(model="m")
    with pytest.raises(ConfigError, match=r"a step of 8192 tokens .* 4000 bytes are in use; lower max_num_batched"):
        loading.load_runner(config, GPU, hf_config, Generate(config, hf_config), 8192)


def test_8_bit_products_are_refused_where_the_gpu_has_none(tiny_model, monkeypatch):
    monkeypatch.setattr(Device, "supports_fp8", False)
    with pytest.raises(ConfigError, match=r"quantization='fp8' needs a GPU .* kv_cache_dtype='fp8'"):
        LLM(str(tiny_model("llama")), quantization="fp8")


def test_the_layers_read_an_8_bit_cache_when_asked(tiny_model):
    with LLM(str(tiny_model("llama")), kv_cache_dtype="fp8", dtype="float32", max_num_seqs=2) as llm:
        (k_cache, _), *_ = llm.llm_engine.executor._runner.kv_cache
        assert k_cache.dtype == torch.float8_e4m3fn
        assert len(llm.generate([[5, 6, 7]], use_tqdm=False)[0].outputs[0].token_ids) > 0


def resident_bytes() -> int:
    """Returns the memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_cache_takes_no_memory_before_it_is_written():
    pieces = [np.empty(100_000, dtype=np.uint8) for _ in range(3000)]
    last = np.empty(100_000, dtype=np.uint8)  # Keeps the heap as long as it is.
    del pieces  # The heap has a free piece of 300 MB now, which calloc would take and clear.
    before = resident_bytes()
    layers = allocate_kv_cache(CacheShape(4, 8, 128), 4096, 16, dtype=torch.bfloat16, device=CPU)
    assert sum(cache.nbytes for layer in layers for cache in layer) == 1 << 30
    assert resident_bytes() - before < 1 << 26
    assert not layers[3][1][-1].any()
    assert last.nbytes == 100_000

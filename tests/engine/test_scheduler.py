"""Scheduler and block pool, proved by rules: whatever is added, aborted, preempted or exhausted, nothing is lost."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millrace.engine.errors import RequestError
from millrace.engine.kv_cache.groups import LayerCache, max_held_blocks
from millrace.engine.kv_cache.manager import FULL_ATTENTION, KVCacheManager
from millrace.engine.lora.adapter import Adapter
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.scheduler import Scheduler
from millrace.engine.sequence import Sequence
from millrace.engine.step.head import HostLogprobs, StepResult
from millrace.engine.step_plan import StepPlan
from millrace.engine.tasks.generate_outputs import CompletionBuilder

EOS = 7


def make_request(name: str, prompt: list[int], max_tokens: int, priority: int = 0, min_tokens: int = 0) -> Sequence:
    return Sequence(
        request_id=name,
        index=0,
        params=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens),
        seed=0,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        max_tokens_total=len(prompt) + max_tokens,
        stop_token_ids={EOS: None},
        priority=priority,
    )


def next_token(sequence: Sequence, position: int) -> int:
    """What the model of these tests generates: it depends on the sequence and the position, as a real draw does."""
    return (len(sequence.request_id) * 31 + int(sequence.request_id) * 17 + position * 13) % 50


def expected_output(sequence: Sequence) -> list[int]:
    output: list[int] = []
    while sequence.num_prompt_tokens + len(output) < sequence.max_tokens_total:
        output.append(next_token(sequence, sequence.num_prompt_tokens + len(output)))
        if output[-1] == EOS and len(output) >= sequence.params.min_tokens:
            break
    return output


def name_of(sequence: Sequence) -> bytes:
    """Returns what tells the keys and values of one adapter from those of others."""
    return b"" if sequence.adapter is None else sequence.adapter.digest


def set_adapter(sequence: Sequence, index: int) -> None:
    """Gives a sequence an adapter as `AdapterLibrary` does."""
    sequence.adapter = Adapter(str(index), bytes([index] * 16), {}, 0)
    sequence.cache_salt = sequence.adapter.digest


class FakeGrammar:
    """Stands for a grammar: it must be told every token of its sequence once and in order."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.position = sequence.num_prompt_tokens

    def accept(self, token_id: int) -> None:
        assert token_id == next_token(self.sequence, self.position)
        self.position += 1


class FakeDevice:
    """Keeps, for every slot of the KV cache, the group that wrote to it, and the adapter and the tokens of its content.

    It also keeps the adapter in each adapter slot, and checks that every sequence finds its own there.
    """

    def __init__(self, block_size: int, caches: Sequence[LayerCache] = FULL_ATTENTION) -> None:
        self.block_size = block_size
        self.caches = caches
        self.slots: dict[int, tuple[int | bytes, ...]] = {}
        self.adapters: dict[int, bytes] = {}
        self.writes: dict[int, set[int]] = {}
        self.block_tables: dict[tuple[int, int], list[int]] = {}

    def tokens(self, sequence: Sequence, length: int) -> tuple[int, ...]:
        known = sequence.token_ids[:length]
        return tuple(known + [next_token(sequence, p) for p in range(len(known), length)])

    def slot(self, group: int, row: int, position: int) -> int:
        block = self.block_tables[group, row][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def check_adapters(self, plan: StepPlan) -> None:
        for new in plan.new_adapters:
            self.adapters[new.slot] = new.adapter.digest
        for sequence in plan.sequences:
            found = self.adapters.get(sequence.adapter_slot)
            wanted = None if sequence.adapter is None else sequence.adapter.digest
            assert found == wanted, "a sequence runs with another adapter than its own"

    def run(self, plan: StepPlan) -> list[int]:
        self.check_adapters(plan)
        groups = range(len(self.caches))
        self.block_tables.update({(group, new.row): [] for new in plan.new_rows for group in groups})
        for group, row, first, blocks in plan.new_blocks:
            assert len(self.block_tables[group, row]) == first, "a block table is appended to out of order"
            self.block_tables[group, row] += blocks
        self.writes[id(plan)] = set()
        for group in groups:
            self.store(plan, group)
        # All keys and values are stored before any are read, as in each layer of the model.
        for group in groups:
            self.attend(plan, group)
        ends = [s + c for s, c in zip(plan.starts, plan.counts, strict=True)]
        return [
            next_token(sequence, end)
            for sequence, end, samples in zip(plan.sequences, ends, plan.samples, strict=True)
            if samples
        ]

    def store(self, plan: StepPlan, group: int) -> None:
        written = self.writes[id(plan)]
        for sequence, row, start, count in zip(plan.sequences, plan.rows, plan.starts, plan.counts, strict=True):
            for position in range(start, start + count):
                slot = self.slot(group, row, position)
                assert slot not in written, "two tokens of one step share a slot"
                written.add(slot)
                self.slots[slot] = (group, name_of(sequence), *self.tokens(sequence, position + 1))

    def attend(self, plan: StepPlan, group: int) -> None:
        window = self.caches[group].window
        for sequence, row, start, count in zip(plan.sequences, plan.rows, plan.starts, plan.counts, strict=True):
            for position in range(max(0, start - window + 1) if window else 0, start + count):
                expected = (group, name_of(sequence), *self.tokens(sequence, position + 1))
                assert self.slots[self.slot(group, row, position)] == expected, "a cached token has another history"

    def run_several(self, plan: StepPlan, may_draw_several: Callable[[Sequence], bool]) -> tuple[list[int], list[int]]:
        """Runs a step in which some sequences draw up to three tokens, and returns the tokens and how many each has."""
        self.run(plan)
        ends = [s + c for s, c, samples in zip(plan.starts, plan.counts, plan.samples, strict=True) if samples]
        drawing = list(zip(plan.sampled, ends, strict=True))
        num_drawn = [1 + end % 3 if may_draw_several(sequence) else 1 for sequence, end in drawing]
        drawn = [
            next_token(sequence, end + i)
            for (sequence, end), count in zip(drawing, num_drawn, strict=True)
            for i in range(count)
        ]
        return drawn, num_drawn

    def spoil(self, plan: StepPlan) -> None:
        """Makes a step that ran one that failed: whatever it wrote is garbage."""
        self.slots.update(dict.fromkeys(self.writes[id(plan)], ()))
        self.adapters.update({new.slot: b"garbage" for new in plan.new_adapters})


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, aborts and fails sequences in any order, with steps planned ahead."""

    @initialize(
        num_blocks=st.integers(8, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 16),
        depth=st.sampled_from([0, 1]),
        num_pp_stages=st.integers(1, 3),
        caching=st.booleans(),
        windows=st.sampled_from([(0,), (3,), (0, 1), (5, 0), (0, 2, 2), (0, 0, 6), (1, 4)]),
        draws_several=st.booleans(),
        num_adapter_slots=st.integers(0, 3),
    )
    def start(self, num_blocks, block_size, max_num_seqs, budget, num_pp_stages, caching, windows, **others) -> None:
        depth, num_adapter_slots = others["depth"], others["num_adapter_slots"]
        caches = [LayerCache(window) for window in windows]
        self.room = max(n for n in range(25) if max_held_blocks(caches, n, block_size, budget) <= num_blocks)
        manager = KVCacheManager(num_blocks, block_size, caching, caches)
        self.scheduler = Scheduler(manager, max_num_seqs, budget, num_pp_stages, num_adapter_slots)
        depth = depth if num_pp_stages == 1 else num_pp_stages - 1
        self.device = FakeDevice(block_size, caches)
        self.depth = depth
        self.draws_several = others["draws_several"]
        self.in_flight: deque[tuple[StepPlan, list[int], list[int]]] = deque()
        self.live: dict[str, Sequence] = {}
        self.ended: dict[str, Sequence] = {}
        self.num_made = 0

    @rule(
        data=st.data(),
        prefix=st.integers(0, 2),
        priority=st.integers(0, 1),
        has_grammar=st.booleans(),
        adapter=st.sampled_from([None, 0, 1, 2, 3, 4]),
    )
    def add(self, data, prefix, priority, has_grammar, adapter) -> None:
        length = data.draw(st.integers(1, self.room - 1), label="prompt length")
        max_tokens = data.draw(st.integers(1, min(12, self.room - length)), label="max_tokens")
        min_tokens = data.draw(st.integers(0, max_tokens), label="min_tokens")
        prompt = [(prefix * 100 + i) % 50 for i in range(length)]
        sequence = make_request(str(self.num_made), prompt, max_tokens, priority, min_tokens)
        sequence.grammar = FakeGrammar(sequence) if has_grammar else None
        if adapter is not None and self.scheduler.num_adapter_slots:
            set_adapter(sequence, adapter)
        self.num_made += 1
        self.live[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)), label="sequence")
        sequence = self.live.pop(name)
        self.scheduler.abort(sequence)
        assert sequence.finish_reason == "abort" and not sequence.block_ids

    @rule()
    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.check_plan(plan)
            self.in_flight.append((plan, *self.device.run_several(plan, self.may_draw_several)))
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.end(self.scheduler.update(*self.in_flight.popleft()))

    @precondition(lambda self: self.in_flight)
    @rule()
    def fail_steps(self) -> None:
        plans = [plan for plan, _, _ in self.in_flight]
        self.in_flight.clear()
        for plan in plans:
            self.device.spoil(plan)
        for sequence in self.scheduler.recover(plans, RequestError("Boom", "the step failed", True)):
            assert sequence.error is not None
            del self.live[sequence.request_id]

    def may_draw_several(self, sequence: Sequence) -> bool:
        """Returns whether steps may draw several tokens of a sequence: each is read before the next one is planned."""
        is_read = self.depth == 0 or self.scheduler.num_pp_stages > 1 or sequence.grammar is not None
        return self.draws_several and is_read

    def end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            assert sequence.output_token_ids == expected_output(sequence)
            self.ended[sequence.request_id] = self.live.pop(sequence.request_id)

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(plan.sequences) <= self.scheduler.max_num_seqs
        assert len(set(plan.rows)) == len(plan.rows)
        assert len({sequence.is_suspect for sequence in plan.sequences}) == 1, "a suspect runs with others"
        assert not plan.sequences[0].is_suspect or len(plan.sequences) == 1
        for sequence, start, count in zip(plan.sequences, plan.starts, plan.counts, strict=True):
            assert start + count <= sequence.max_tokens_total
            must_be_known = self.scheduler.num_pp_stages > 1 or sequence.grammar is not None
            assert not must_be_known or start + count <= len(sequence.token_ids), "a token is not known yet"

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            self.check_blocks()
            names = {sequence.request_id for sequence in self.scheduler.running}
            assert names <= self.live.keys()
            assert len(names) + self.scheduler.num_waiting == len(self.live)

    def check_blocks(self) -> None:
        """Checks that no sequence holds more blocks than admission and capacity count on."""
        kv_cache, budget = self.scheduler.kv_cache, self.scheduler.max_num_batched_tokens
        for sequence in self.scheduler.running:
            for cache, blocks in zip(kv_cache.caches, kv_cache.held_blocks(sequence), strict=True):
                assert len(blocks) <= cache.max_blocks(sequence.num_tokens, kv_cache.block_size, budget)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not (self.scheduler.num_unfinished or self.in_flight):
                break
            self.step()
            self.is_sound()
        assert not self.live, "a sequence never ends"
        assert self.scheduler.kv_cache.pool.num_used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def run_all(scheduler: Scheduler, device: FakeDevice) -> None:
    while (plan := scheduler.schedule()) is not None:
        scheduler.update(plan, device.run(plan))
        scheduler.check_integrity()


def test_decodes_and_prompt_chunks_share_one_budget():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=4, max_num_batched_tokens=8)
    device = FakeDevice(4)
    scheduler.add(make_request("0", [1] * 3, 9))
    plan = scheduler.schedule()
    scheduler.update(plan, device.run(plan))
    scheduler.add(make_request("1", [2] * 20, 4))
    plan = scheduler.schedule()
    assert (plan.counts, plan.samples) == ([1, 7], [True, False])
    scheduler.update(plan, device.run(plan))
    run_all(scheduler, device)
    assert scheduler.counters.num_chunked_prefills >= 2


def test_sequences_without_a_slot_hold_up_no_others_and_few_adapters_are_uploaded():
    scheduler = Scheduler(KVCacheManager(2000, 4), max_num_seqs=64, max_num_batched_tokens=1024, num_adapter_slots=4)
    device, random = FakeDevice(4), np.random.default_rng(1)
    adapters = random.permutation([index for index in range(64) for _ in range(8)])
    for number, index in enumerate(adapters):
        sequence = make_request(str(number), [1, 2, 3, 4, 5, 6, 7, 8], 5)
        set_adapter(sequence, int(index))
        scheduler.add(sequence)
    plain = make_request("9999", [3] * 4, 3)
    scheduler.add(plain)
    plan = scheduler.schedule()
    assert plain in plan.sequences
    scheduler.update(plan, device.run(plan))
    run_all(scheduler, device)
    assert scheduler.num_unfinished == 0
    assert scheduler.adapter_slots.num_uploads <= 1.5 * 64  # In the order of arrival they would be nearly 512.


def test_an_adapter_is_not_passed_over_for_ever(monkeypatch):
    monkeypatch.setattr("millrace.engine.scheduler.MAX_OVERTAKING", 6)
    scheduler = Scheduler(KVCacheManager(2000, 4), max_num_seqs=2, max_num_batched_tokens=64, num_adapter_slots=1)
    device, first = FakeDevice(4), make_request("5000", [1] * 4, 2)
    set_adapter(first, 1)
    for step in range(60):
        if step % 2 == 0:  # Each takes four steps, so that one of two runs at any time, and the slot is never left.
            another = make_request(str(step), [2] * 4, 4, min_tokens=4)
            set_adapter(another, 0)
            scheduler.add(another)
        if step == 3:
            scheduler.add(first)
        plan = scheduler.schedule()
        scheduler.update(plan, device.run(plan))
        scheduler.check_integrity()
    assert first.is_finished


def test_a_sequence_that_is_aborted_is_set_aside_no_longer():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=8, max_num_batched_tokens=64, num_adapter_slots=1)
    device, sequences = FakeDevice(4), [make_request(str(i), [i] * 4, 6, min_tokens=6) for i in range(5)]
    for sequence, adapter in zip(sequences, (0, 1, 1, 2, 0), strict=True):
        set_adapter(sequence, adapter)
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan.sequences == [sequences[0], sequences[4]]
    scheduler.update(plan, device.run(plan))
    for sequence in sequences[1:3]:
        scheduler.abort(sequence)
        scheduler.check_integrity()
    assert list(scheduler._set_aside.values()) == [{sequences[3]: None}] and scheduler.num_waiting == 1
    scheduler.abort(sequences[3])
    assert not scheduler._set_aside and scheduler._num_overtaking == 0
    run_all(scheduler, device)
    assert scheduler.num_unfinished == 0 and scheduler.adapter_slots.num_uploads == 1


def test_sequences_enter_in_the_order_in_which_they_were_numbered():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=1, max_num_batched_tokens=64)
    early, late = make_request("0", [1] * 4, 2), make_request("1", [2] * 4, 2)
    scheduler.number(early)
    scheduler.add(late)
    scheduler.add_numbered(early)
    assert scheduler.schedule().sequences == [early]


def test_equal_prompts_of_one_step_compute_their_prefix_once():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    device = FakeDevice(4)
    for i in range(3):
        scheduler.add(make_request(str(i), list(range(10)), 3))
    plan = scheduler.schedule()
    assert plan.counts == [10, 2, 2]
    scheduler.update(plan, device.run(plan))
    assert scheduler.counters.num_cached_tokens == 16
    run_all(scheduler, device)


def test_the_last_served_is_preempted_and_finds_its_tokens_in_the_cache_again():
    scheduler = Scheduler(KVCacheManager(6, 2), max_num_seqs=2, max_num_batched_tokens=100)
    device = FakeDevice(2)
    first, second = make_request("0", [1] * 4, 6), make_request("1", [2] * 4, 6)
    scheduler.add(first)
    scheduler.add(second)
    run_all(scheduler, device)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert first.output_token_ids == expected_output(first)
    assert second.output_token_ids == expected_output(second)


def test_several_tokens_of_a_step_are_taken_up_to_the_one_that_ends_the_sequence():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    stopped, long, plain = (make_request(str(i), [i] * 5, 3) for i in range(3))
    for sequence in (stopped, long, plain):
        scheduler.add(sequence)
    ended = scheduler.update(scheduler.schedule(), [8, EOS, 9, 8, 9, 10, 11, 8], [3, 4, 1])
    assert ended == [stopped, long]
    assert (stopped.output_token_ids, stopped.finish_reason) == ([8, EOS], "stop")
    assert (long.output_token_ids, long.finish_reason) == ([8, 9, 10], "length")
    assert (scheduler.counters.num_output_tokens, scheduler.counters.num_wasted_tokens) == (6, 2)
    assert plain.num_pending == 0 and scheduler.schedule().sequences == [plain]


def test_each_token_of_a_step_has_its_log_probabilities_up_to_the_end():
    scheduler, builder = Scheduler(KVCacheManager(100, 4), 8, 100), CompletionBuilder(None)
    params = SamplingParams(max_tokens=3, logprobs=0)
    sequences = [dataclasses.replace(make_request(str(i), [i] * 5, 3), params=params) for i in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    drawn = [8, EOS, 9, 10]
    scores = HostLogprobs(np.arange(4.0)[:, None], np.array(drawn)[:, None], np.ones(4, dtype=np.int64))
    plan, result = scheduler.schedule(), StepResult(drawn, scores, num_drawn=[3, 1])
    builder.record_logprobs(plan, result)
    assert scheduler.update(plan, result.drawn, result.num_drawn) == sequences[:1]
    (completion,) = builder.build(GenerateRequest("0", None, [1] * 5, params), sequences[:1]).outputs
    assert [{token_id: one.logprob for token_id, one in entry.items()} for entry in completion.logprobs] == [
        {8: 0.0},
        {EOS: 1.0},
    ]
    assert (completion.cumulative_logprob, len(sequences[1].logprobs)) == (1.0, 1)


def test_priority_enters_first_and_is_preempted_last():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=1, max_num_batched_tokens=100)
    scheduler.add(make_request("0", [1] * 4, 2, priority=1))
    scheduler.add(make_request("1", [1] * 4, 2, priority=0))
    assert [sequence.request_id for sequence in scheduler.schedule().sequences] == ["1"]


def test_at_most_one_token_is_wasted_when_a_step_is_planned_ahead():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    device = FakeDevice(4)
    sequences = [make_request(str(i), [i] * 5, 12) for i in range(8)]
    for sequence in sequences:
        scheduler.add(sequence)
    in_flight: deque = deque()
    while scheduler.num_unfinished or in_flight:
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append((plan, device.run(plan)))
        if plan is None or len(in_flight) > 1:
            scheduler.update(*in_flight.popleft())
        scheduler.check_integrity()
    assert [sequence.output_token_ids for sequence in sequences] == [
        expected_output(sequence) for sequence in sequences
    ]
    num_stopped = sum(sequence.finish_reason == "stop" for sequence in sequences)
    assert num_stopped > 0 and scheduler.counters.num_wasted_tokens <= num_stopped


def test_a_request_that_makes_every_step_fail_ends_alone():
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    device = FakeDevice(4)
    sequences = [make_request(str(i), [i] * 5, 6) for i in range(6)]
    poison = sequences[3]
    for sequence in sequences:
        scheduler.add(sequence)
    while (plan := scheduler.schedule()) is not None:
        if poison in plan.sequences:
            scheduler.recover([plan], RequestError("Boom", "the step failed", True))
        else:
            scheduler.update(plan, device.run(plan))
        scheduler.check_integrity()
    assert poison.error is not None and poison.finish_reason == "error"
    for sequence in sequences:
        if sequence is not poison:
            assert sequence.error is None and sequence.output_token_ids == expected_output(sequence)


def test_releasing_a_block_twice_is_found():
    kv_cache = KVCacheManager(4, 2)
    sequence = make_request("0", [1, 2, 3], 2)
    assert kv_cache.try_admit(sequence, 8) and kv_cache.try_extend(sequence, 3)
    kv_cache.pool.release(sequence.block_ids[0])
    with pytest.raises(AssertionError):
        kv_cache.pool.check_integrity(sequence.block_ids)
    with pytest.raises(AssertionError, match="released more often"):
        kv_cache.pool.release(sequence.block_ids[0])


def test_stages_share_the_requests_out() -> None:
    scheduler = Scheduler(KVCacheManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100, num_pp_stages=2)
    for i in range(5):
        scheduler.add(make_request(str(i), [1, 2, 3], 4))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [len(plan.sequences) for plan in (first, second)] == [3, 2]
    assert scheduler.schedule() is None, "all wait for their tokens"
    scheduler.update(first, [8, 8, 8])
    third = scheduler.schedule()
    assert third.sequences == first.sequences and third.counts == [1, 1, 1]

"""`Scheduler`: decides which tokens each step computes. Prefill and decode are not separate phases.

`num_computed_tokens` of a sequence grows towards `num_tokens`: a step computes one token of a sequence that decodes,
and a chunk of tokens of a sequence whose prompt is not computed yet. Running sequences are planned first. Waiting
sequences follow while the token budget, the rows of the tables and the KV cache blocks suffice. When the blocks run
out, the last of the running sequences is preempted: its blocks are released and it waits again. Its tokens are kept,
and the prefix cache often still holds their keys and values.

The scheduler uses no tensors. It can plan step N + 1 while step N runs, because it counts drawn tokens before they are
read. A sequence that follows a grammar is left out of such a step, because its token mask depends on the unread token.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import RequestError
from .kv_cache.manager import KVCacheManager
from .kv_cache.shared_prefix import SharedPrefix
from .lora.routing import NO_SLOT
from .lora.slot_table import SlotTable
from .lora.slots import NewAdapter
from .sequence import Sequence, SequenceStatus
from .step_plan import NewRow, StepPlan

MAX_OVERTAKING = 1024
"""Most sequences of resident adapters that are admitted before the adapter that was set aside first gets a slot."""


@dataclass(slots=True)
class SchedulerCounters:
    """Counts of steps, tokens and preemptions since the scheduler was made.

    Attributes:
        num_steps: Steps planned.
        num_scheduled_tokens: Tokens planned to be computed, recomputed ones included.
        num_preemptions: Preemptions.
        num_chunked_prefills: Times that a step computed only a part of the uncomputed tokens of a sequence.
        num_prompt_tokens: Prompt tokens of all admitted sequences.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        num_output_tokens: Output tokens of all sequences.
        num_wasted_tokens: Tokens drawn for sequences that had already ended.
    """

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0
    num_chunked_prefills: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_wasted_tokens: int = 0


class Scheduler:
    """Keeps the waiting and the running sequences, and plans steps for them.

    Args:
        kv_cache: Manager that allocates the KV cache blocks of the sequences.
        max_num_seqs: Most running sequences; also the number of rows of the runner's tables.
        max_num_batched_tokens: Most tokens of one step.
        num_pp_stages: Number of pp stages. With several, as many steps are in flight at once, and each step takes its
            share of the sequences that have no unread token.
        num_adapter_slots: Number of adapter slots on the device (`max_loras`).
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_pp_stages: int = 1,
        num_adapter_slots: int = 0,
    ) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_pp_stages = num_pp_stages
        self.counters = SchedulerCounters()
        self.running: list[Sequence] = []
        """The running sequences, sorted by priority and arrival. The last is preempted first."""
        # A heap. A sequence that ends while it waits stays in the heap until it comes first, because a removal from the
        # middle would cost a search.
        self._waiting: list[Sequence] = []
        self._num_waiting = 0
        self._free_rows: list[int] = []
        self._num_arrived = 0
        self.num_adapter_slots = num_adapter_slots
        self._shared_prefix = SharedPrefix(kv_cache.block_size, kv_cache.only_full_group)
        self.reset()

    @property
    def num_waiting(self) -> int:
        """Number of unfinished sequences that wait; they hold no blocks."""
        return self._num_waiting

    @property
    def num_unfinished(self) -> int:
        """Number of sequences that run or wait."""
        return len(self.running) + self._num_waiting

    def add(self, sequence: Sequence) -> None:
        """Adds a new sequence to the waiting sequences."""
        self.number(sequence)
        self.add_numbered(sequence)

    def number(self, sequence: Sequence) -> None:
        """Gives a new sequence its place in the order of arrival, although it is added later."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1

    def add_numbered(self, sequence: Sequence) -> None:
        """Adds a sequence that has its place in the order of arrival to the waiting sequences."""
        self._enqueue(sequence)

    def schedule(self) -> StepPlan | None:
        """Plans the next step.

        Returns:
            The plan; None if no token can be computed before the results of a step in flight are read.
        """
        plan = StepPlan()
        if not self._schedule_suspect(plan):
            num_preemptions = self.counters.num_preemptions
            budget = self._schedule_running(plan, self._ready(), self.max_num_batched_tokens)
            # After a preemption the free blocks are too few, so no waiting sequence is admitted in this step.
            if self._num_waiting and self.counters.num_preemptions == num_preemptions:
                self._schedule_waiting(plan, budget)
        if not plan.sequences:
            return None
        plan.put_decodes_first()
        plan.num_shared_blocks = self._shared_prefix.find(plan.sequences[: plan.num_decodes], bool(plan.new_rows))
        self.counters.num_steps += 1
        self.counters.num_scheduled_tokens += plan.num_tokens
        return plan

    def schedule_alone(self, sequence: Sequence) -> StepPlan | None:
        """Plans a step of one new sequence ahead of all others; `abort` must remove the sequence after that step.

        Args:
            sequence: A sequence that was never added.

        Returns:
            The plan; None if no row or too few blocks are free.
        """
        if not self._free_rows or not self.kv_cache.try_admit(sequence, self.max_num_batched_tokens):
            return None
        plan = StepPlan()
        self._enter(plan, sequence, self.max_num_batched_tokens)
        plan.put_decodes_first()
        return plan

    def _schedule_suspect(self, plan: StepPlan) -> bool:
        """Plans one suspect as the whole step, if possible. Returns False if no suspect runs and none was admitted."""
        budget = self.max_num_batched_tokens
        if suspects := [sequence for sequence in self.running if sequence.is_suspect]:
            known = [one for one in suspects if self.num_pp_stages == 1 or not one.num_pending]
            self._schedule_running(plan, known[:1], budget)
        elif (first := self._first_waiting()) is not None and first.is_suspect:
            self._schedule_waiting(plan, budget, max_num_new=1)
        return bool(suspects or plan.sequences)

    def _schedule_running(self, plan: StepPlan, candidates: list[Sequence], budget: int) -> int:
        """Adds candidates to the plan in order until the token budget is used up. Returns the budget that is left."""
        for sequence in list(candidates):
            if sequence.status is not SequenceStatus.RUNNING:
                break  # The sequence and all after it were preempted for an earlier one.
            count = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if count <= 0 or sequence.num_tokens >= sequence.max_tokens_total or sequence.must_be_read:
                # The budget is used up, or the sequence will end by length when its unread token is read, or its next
                # token mask depends on an unread token.
                continue
            if not self._make_room(sequence, sequence.num_computed_tokens + count):
                break
            self._plan_sequence(plan, sequence, count)
            budget -= count
        return budget

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates blocks for `num_tokens` tokens of a running sequence; preempts the last ones if needed.

        Returns:
            Whether the blocks were allocated. False means that the sequence itself was preempted, as the last one.
        """
        while not self.kv_cache.try_extend(sequence, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _schedule_waiting(self, plan: StepPlan, budget: int, max_num_new: int | None = None) -> None:
        """Admits and plans waiting sequences in order while the token budget, the rows and the blocks suffice.

        Args:
            plan: The plan that the sequences are added to.
            budget: Number of tokens that the step can still compute.
            max_num_new: Most sequences to admit, suspects included. None sets no limit, and the first suspect ends
                the admission.
        """
        most = self._max_step_seqs()
        while budget > 0 and self._free_rows and len(plan.new_rows) != max_num_new and len(plan.sequences) < most:
            sequence = self._first_admissible()
            if sequence is None or (sequence.is_suspect and max_num_new is None):
                return
            if self.kv_cache.keeps_nothing and sequence.num_tokens > budget:
                return  # No step may compute a part of it.
            # A preempted sequence with an unread token cannot be admitted: the runner needs all of its tokens.
            if sequence.num_pending or not self.kv_cache.try_admit(sequence, self.max_num_batched_tokens):
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            self._num_overtaking += bool(self._set_aside) and sequence.adapter is not None
            budget -= self._enter(plan, sequence, budget)

    def _ready(self) -> list[Sequence]:
        """Returns the running sequences that the next step may include.

        With several pp stages, the result is a share of the sequences that have no unread token (`_max_step_seqs`).
        """
        known = self.running if self.num_pp_stages == 1 else [one for one in self.running if not one.num_pending]
        return known[: self._max_step_seqs()]

    def _max_step_seqs(self) -> int:
        """Returns the most sequences of a step: the unfinished ones, divided evenly among the pp stages."""
        return -(-min(self.num_unfinished, self.max_num_seqs) // self.num_pp_stages)

    def _enter(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """Plans the first tokens, at most `budget`, of a sequence that was admitted just now. Returns their number."""
        count = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
        has_room = self.kv_cache.try_extend(sequence, sequence.num_computed_tokens + count)
        assert has_room, "try_admit() found room for the whole sequence"
        self._admit(plan, sequence)
        self._plan_sequence(plan, sequence, count)
        return count

    def _admit(self, plan: StepPlan, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.row = self._free_rows.pop()
        insort(self.running, sequence)
        if sequence.adapter is not None:
            sequence.adapter_slot, is_new = self.adapter_slots.take(sequence.adapter)
            if is_new:
                plan.new_adapters.append(NewAdapter(sequence.adapter_slot, sequence.adapter))
        plan.new_rows.append(NewRow(sequence.row, sequence, len(sequence.token_ids)))
        if sequence.num_cached_tokens is None:
            sequence.scheduled_s = time.monotonic()
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self.counters.num_cached_tokens += sequence.num_computed_tokens

    def _plan_sequence(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        start = sequence.num_computed_tokens
        is_sampled = start + count == sequence.num_tokens
        plan.sequences.append(sequence)
        plan.rows.append(sequence.row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.samples.append(is_sampled)
        self._plan_blocks(plan, sequence, start, count)
        sequence.num_computed_tokens = start + count
        if is_sampled:
            sequence.num_pending += 1
        else:
            self.counters.num_chunked_prefills += 1
        plan.published += self.kv_cache.publish(sequence, start + count)

    def _plan_blocks(self, plan: StepPlan, sequence: Sequence, start: int, count: int) -> None:
        """Adds the block ids that the runner lacks: all blocks of a new row, else the blocks that this step begins."""
        is_new = bool(plan.new_rows) and plan.new_rows[-1].sequence is sequence
        first = 0 if is_new else self.kv_cache.num_blocks_for(start)
        if first < self.kv_cache.num_blocks_for(start + count):
            for group, block_ids in enumerate(sequence.block_ids):
                plan.new_blocks.append((group, sequence.row, first, block_ids[first:]))

    def update(
        self, plan: StepPlan, drawn: Iterable[Any], num_drawn: abc.Sequence[int] | None = None
    ) -> list[Sequence]:
        """Hands the results of a step to its sequences. Values for a sequence that has ended are dropped.

        Args:
            plan: The plan of the step.
            drawn: Values for the sequences that sample, in order; each is an argument of `Sequence.take`.
            num_drawn: Number of values of each sequence that samples; None if each has one. A sequence that may draw
                several tokens must be read before the next step computes it.

        Returns:
            The sequences that ended.
        """
        ended = []
        if num_drawn is not None:
            for sequence, count in zip(plan.sampled, num_drawn, strict=True):
                assert count == 1 or sequence.num_pending <= 1, "a later step has counted on one token"
                sequence.num_pending += count - 1
        for sequence, one in zip(plan.owners(num_drawn), drawn, strict=True):
            sequence.num_pending -= 1
            sequence.is_suspect = False
            if sequence.is_finished:
                self.counters.num_wasted_tokens += 1
                continue
            num_tokens = len(sequence.token_ids)
            error = sequence.take(one)
            self.counters.num_output_tokens += len(sequence.token_ids) - num_tokens
            if error is not None:
                self.fail(sequence, error)
            elif sequence.finish_reason is not None:
                self._finish(sequence)
            else:
                continue
            ended.append(sequence)
        return ended

    def recover(self, plans: Iterable[StepPlan], error: RequestError) -> list[Sequence]:
        """Undoes a failed step and the steps after it, so that the sequence that makes it fail can be found.

        If only one sequence took part, it ends with the error. Several sequences become suspects: they wait again, and
        each is run alone until a step with it succeeds.

        Args:
            plans: The plan of the step that failed, and the plans of the steps that were started after it.
            error: The error of the failed step.

        Returns:
            The sequences that ended.
        """
        plans = list(plans)
        for plan in plans:
            self.kv_cache.pool.forget(plan.published)
            for new in plan.new_adapters:
                self.adapter_slots.forget(new.slot)
        involved = {id(sequence): sequence for plan in plans for sequence in plan.sequences if not sequence.is_finished}
        for sequence in involved.values():
            sequence.num_pending = 0
        if len(involved) == 1:
            (culprit,) = involved.values()
            self.fail(culprit, error)
            return [culprit]
        for sequence in involved.values():
            sequence.is_suspect = True
            if sequence.status is SequenceStatus.RUNNING:
                self._leave(sequence)
                self._enqueue(sequence)
        return []

    def fail(self, sequence: Sequence, error: RequestError) -> None:
        """Ends a sequence with an error."""
        sequence.error, sequence.finish_reason = error, "error"
        self._finish(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence whose result is no longer needed; does nothing if it has ended already."""
        if not sequence.is_finished:
            sequence.finish_reason = "abort"
            self._finish(sequence)

    def reset(self) -> None:
        """Removes all sequences and all cached blocks. It works in any state, also after an interrupt."""
        self.kv_cache.reset()
        self.running, self._waiting, self._num_waiting = [], [], 0
        self.adapter_slots = SlotTable(self.num_adapter_slots)
        # The sequences that were set aside, by adapter; a dict without values keeps their order.
        self._set_aside: dict[bytes, dict[Sequence, None]] = {}
        self._num_overtaking = 0
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._enqueue(sequence)
        sequence.num_preemptions += 1
        self.counters.num_preemptions += 1

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        heapq.heappush(self._waiting, sequence)
        self._num_waiting += 1

    def _first_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0].is_finished:
            heapq.heappop(self._waiting)
        return self._waiting[0] if self._waiting else None

    def _first_admissible(self) -> Sequence | None:
        """Returns the first waiting sequence that needs no adapter slot or can have one.

        Sequences before it whose adapters have no slot are set aside, by adapter, so that they hold up no others.
        """
        if self._set_aside and self.adapter_slots.has_idle:
            for returning in self._set_aside.pop(next(iter(self._set_aside))):
                heapq.heappush(self._waiting, returning)
            self._num_overtaking = 0
        while (sequence := self._first_waiting()) is not None and sequence.adapter is not None:
            if self.adapter_slots.can_take(sequence.adapter) and self._may_overtake():
                break
            heapq.heappop(self._waiting)
            self._set_aside.setdefault(sequence.adapter.digest, {})[sequence] = None
        return sequence

    def _may_overtake(self) -> bool:
        """Returns whether a sequence with an adapter may run before those that were set aside.

        The sequences of resident adapters go first, so that few adapters are uploaded. But only so many of them: then
        new ones are set aside too, until a slot is idle and the adapter that has waited the longest gets it.
        """
        return not self._set_aside or self._num_overtaking < MAX_OVERTAKING

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        else:
            self._num_waiting -= 1
            self._drop_aside(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _drop_aside(self, sequence: Sequence) -> None:
        """Drops a sequence that ends from those that were set aside, if it is one of them."""
        digest = b"" if sequence.adapter is None else sequence.adapter.digest
        aside = self._set_aside.get(digest, {})
        aside.pop(sequence, None)
        if digest in self._set_aside and not aside:
            del self._set_aside[digest]
            if not self._set_aside:
                self._num_overtaking = 0

    def _leave(self, sequence: Sequence) -> None:
        """Removes a sequence from the running ones, and frees its row and its blocks."""
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        if sequence.adapter_slot != NO_SLOT:
            self.adapter_slots.leave(sequence.adapter_slot)
            sequence.adapter_slot = NO_SLOT
        self.kv_cache.release(sequence)

    def check_integrity(self) -> None:
        """Checks that every row and every block is either free or belongs to the sequences that count it.

        Raises:
            AssertionError: A row, a block or a sequence is lost, counted twice or over its limit.
        """
        rows = sorted([sequence.row for sequence in self.running] + self._free_rows)
        assert rows == list(range(self.max_num_seqs)), f"rows are lost or doubled: {rows}"
        assert self.running == sorted(self.running), "the running sequences are out of order"
        for sequence in self.running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_computed_tokens <= sequence.num_tokens
            for block_ids in sequence.block_ids:
                num_slots = len(block_ids) * self.kv_cache.block_size
                assert sequence.num_computed_tokens <= num_slots, "a token was computed into a block that nobody holds"
        aside = [sequence for sequences in self._set_aside.values() for sequence in sequences]
        assert all(self._set_aside.values()) and not any(one.is_finished for one in aside), "an ended one is set aside"
        waiting = [sequence for sequence in (*self._waiting, *aside) if not sequence.is_finished]
        assert len(waiting) == self._num_waiting, "the waiting sequences are miscounted"
        for sequence in waiting:
            assert sequence.status is SequenceStatus.WAITING and not sequence.block_ids and sequence.row < 0
        self.adapter_slots.check_integrity([one.adapter_slot for one in self.running if one.adapter is not None])
        held = (blocks for sequence in self.running for blocks in self.kv_cache.held_blocks(sequence))
        self.kv_cache.pool.check_integrity(held)

"""Decides what each step computes: one token budget, no phases.

A request has `num_computed_tokens` out of `num_tokens`; a step brings them closer, by one token for a request that
decodes, by a chunk for one whose prompt is not done. Running requests come first, then waiting ones while budget, rows
and blocks last. When blocks run out, the running request that would be served last gives up its blocks and waits; its
tokens are kept, and recomputing them is often a look-up in the prefix cache.

The scheduler sees no tensors. It plans step N + 1 while step N runs: it counts tokens that are sampled but not read. A
request that follows a grammar sits such a step out, because what it may say depends on the token before.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .kv_cache.manager import KVCacheManager
from .kv_cache.shared_prefix import SharedPrefix
from .request import Request, RequestStatus

if TYPE_CHECKING:
    from .token_masks import TokenMasks


@dataclass(slots=True)
class NewRow:
    """A request that enters a row of the runner's tables.

    Attributes:
        row: The row; whatever it held before is over.
        request: The request; the runner reads its tokens and its parameters, and changes nothing.
        num_tokens: Known tokens.
    """

    row: int
    request: Request
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """What one step computes; entry i of every list belongs to sequence i of the batch.

    Attributes:
        requests: Whose sequences they are.
        rows: Their rows in the runner's tables.
        starts: First position to compute.
        counts: Number of positions to compute.
        samples: Whether the last of them yields a new token.
        new_rows: Rows to fill before the step.
        new_blocks: (row, index of the first, block ids) to append to block tables before the step.
        new_tokens: (row, first position, token ids) to enter before the step, where not every stage draws the tokens.
        token_masks: Of the sequences that sample, those that follow a grammar, and what it allows them.
        published: Blocks that others may find from now on, though this step is what fills them.
        num_decodes: This many sequences at the front compute one token each; all others compute more.
        num_shared_blocks: This many leading blocks those at the front have in common, if it pays to know.
    """

    requests: list[Request] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    new_tokens: list[tuple[int, int, list[int]]] = field(default_factory=list)
    token_masks: TokenMasks | None = None
    published: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_shared_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.counts)

    def put_decodes_first(self) -> None:
        """Orders the sequences: those that compute one token, then the others, as attention wants them."""
        self.num_decodes = self.counts.count(1)
        if self.counts[: self.num_decodes].count(1) < self.num_decodes:
            order = sorted(range(len(self.counts)), key=lambda i: self.counts[i] > 1)
            for name in ("requests", "rows", "starts", "counts", "samples"):
                values = getattr(self, name)
                setattr(self, name, [values[i] for i in order])


@dataclass(slots=True)
class SchedulerCounters:
    """What happened since the scheduler was made."""

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0
    num_chunked_prefills: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_wasted_tokens: int = 0


class Scheduler:
    """Holds the waiting and the running requests.

    Args:
        kv_cache: Gives out blocks.
        max_num_seqs: Most running requests; also the number of rows of the runner's tables.
        max_num_batched_tokens: Most tokens of one step.
        num_stages: Steps under way at once. Of several, each takes a share of the requests whose tokens are all known.
    """

    def __init__(
        self, kv_cache: KVCacheManager, max_num_seqs: int, max_num_batched_tokens: int, num_stages: int = 1
    ) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_stages = num_stages
        self.counters = SchedulerCounters()
        self.running: list[Request] = []
        """In order of service: the last is preempted first."""
        # A heap. A request that ends while it waits stays in it until its turn: taking it out would cost a search.
        self._waiting: list[Request] = []
        self._num_waiting = 0
        self._free_rows: list[int] = []
        self._num_arrived = 0
        self._shared_prefix = SharedPrefix(kv_cache.block_size)
        self.reset()

    @property
    def num_waiting(self) -> int:
        """Number of requests that hold no blocks."""
        return self._num_waiting

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.running or self._num_waiting)

    def add(self, request: Request) -> None:
        """Takes a new request."""
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._enqueue(request)

    def schedule(self) -> StepPlan | None:
        """Plans the next step.

        Returns:
            The plan; None if there is nothing that could be computed before a step in flight is read.
        """
        plan = StepPlan()
        if not self._schedule_suspect(plan):
            num_preemptions = self.counters.num_preemptions
            budget = self._schedule_running(plan, self._ready(), self.max_num_batched_tokens)
            # A preemption means that blocks are short: nobody new enters in the same step.
            if self.counters.num_preemptions == num_preemptions:
                self._schedule_waiting(plan, budget)
        if not plan.requests:
            return None
        plan.put_decodes_first()
        plan.num_shared_blocks = self._shared_prefix.find(plan.requests[: plan.num_decodes], bool(plan.new_rows))
        self.counters.num_steps += 1
        self.counters.num_scheduled_tokens += plan.num_tokens
        return plan

    def _schedule_suspect(self, plan: StepPlan) -> bool:
        """Plans one suspect alone, if there is any that can run; everybody else pauses for the step."""
        budget = self.max_num_batched_tokens
        if suspects := [request for request in self.running if request.is_suspect]:
            known = [r for r in suspects if self.num_stages == 1 or not r.num_pending]
            self._schedule_running(plan, known[:1], budget)
        elif (first := self._first_waiting()) is not None and first.is_suspect:
            self._schedule_waiting(plan, budget, max_num_new=1)
        return bool(suspects or plan.requests)

    def _schedule_running(self, plan: StepPlan, candidates: list[Request], budget: int) -> int:
        """Plans running requests in order of service and returns the budget that is left."""
        for request in list(candidates):
            if request.status is not RequestStatus.RUNNING:
                break  # It was preempted for one before it, and so were all behind it.
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            if count <= 0 or request.num_tokens >= request.max_tokens_total or request.must_be_read:
                continue  # Out of budget, certain to end by length once the step in flight is read, or to be read.
            if not self._make_room(request, request.num_computed_tokens + count):
                break
            self._plan_request(plan, request, count)
            budget -= count
        return budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Finds blocks for a running request, preempting from the end of the line, itself last."""
        while not self.kv_cache.try_extend(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, plan: StepPlan, budget: int, max_num_new: int | None = None) -> None:
        """Admits waiting requests, the first in line first, while budget, rows and blocks last."""
        most = self._max_step_seqs()
        while budget > 0 and self._free_rows and len(plan.new_rows) != max_num_new and len(plan.requests) < most:
            request = self._first_waiting()
            if request is None or (request.is_suspect and max_num_new is None):
                return
            # A preempted request whose last token is not read yet: its tokens are not all known.
            if request.num_pending or not self.kv_cache.try_admit(request):
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            has_room = self.kv_cache.try_extend(request, request.num_computed_tokens + count)
            assert has_room, "try_admit() found room for the whole request"
            self._admit(plan, request)
            self._plan_request(plan, request, count)
            budget -= count

    def _ready(self) -> list[Request]:
        """Returns the running requests that a step may take."""
        known = self.running if self.num_stages == 1 else [r for r in self.running if not r.num_pending]
        return known[: self._max_step_seqs()]

    def _max_step_seqs(self) -> int:
        """Returns how many sequences a step may have, so that those under way at once have about the same."""
        return -(-min(len(self.running) + self._num_waiting, self.max_num_seqs) // self.num_stages)

    def _admit(self, plan: StepPlan, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        request.row = self._free_rows.pop()
        insort(self.running, request)
        plan.new_rows.append(NewRow(request.row, request, len(request.token_ids)))
        if request.num_cached_tokens is None:
            request.scheduled_s = time.monotonic()
            request.num_cached_tokens = request.num_computed_tokens
            self.counters.num_prompt_tokens += request.num_prompt_tokens
            self.counters.num_cached_tokens += request.num_computed_tokens

    def _plan_request(self, plan: StepPlan, request: Request, count: int) -> None:
        start = request.num_computed_tokens
        is_sampled = start + count == request.num_tokens
        plan.requests.append(request)
        plan.rows.append(request.row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.samples.append(is_sampled)
        self._plan_blocks(plan, request, start, count)
        request.num_computed_tokens = start + count
        if is_sampled:
            request.num_pending += 1
        else:
            self.counters.num_chunked_prefills += 1
        plan.published += self.kv_cache.publish(request, start + count)

    def _plan_blocks(self, plan: StepPlan, request: Request, start: int, count: int) -> None:
        """Sends the blocks the runner does not know yet: all of them for a new row, else those this step begins."""
        is_new = bool(plan.new_rows) and plan.new_rows[-1].request is request
        first = 0 if is_new else self.kv_cache.num_blocks_for(start)
        if first < self.kv_cache.num_blocks_for(start + count):
            plan.new_blocks.append((request.row, first, request.block_ids[first:]))

    def update(self, plan: StepPlan, drawn: Iterable[Any]) -> list[Request]:
        """Takes what a step gave.

        Args:
            plan: The step.
            drawn: One for each sequence that samples, in order, as `Request.take` takes it: tokens, or vectors.

        Returns:
            Requests that ended.
        """
        ended = []
        sampled = [request for request, samples in zip(plan.requests, plan.samples, strict=True) if samples]
        for request, one in zip(sampled, drawn, strict=True):
            request.num_pending -= 1
            request.is_suspect = False
            if request.is_finished:
                self.counters.num_wasted_tokens += 1
                continue
            self.counters.num_output_tokens += request.pooling is None
            if (error := request.take(one)) is not None:
                self.fail(request, error)
            elif request.finish_reason is not None:
                self._finish(request)
            else:
                continue
            ended.append(request)
        return ended

    def recover(self, plans: Iterable[StepPlan], error: RequestError) -> list[Request]:
        """Puts the requests of failed steps back, to find out which of them makes the step fail.

        A request that failed alone is the culprit and ends. Several wait again and are then run one at a time until
        each has passed a step.

        Args:
            plans: The step that failed and those planned after it.
            error: What it raised.

        Returns:
            Requests that ended.
        """
        plans = list(plans)
        for plan in plans:
            self.kv_cache.pool.forget(plan.published)
        involved = {id(request): request for plan in plans for request in plan.requests if not request.is_finished}
        for request in involved.values():
            request.num_pending = 0
        if len(involved) == 1:
            (culprit,) = involved.values()
            self.fail(culprit, error)
            return [culprit]
        for request in involved.values():
            request.is_suspect = True
            if request.status is RequestStatus.RUNNING:
                self._leave(request)
                self._enqueue(request)
        return []

    def fail(self, request: Request, error: RequestError) -> None:
        """Ends a request with an error."""
        request.error, request.finish_reason = error, "error"
        self._finish(request)

    def abort(self, request: Request) -> None:
        """Ends a request that nobody waits for any more."""
        if not request.is_finished:
            request.finish_reason = "abort"
            self._finish(request)

    def reset(self) -> None:
        """Drops all requests and forgets all cached content, whatever state they are in."""
        self.kv_cache.reset()
        self.running, self._waiting, self._num_waiting = [], [], 0
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._enqueue(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        heapq.heappush(self._waiting, request)
        self._num_waiting += 1

    def _first_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0].is_finished:
            heapq.heappop(self._waiting)
        return self._waiting[0] if self._waiting else None

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        else:
            self._num_waiting -= 1
        request.status = RequestStatus.FINISHED

    def _leave(self, request: Request) -> None:
        """Takes a running request's place, row and blocks."""
        self.running.remove(request)
        self._free_rows.append(request.row)
        request.row = -1
        self.kv_cache.release(request)

    def check_integrity(self) -> None:
        """Checks that rows, blocks and places are conserved.

        Raises:
            AssertionError: Something is lost, doubled or over its limit.
        """
        rows = sorted([request.row for request in self.running] + self._free_rows)
        assert rows == list(range(self.max_num_seqs)), f"rows are lost or doubled: {rows}"
        assert self.running == sorted(self.running), "the running requests are out of order"
        for request in self.running:
            assert request.status is RequestStatus.RUNNING
            assert request.num_computed_tokens <= request.num_tokens
            num_held = len(request.block_ids) * self.kv_cache.block_size
            assert request.num_computed_tokens <= num_held, "a token was computed into a block that nobody holds"
        waiting = [request for request in self._waiting if not request.is_finished]
        assert len(waiting) == self._num_waiting, "the waiting requests are miscounted"
        for request in waiting:
            assert request.status is RequestStatus.WAITING and not request.block_ids and request.row < 0
        self.kv_cache.pool.check_integrity(request.block_ids for request in self.running)

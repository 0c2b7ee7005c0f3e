"""The sampler: each row is edited and drawn as if it were alone, and the device is never read on the way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.parallel.context import ParallelContext
from millrace.engine.sampling_params import ALL_FORBIDDEN, NAN_LOGITS, SamplingParams
from millrace.engine.sequence import Sequence
from millrace.engine.step import logit_edits, row_table, sampler
from millrace.engine.step.logit_edits import LogitEdits
from millrace.engine.step.sampler import Sampler
from millrace.engine.text.spellings import END, START, chains
from millrace.kernels import sample, top_logprobs

CPU = torch.device("cpu")
VOCAB_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN = 11, 6, 12


def make_request(token_ids=(1, 2), num_prompt_tokens=1, stops=(), bad_words=(), seed=0, **params) -> Sequence:
    return Sequence(
        request_id="r",
        index=0,
        params=SamplingParams(max_tokens=None, **params),
        seed=seed,
        token_ids=list(token_ids),
        num_prompt_tokens=num_prompt_tokens,
        max_tokens_total=MAX_MODEL_LEN,
        stop_token_ids=dict.fromkeys(stops),
        bad_word_edges=chains(bad_words),
    )


def spellings(edges: np.ndarray, node: int = START) -> list[list[int]]:
    """Returns the token ids on all paths from a node to the end of a word."""
    if node == END:
        return [[]]
    return [[int(t), *rest] for before, t, after, _ in edges if before == node for rest in spellings(edges, after)]


def edited(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Edits one row, one token at a time: slow, and plain to see. This is what any batch must give, to the bit."""
    params, tokens, logits = sequence.params, sequence.token_ids, logits.clone()
    output = tokens[sequence.num_prompt_tokens :]
    if params.allowed_token_ids:
        for token in set(range(len(logits))) - set(params.allowed_token_ids):
            logits[token] = -torch.inf
    for word in spellings(sequence.bad_word_edges):
        start = word[:-1]
        if len(output) >= len(start) and output[len(output) - len(start) :] == start:
            logits[word[-1]] = -torch.inf
    if len(output) < params.min_tokens:
        for token in sequence.stop_token_ids:
            logits[token] = -torch.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in set(tokens):
        value, factor = logits[token], torch.tensor(params.repetition_penalty)
        logits[token] = value / factor if value > 0 else value * factor
    for token in set(output):
        count = torch.tensor(float(output.count(token)))
        logits[token] -= torch.tensor(params.frequency_penalty) * count + torch.tensor(params.presence_penalty)
    return logits


tokens = st.integers(0, VOCAB_SIZE - 1)
penalty = st.one_of(st.just(0.0), st.floats(-2, 2, width=32))


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """Any mixture of edits; few tokens, so that words do come up and tokens repeat."""
    token_ids = draw(st.lists(tokens, min_size=1, max_size=MAX_MODEL_LEN))
    optional = {
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "repetition_penalty": st.floats(0.125, 4, width=32),
        "min_tokens": st.integers(0, MAX_MODEL_LEN),
        "allowed_token_ids": st.lists(tokens, min_size=1, max_size=VOCAB_SIZE),
        "logit_bias": st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4),
    }
    words = st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=5)
    ends = token_ids[-2:]
    return make_request(
        token_ids,
        draw(st.integers(1, len(token_ids))),
        stops=draw(st.lists(tokens, unique=True, max_size=3)),
        bad_words=draw(words) + draw(st.sampled_from([[], [[*ends, 3]], [[ends[-1], 5], [4]]])),
        **draw(st.fixed_dictionaries({}, optional=optional)),
    )


@dataclass
class Batch:
    """Some rows of a sampler and what is in them."""

    rows: list[int]
    sequences: list[Sequence]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence.token_ids) for sequence in self.sequences]

    def token_table(self, device: torch.device = CPU) -> torch.Tensor:
        """What lies behind the tokens of a row is no token at all: nothing may look at it."""
        table = torch.full((MAX_NUM_SEQS, MAX_MODEL_LEN), 10**6, dtype=torch.int32)
        for row, sequence in zip(self.rows, self.sequences, strict=True):
            table[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
        return table.to(device)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows = draw(st.lists(st.integers(0, MAX_NUM_SEQS - 1), unique=True, min_size=1))
    return Batch(rows, [draw(sequences()) for _ in rows])


def logits_for(batch: Batch, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(len(batch.rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.masked_fill(logits.abs() < 0.1, 0.0)


@given(history=st.lists(batches(), min_size=1, max_size=3), at_once=st.sampled_from([1, 30, 1 << 24]))
@settings(deadline=None, max_examples=150)
def test_every_row_is_edited_as_if_it_were_alone(history, at_once):
    edits = LogitEdits(MAX_NUM_SEQS, CPU)
    for seed, batch in enumerate(history):  # rows change hands
        edits.set_rows(batch.rows, batch.sequences)
        raw = logits_for(batch, seed)
        expected = torch.stack([edited(row, sequence) for row, sequence in zip(raw, batch.sequences, strict=True)])
        logits, found = raw.clone(), edits.find(batch.rows, batch.lengths)
        is_forbidden = torch.zeros(len(raw), dtype=torch.bool)
        if found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(logit_edits, "MAX_LOGITS_AT_ONCE", at_once)
                is_forbidden = edits.apply(logits, found, batch.rows, batch.lengths, batch.token_table())
        assert logits.tolist() == expected.tolist()
        assert is_forbidden.tolist() == expected.isneginf().all(-1).tolist()


def test_the_reference_knows_each_edit():
    """The edits that the comparison above relies on, with numbers worked out by hand."""
    flat = torch.full((VOCAB_SIZE,), 2.0)
    assert edited(flat, make_request(allowed_token_ids=[3, 4])).isfinite().nonzero().flatten().tolist() == [3, 4]
    word = make_request((1, 7, 8), bad_words=[(7, 8, 9), (8, 0), (5,), (1, 7, 8, 6)])
    assert edited(flat, word).isneginf().nonzero().flatten().tolist() == [0, 5, 9]  # the last one starts in the prompt
    assert edited(flat, make_request(stops=[4], min_tokens=2))[4] == -torch.inf
    assert edited(flat, make_request((1, 2, 3), stops=[4], min_tokens=2))[4] == 2
    assert edited(flat, make_request(logit_bias={6: -1.5}))[6] == 0.5
    repeated = make_request((1, 2, 2), repetition_penalty=4.0, frequency_penalty=0.25, presence_penalty=1.0)
    assert edited(flat, repeated)[:4].tolist() == [2, 0.5, 0.5 - 1.5, 2]


def test_a_row_that_only_waits_for_min_tokens_is_left_alone_afterwards():
    edits = LogitEdits(MAX_NUM_SEQS, CPU)
    edits.set_rows([4, 2], [make_request(stops=[3], min_tokens=2), make_request(logit_bias={0: 1.0})])
    assert edits.find([2, 4, 1], [9, 2, 9]) == [0, 1]
    assert edits.find([2, 4, 1], [9, 3, 9]) == [0]
    edits.set_rows([2], [make_request()])
    assert edits.find([2, 4, 1], [9, 3, 9]) == []


def test_a_bad_word_may_be_spelled_along_any_path():
    """The word ``abcd`` in tokens of one and two letters: a 0, b 1, c 2, d 3, ab 4, bc 5, cd 6."""
    edges = np.array(
        [(0, 0, 2, 1), (0, 4, 3, 1), (2, 1, 3, 2), (2, 5, 4, 2), (3, 2, 4, 3), (3, 6, 1, 3), (4, 3, 1, 4)], np.int32
    )
    ends = {(0, 1): [6], (0, 1, 2): [3], (0, 5): [3], (4,): [6], (4, 2): [3], (4, 1): [], (1, 2): [], (0, 2): []}
    for drawn, forbidden in ends.items():
        sequence = make_request((1, *drawn))
        sequence.bad_word_edges = edges
        edits = LogitEdits(MAX_NUM_SEQS, CPU)
        edits.set_rows([3, 1], [sequence, make_request((1, 2), bad_words=[(9,)])])
        batch = Batch([3, 1], [sequence, make_request((1, 2))])
        logits = torch.zeros(2, VOCAB_SIZE)
        edits.apply(logits, [0, 1], batch.rows, batch.lengths, batch.token_table())
        assert [line.isneginf().nonzero().flatten().tolist() for line in logits] == [forbidden, [9]], drawn


def test_edits_take_memory_in_proportion_and_give_it_back():
    edits = LogitEdits(256, CPU)
    edits.set_rows([0], [make_request(bad_words=[tuple(range(1, 7))] + [(1,)] * 1000, allowed_token_ids=[3] * 100)])
    tables = (edits._bad_words, edits._allowed)
    assert [table.rows.numel() for table in tables] == [1006, 1]
    edits.set_rows([0], [make_request()])
    assert [table.rows.numel() for table in tables] == [0, 0] and not edits._bad_words.edges.numel()


@given(batch=batches(), parameters=st.data())
@settings(deadline=None, max_examples=100)
def test_a_draw_is_the_kernels_draw_from_the_edited_row(batch, parameters):
    for sequence in batch.sequences:
        sequence.seed = parameters.draw(st.integers(-(2**63), 2**63 - 1))
        sequence.params.temperature = parameters.draw(st.sampled_from([0.0, 0.7, 1.5]))
        sequence.params.top_k = parameters.draw(st.sampled_from([0, 2]))
        sequence.params.top_p = parameters.draw(st.sampled_from([1.0, 0.6]))
        sequence.params.min_p = parameters.draw(st.sampled_from([0.0, 0.3]))
        sequence.params.logprobs = parameters.draw(st.sampled_from([None, 0, 3]))
    ours, raw = Sampler(MAX_NUM_SEQS, CPU), logits_for(batch)
    ours.set_rows(batch.rows, batch.sequences)
    token_ids, logprobs = ours.draw(
        raw.clone(), batch.rows, batch.lengths, torch.tensor([batch.rows, batch.lengths]), batch.token_table()
    )
    for i, sequence in enumerate(batch.sequences):
        row, p = edited(raw[i], sequence), sequence.params
        floats = [torch.tensor([value]) for value in (p.temperature, p.top_p, p.min_p)]
        where = torch.tensor([sequence.seed]), torch.tensor([len(sequence.token_ids)])
        top_k = torch.tensor([p.top_k], dtype=torch.int32)
        expected = sample.plain(row[None], floats[0], top_k, floats[1], floats[2], *where).item()
        assert token_ids[i] == (ALL_FORBIDDEN if row.isneginf().all() else expected)
        if p.logprobs is not None:
            chosen = token_ids[i].clamp(min=0)
            assert logprobs.logprobs[i, 0].item() == pytest.approx(raw[i].log_softmax(-1)[chosen].item(), abs=1e-5)
            assert logprobs.token_ids[i, 0] == chosen
    assert (logprobs is None) == all(sequence.params.logprobs is None for sequence in batch.sequences)


def test_nan_is_told_apart_from_all_forbidden():
    ours = Sampler(MAX_NUM_SEQS, CPU)
    ours.set_rows([0, 1, 2], [make_request(allowed_token_ids=[3], bad_words=[(3,)]), *[make_request()] * 2])
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1, 4] = torch.nan
    batch = Batch([0, 1, 2], [make_request()] * 3)
    token_ids, _ = ours.draw(
        logits, batch.rows, batch.lengths, torch.tensor([batch.rows, batch.lengths]), batch.token_table()
    )
    assert token_ids[:2].tolist() == [ALL_FORBIDDEN, NAN_LOGITS] and token_ids[2] >= 0


@pytest.fixture
def blind_device(monkeypatch) -> torch.device:
    """A device whose memory cannot be read: whatever needs a number from it raises. `to_device` is the only way in."""

    def send(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(np.shape(values), dtype=dtype, device=device)

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a copy that waits for the device; use to_device")

    for module in (sampler, logit_edits, row_table):
        monkeypatch.setattr(module, "to_device", send)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(sampler, "sample", sample.plain)
    monkeypatch.setattr(sampler, "top_logprobs", top_logprobs.plain)
    return torch.device("meta")


READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "to the host": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: x.equal(x),
    "repeat_interleave": lambda x: x.long().repeat_interleave(x.long()),
    "upload": lambda x: x + torch.tensor([1.0] * 3),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_blind_device_notices_a_read(blind_device, read):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, AssertionError)):
        read(torch.zeros(3, device=blind_device))


EVERYTHING = {
    "presence_penalty": 1.0,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "min_tokens": 9,
    "allowed_token_ids": [1, 2, 3],
    "logit_bias": {1: 1.0, 4: 2.0},
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "logprobs": 4,
}


def test_nothing_is_read_from_the_device(blind_device):
    ours, table = (
        Sampler(MAX_NUM_SEQS, blind_device),
        torch.zeros(MAX_NUM_SEQS, MAX_MODEL_LEN, device=blind_device).int(),
    )
    plain, busy = make_request(), make_request(stops=[5], bad_words=[(1, 2), (3,)], **EVERYTHING)
    longer = make_request(stops=[5, 6], bad_words=[(1, 2, 3, 4)] * 3, allowed_token_ids=[*range(9)], min_tokens=1)
    greedy = make_request(temperature=0.0, logprobs=-1)
    for step in ([plain], [plain, busy], [busy, greedy], [longer, busy, plain], [longer]):
        rows = list(range(len(step)))
        ours.set_rows(rows, step)
        logits = torch.zeros(len(step), VOCAB_SIZE, device=blind_device)
        token_ids, logprobs = ours.draw(
            logits, rows, [2] * len(step), torch.empty(2, len(step), dtype=torch.int32, device=logits.device), table
        )
        assert token_ids.shape == (len(step),) and token_ids.device == blind_device
        assert (logprobs is not None) == any(sequence.params.logprobs is not None for sequence in step)


class Rank:
    """Collectives of ranks that are threads of this process."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._parts, self._barrier = rank, parts, barrier

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensors of all ranks."""
        self._parts[self._rank] = tensor
        self._barrier.wait()
        gathered = torch.stack(self._parts)
        self._barrier.wait()
        return gathered


def draw_on_ranks(num_ranks: int, logits: torch.Tensor, sequences: list[Sequence]) -> list[list[int]]:
    """Returns the token ids that each of some ranks draws from its columns, the last ones padded."""
    num_rows, vocab_size = logits.shape
    parts, barrier, rows = [None] * num_ranks, threading.Barrier(num_ranks), range(num_rows)

    def run(rank: int) -> list[int]:
        parallel = ParallelContext(num_ranks, rank, tensor=Rank(rank, parts, barrier))
        shard = parallel.shard(vocab_size)
        own = torch.full((num_rows, shard.room), -torch.inf)
        own[:, : shard.length] = logits[:, shard.start : shard.start + shard.length]
        of_rank = Sampler(num_rows, CPU)
        of_rank.set_rows(rows, sequences)
        placed = torch.tensor([[*rows], [2] * num_rows])
        return of_rank.draw_in_shards(own, shard.start, placed, parallel, draws=of_rank.draws(rows)).tolist()

    with ThreadPoolExecutor(num_ranks) as pool:
        return [*pool.map(run, range(num_ranks))]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.7, 1.5)])
def test_ranks_draw_from_their_columns_what_one_draws_from_all(num_ranks, temperatures):
    generator = torch.Generator().manual_seed(num_ranks)
    logits = torch.randn(30, 11, generator=generator).mul(2).round(decimals=0)  # Best tokens of several ranks tie.
    logits[4, 9], logits[5, 10], logits[6], logits[7, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    sequences = [
        make_request(temperature=temperatures[i % len(temperatures)], min_p=0.1 * (i % 2), seed=i) for i in range(30)
    ]
    whole = Sampler(30, CPU)
    whole.set_rows(range(30), sequences)
    tokens = torch.zeros(30, MAX_MODEL_LEN, dtype=torch.int32)
    placed = torch.tensor([[*range(30)], [2] * 30])
    expected, _ = whole.draw(logits.clone(), range(30), [2] * 30, placed, tokens)
    assert draw_on_ranks(num_ranks, logits, sequences) == [expected.tolist()] * num_ranks
    assert expected[4:8].tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize(
    ("params", "only_draws", "filters"),
    [
        ({}, True, False),
        ({"temperature": 0, "top_k": 5}, True, False),
        ({"min_p": 0.1}, True, False),
        ({"top_k": 5}, True, True),
        ({"top_p": 0.9}, True, True),
        ({"logprobs": 0}, False, False),
        ({"logit_bias": {1: 2.0}}, False, False),
        ({"repetition_penalty": 1.5}, False, False),
        ({"bad_words": [(8, 9)], "top_p": 0.5}, False, True),
        ({"min_tokens": 3, "stops": (4,)}, False, False),
        ({"min_tokens": 1, "stops": (4,)}, True, False),
    ],
    ids=str,
)
def test_a_step_needs_whole_rows_only_for_what_its_requests_ask(params, only_draws, filters):
    of_step = Sampler(MAX_NUM_SEQS, CPU)
    other, asking = make_request(), make_request([1, 2, 3], **params)
    of_step.set_rows([1, 4], [other, asking])
    assert of_step.only_draws([1, 4], [2, 3], None) == only_draws and of_step.filters([1, 4]) == filters
    assert of_step.only_draws([1], [2], None) and not of_step.filters([1]), "another step does not"
    of_step.set_rows([4], [other])
    assert of_step.only_draws([1, 4], [2, 3], None) and not of_step.filters([1, 4]), "the row has another owner"

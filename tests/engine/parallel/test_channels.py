"""What ranks talk over: plans as bytes, connections that notice an end, sums in shared memory."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.embeds.span import EmbeddedSpan
from millrace.engine.errors import EngineDeadError
from millrace.engine.executor.plan_wire import decode_plan, encode_plan, known_tokens
from millrace.engine.kv_cache import KVCacheManager
from millrace.engine.parallel import shared_memory
from millrace.engine.parallel.channel import Channel, Listener, connect
from millrace.engine.parallel.handshake import new_secret
from millrace.engine.parallel.shared_memory import SharedCollectives, SharedRegion, can_share_memory
from millrace.engine.parallel.stage_link import ChannelLink
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.scheduler import Scheduler
from millrace.engine.sequence import Sequence
from millrace.engine.text.spellings import chains
from ranks import connected_channels

shares_memory = pytest.mark.skipif(not can_share_memory(), reason="no shared memory that keeps its order")


SECRET = new_secret()


@pytest.fixture
def ends() -> tuple[Channel, Channel]:
    return connected_channels()


def test_messages_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    near, far = ends
    messages = [b"", b"x", b"y" * 3_000_000]
    sender = threading.Thread(target=lambda: [near.send(message) for message in messages])
    sender.start()
    assert [far.receive() for _ in messages] == messages
    sender.join()


def test_spinning_tells_whether_something_is_there(ends: tuple[Channel, Channel]) -> None:
    near, far = ends
    assert not far.spin(0.01)
    near.send(b"x")
    assert far.spin(60)
    assert far.receive() == b"x"
    near.close()
    assert far.spin(60)


def test_last_words_are_heard_and_the_end_is_an_error(ends: tuple[Channel, Channel]) -> None:
    near, far = ends
    assert not near.is_closed()
    far.send_object({"why": "tired"})
    far.close()
    assert near.is_closed()
    assert near.receive_object() == {"why": "tired"}
    with pytest.raises(EngineDeadError, match="rank 0 of this engine has ended"):
        near.receive()


def test_hidden_states_arrive_in_order_however_large(ends: tuple[Channel, Channel]) -> None:
    near, far = ends
    sender, receiver = ChannelLink(near, None), ChannelLink(None, far)
    sizes = [3, 2_000_000, 5, 70_000, 1]  # Those between two large ones must not overtake.
    tensors = [torch.full((2, size), i, dtype=torch.bfloat16) for i, size in enumerate(sizes)]
    for tensor in tensors:
        sender.send(tensor)
    for tensor in tensors:
        assert torch.equal(receiver.receive(tensor.shape, tensor.dtype, tensor.device), tensor)
    receiver.close()
    sender.send(tensors[1])
    sender._thread.join()  # It has met the end.
    with pytest.raises(EngineDeadError, match="rank 0"):
        sender.send(tensors[0])
    sender.close()


def test_nobody_at_an_address_is_an_error() -> None:
    listener = Listener("127.0.0.1", SECRET)
    address = listener.address
    assert listener.accept(0.01) is None
    listener.close()
    with pytest.raises(EngineDeadError, match="rank 0 does not answer"):
        connect(*address, SECRET, "rank 0", 5)


def test_who_does_not_know_the_secret_is_turned_away_and_the_next_one_heard() -> None:
    listener = Listener("127.0.0.1", SECRET)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, 10)
        with pytest.raises(EngineDeadError, match="rank 0 does not answer"):
            connect(*listener.address, new_secret(), "rank 0", 10)
        assert accepted.result() is None
        accepted = pool.submit(listener.accept, 10)
        connect(*listener.address, SECRET, "rank 0", 10).close()
        channel = accepted.result()
    assert channel is not None
    channel.close()
    listener.close()


def test_a_caller_does_not_trust_a_listener_without_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def pretend() -> None:
            connection = server.accept()[0]
            with connection:
                connection.sendall(bytes(16))  # a challenge
                connection.recv(4096)
                connection.sendall(bytes(32))  # not a proof

        pretended = pool.submit(pretend)
        with pytest.raises(EngineDeadError, match="not of this engine"):
            connect(*server.getsockname()[:2], SECRET, "rank 0", 10)
        pretended.result()


def make_request(index: int) -> Sequence:
    params = SamplingParams(
        temperature=0.5, seed=7, bad_words=["no"], min_tokens=2, max_tokens=None, logit_bias={9: 1.5}
    )
    return Sequence(
        request_id=str(index),
        index=0,
        params=params,
        seed=index,
        token_ids=[index, 1, 2],
        num_prompt_tokens=3,
        max_tokens_total=9,
        stop_token_ids={5: None},
        bad_word_edges=chains([[4, 5], [6]]),
        spans=[EmbeddedSpan(1, torch.tensor([[0.5, -3.0]], dtype=torch.bfloat16))],
    )


def test_a_plan_crosses_without_what_only_the_scheduler_reads() -> None:
    scheduler = Scheduler(KVCacheManager(50, 2), 4, 50)
    for index in range(2):
        scheduler.add(make_request(index))
    plan = scheduler.schedule()
    assert plan is not None
    plan.new_tokens = [(1, 4, [7, 8]), (0, 2, [9])]
    received = decode_plan(encode_plan(plan))
    for name in ("rows", "starts", "counts", "samples", "new_blocks", "new_tokens", "num_decodes", "num_shared_blocks"):
        assert getattr(received, name) == getattr(plan, name), name
    assert not received.sequences and not received.published
    assert known_tokens(plan) == []
    for sent, got in zip(plan.new_rows, received.new_rows, strict=True):
        assert (sent.row, sent.num_tokens) == (got.row, got.num_tokens)
        for name in ("params", "seed", "token_ids", "num_prompt_tokens", "stop_token_ids"):
            assert getattr(sent.sequence, name) == getattr(got.sequence, name), name
        assert sent.sequence.bad_word_edges.tolist() == got.sequence.bad_word_edges.tolist()
        (ours,), (theirs,) = sent.sequence.spans, got.sequence.spans
        assert ours.start == theirs.start and torch.equal(ours.embeddings, theirs.embeddings)
    scheduler.update(plan, [30, 31])
    decode = scheduler.schedule()
    assert decode is not None
    assert sorted(known_tokens(decode)) == sorted((r.row, 3, [30 + r.seed]) for r in decode.sequences)


def run_ranks(size: int, work, check=lambda: None) -> list:
    """Runs a function of (rank, collectives) on threads that share a region."""
    name = SharedRegion.create(SharedCollectives.num_bytes(size))
    regions = [SharedRegion(name, SharedCollectives.num_bytes(size)) for _ in range(size)]
    regions[0].unlink()
    results: list = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, SharedCollectives(regions[rank], rank, size, check))
        except EngineDeadError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@shares_memory
@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(2, 3),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_shared_sums_are_sums_and_the_same_everywhere(size: int, shapes, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(size)]

    def work(rank: int, collectives: SharedCollectives) -> list[torch.Tensor]:
        summed = [collectives.all_reduce(part.clone()) for part in parts[rank]]
        return summed + [collectives.all_gather(part) for part in parts[rank]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "CHUNK_BYTES", 64)  # So that even these take several rounds.
        results = run_ranks(size, work)
    for i in range(len(shapes)):
        stacked = torch.stack([part[i] for part in parts])
        for result in results:
            torch.testing.assert_close(result[i].float(), stacked.float().sum(dim=0), rtol=1e-2, atol=1e-2)
            assert torch.equal(result[i], results[0][i])
            assert torch.equal(result[len(shapes) + i], stacked)


@shares_memory
def test_waiting_for_a_dead_rank_ends() -> None:
    def check() -> None:
        raise EngineDeadError("rank 1 has ended")

    def work(rank: int, collectives: SharedCollectives) -> torch.Tensor | None:
        return collectives.all_reduce(torch.ones(4)) if rank == 0 else None

    assert isinstance(run_ranks(2, work, check)[0], EngineDeadError)

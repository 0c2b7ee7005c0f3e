"""Sharing requests out over replicas."""

from __future__ import annotations

from collections import Counter

from fake_engine import requests
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors.client.routing import BLOCK_CHARACTERS, BLOCK_TOKENS, MAX_BLOCKS, MAX_LEAD, Router, block_hashes
from millrace.engine import LoRARequest
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams


def sizes(shares: dict[str, list]) -> dict[str, int]:
    return {replica_id: len(share) for replica_id, share in shares.items()}


def tokens(request_id: str, token_ids: list[int]) -> GenerateRequest:
    return GenerateRequest(request_id, None, token_ids, SamplingParams())


def with_prefix(prefix: int, count: int, start: int = 0) -> list[GenerateRequest]:
    """Requests that share their first two blocks and then differ."""
    return [
        tokens(f"{prefix}-{index}", [prefix] * 2 * BLOCK_TOKENS + [index] * BLOCK_TOKENS)
        for index in range(start, start + count)
    ]


def test_least_loaded_replica_comes_first() -> None:
    router = Router()
    assert sizes(router.share_out(requests("steps 1", 6), ["a"])) == {"a": 6}
    assert sizes(router.share_out(requests("steps 1", 4), ["a", "b"])) == {"b": 4}
    assert sizes(router.share_out(requests("steps 1", 4), ["a", "b"])) == {"a": 1, "b": 3}
    router.release("a", 7)
    assert sizes(router.share_out(requests("steps 1", 3), ["a", "b"])) == {"a": 3}


@given(counts=st.lists(st.integers(0, 20), max_size=6), num_replicas=st.integers(1, 4))
def test_shares_hold_each_request_once_in_order_and_are_even(counts: list[int], num_replicas: int) -> None:
    router = Router()
    replica_ids = [str(index) for index in range(num_replicas)]
    totals = dict.fromkeys(replica_ids, 0)
    for count in counts:
        sent = requests("steps 1", count)
        shares = router.share_out(sent, replica_ids)
        assert all(share for share in shares.values())
        assert sorted((r for share in shares.values() for r in share), key=sent.index) == sent
        assert all(share == sorted(share, key=sent.index) for share in shares.values())
        for replica_id, share in shares.items():
            totals[replica_id] += len(share)
        assert max(totals.values()) - min(totals.values()) <= 1


def with_adapters(names: list[str], start: int = 0) -> list[GenerateRequest]:
    """One request of each adapter named, each with a prompt of its own."""
    made = [tokens(f"{name}-{start + index}", [start + index] * 3) for index, name in enumerate(names)]
    for request, name in zip(made, names, strict=True):
        request.lora_request = LoRARequest(name, int(name) + 1, f"folder/{name}")
    return made


def homes_of(shares: dict[str, list]) -> dict[str, set[str]]:
    """Adapter -> the replicas that got its requests."""
    homes: dict[str, set[str]] = {}
    for replica_id, share in shares.items():
        for request in share:
            homes.setdefault(request.lora_request.lora_name, set()).add(replica_id)
    return homes


def test_the_requests_of_an_adapter_go_to_one_replica_and_the_adapters_to_all() -> None:
    router, names = Router(), [str(number) for number in range(20)]
    first = homes_of(router.share_out(with_adapters(names), ["a", "b"]))
    again = homes_of(router.share_out(with_adapters(names[::-1] * 2, 100), ["a", "b"]))
    assert first == again
    assert Counter(next(iter(home)) for home in first.values()) == {"a": 10, "b": 10}


def test_an_adapter_that_most_requests_name_is_spread_and_the_others_keep_their_homes() -> None:
    router = Router()
    others = homes_of(router.share_out(with_adapters(["1", "2"]), ["a", "b"]))
    shares = router.share_out(with_adapters(["0"] * 400, 100), ["a", "b"])
    assert abs(len(shares["a"]) - len(shares["b"])) <= MAX_LEAD
    router.release("a", len(shares["a"]))
    router.release("b", len(shares["b"]))
    assert homes_of(router.share_out(with_adapters(["2", "1"], 1000), ["b", "a"])) == others


def test_adapters_move_to_a_replica_that_joins_and_stay_there() -> None:
    router, names = Router(), [str(number) for number in range(20)]
    router.share_out(with_adapters(names * 2), ["a"])
    joined = homes_of(router.share_out(with_adapters(names, 1000), ["a", "b"]))
    assert joined == {name: {"b"} for name in names}
    router.release("a", 40)
    router.release("b", 20)
    for name in names:
        assert homes_of(router.share_out(with_adapters([name]), ["a", "b"])) == {name: {"b"}}
        router.release("b", 1)


def test_the_adapters_of_a_dead_replica_move_and_the_others_stay() -> None:
    router, names = Router(), [str(number) for number in range(9)]
    before = homes_of(router.share_out(with_adapters(names), ["a", "b", "c"]))
    router.release("a", 3)
    after = homes_of(router.share_out(with_adapters(names, 100), ["b", "c"]))
    assert all(after[name] == home for name, home in before.items() if home != {"a"})
    assert all(home <= {"b", "c"} for home in after.values())


def test_the_same_beginning_under_another_adapter_is_another_beginning() -> None:
    router = Router()
    plain = with_prefix(1, 1)
    named = with_prefix(1, 1)
    named[0].lora_request = LoRARequest("0", 1, "folder/0")
    router.share_out(plain, ["a"])
    assert set(block_hashes(plain[0])).isdisjoint(block_hashes(named[0]))
    assert sizes(router.share_out(named, ["a", "b"])) == {"b": 1}


def test_one_beginning_goes_to_one_replica() -> None:
    router = Router()
    homes = {}
    for index in range(10):
        mixed = [with_prefix(prefix, 1, index)[0] for prefix in range(6)]
        for replica_id, share in router.share_out(mixed, ["a", "b", "c"]).items():
            for request in share:
                homes.setdefault(request.request_id.split("-")[0], Counter())[replica_id] += 1
    assert all(len(home) == 1 for home in homes.values())
    assert Counter(next(iter(home)) for home in homes.values()) == {"a": 2, "b": 2, "c": 2}


def test_the_longest_known_beginning_counts() -> None:
    router = Router()
    first, second = with_prefix(1, 2)
    assert sizes(router.share_out([first], ["a"])) == {"a": 1}
    assert sizes(router.share_out([second], ["b"])) == {"b": 1}
    assert sizes(router.share_out([tokens("again", list(second.prompt_token_ids or []))], ["a", "b"])) == {"b": 1}
    assert sizes(router.share_out([tokens("again", list(first.prompt_token_ids or []))], ["a", "b"])) == {"a": 1}


def test_a_beginning_that_all_share_is_spread_over_all() -> None:
    assert sizes(Router().share_out(with_prefix(1, 8), ["a", "b", "c", "d"])) == {"a": 2, "b": 2, "c": 2, "d": 2}
    shares = sizes(Router().share_out(with_prefix(1, 400), ["a", "b"]))
    assert abs(shares["a"] - shares["b"]) <= MAX_LEAD


def test_a_dead_replica_is_forgotten() -> None:
    router = Router()
    router.share_out(with_prefix(1, 4), ["a"])
    assert sizes(router.share_out(with_prefix(1, 4), ["b"])) == {"b": 4}


def test_memory_is_bounded() -> None:
    router = Router(max_known=6)
    for prefix in range(5):
        router.share_out(with_prefix(prefix, 1), ["a"])
    router.release("a", 5)
    assert sizes(router.share_out(with_prefix(4, 1), ["b", "a"])) == {"a": 1}
    assert sizes(router.share_out(with_prefix(0, 1), ["b", "a"])) == {"b": 1}


def test_blocks_are_whole_chained_and_bounded() -> None:
    short, long = [7] * (BLOCK_TOKENS - 1), [7] * (BLOCK_TOKENS * (MAX_BLOCKS + 3))
    assert list(block_hashes(tokens("a", short))) == []
    hashes = list(block_hashes(tokens("a", long)))
    assert len(hashes) == len(set(hashes)) == MAX_BLOCKS
    assert hashes[:2] == list(block_hashes(tokens("b", [7] * (2 * BLOCK_TOKENS + 1))))
    text = [GenerateRequest("a", "x" * BLOCK_CHARACTERS + end, None, SamplingParams()) for end in ("", "y")]
    assert len({tuple(block_hashes(request)) for request in text}) == 1

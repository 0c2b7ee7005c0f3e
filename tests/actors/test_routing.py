"""Sharing requests out over replicas."""

from __future__ import annotations

from fake_engine import requests
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors.routing import Router


def sizes(shares: dict[str, list]) -> dict[str, int]:
    return {replica_id: len(share) for replica_id, share in shares.items()}


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

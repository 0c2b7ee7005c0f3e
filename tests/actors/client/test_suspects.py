"""Finding the request that kills, by rules alone."""

from __future__ import annotations

from fake_engine import requests
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors.client.suspects import MAX_ALONE, Suspects


def run(count: int, guilty: set[str], max_attempts: int = 2) -> tuple[list[str], list[str], int]:
    """Runs suspects of one death to the end; returns who finished, who was found guilty, and the number of deaths."""
    suspects = Suspects(max_attempts)
    suspects.note_death(requests("steps 1", count), is_apart=False)
    finished, found, num_deaths = [], [], 1
    while suspects:
        group = suspects.next_group()
        killers = [request for request in group if request.request_id in guilty]
        if not killers:
            finished += [request.request_id for request in group]
            continue
        num_deaths += 1
        if (one := suspects.note_death(group, is_apart=True)) is not None:
            found.append(one.request_id)
    return finished, found, num_deaths


@given(count=st.integers(1, 400), data=st.data(), max_attempts=st.integers(1, 5))
def test_exactly_the_guilty_are_found_and_the_others_finish_once(
    count: int, data: st.DataObject, max_attempts: int
) -> None:
    guilty = {str(index) for index in data.draw(st.sets(st.integers(0, count - 1), max_size=5))}
    finished, found, _ = run(count, guilty, max_attempts)
    assert sorted(found) == sorted(guilty)
    assert sorted(finished) == sorted({str(index) for index in range(count)} - guilty)


def test_one_is_found_at_the_second_death() -> None:
    assert run(MAX_ALONE, {"3"})[1:] == (["3"], 2)


def test_one_of_very_many_is_found_at_the_third() -> None:
    assert run(1000, {"40"})[1:] == (["40"], 3)


def test_alone_among_strangers_is_not_guilty_yet() -> None:
    suspects = Suspects(max_attempts=1)
    assert suspects.note_death(requests("steps 1", 1), is_apart=False) is None
    assert suspects.note_death(suspects.next_group(), is_apart=True) is not None


def test_what_is_put_back_is_next_and_no_worse_off() -> None:
    suspects = Suspects(max_attempts=2)
    suspects.note_death(requests("steps 1", 3), is_apart=False)
    group = suspects.next_group()
    suspects.put_back(group)
    assert suspects.next_group() == group
    assert suspects.num_deaths(group[0].request_id) == 1

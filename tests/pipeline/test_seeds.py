"""A row's seed is a function of the row."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from millrace import SamplingParams
from millrace.pipeline.seeds import derive_seed, seeded

WARM = SamplingParams(temperature=0.8)


def test_greedy_rows_and_rows_with_a_seed_stay_as_they_are() -> None:
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0.8, seed=7)):
        assert seeded(params, 0, "a", None) is params


@given(st.integers(), st.lists(st.integers(0, 300)))
def test_a_seed_fits_and_repeats(job_seed: int, prompt: list[int]) -> None:
    seed = seeded(WARM, job_seed, None, prompt).seed
    assert seed == seeded(WARM, job_seed, "ignored beside token ids", list(prompt)).seed
    assert seed is not None
    assert 0 <= seed < 2**63


def test_job_prompt_and_parameters_each_change_it() -> None:
    seeds = {
        derive_seed(0, "a", WARM),
        derive_seed(1, "a", WARM),
        derive_seed(0, "b", WARM),
        derive_seed(0, [97], WARM),
        derive_seed(0, "a", WARM.clone(top_p=0.5)),
        derive_seed(0, "a", WARM, identity=b"r"),
        derive_seed(0, "a", WARM, identity=0),
    }
    assert len(seeds) == 7


def test_what_does_not_shape_the_draws_does_not_change_it() -> None:
    longer = WARM.clone(max_tokens=99, logprobs=3, detokenize=False)
    assert derive_seed(0, "a", WARM) == derive_seed(0, "a", longer)


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "from millrace import SamplingParams; from millrace.pipeline.seeds import derive_seed; "
        "print(derive_seed(5, 'x', SamplingParams(temperature=0.8)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == derive_seed(5, "x", WARM)

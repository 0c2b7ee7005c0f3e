"""Sampling in Triton beyond the small samples of the op: many chunks, and more candidates than the buffer holds.

Run as a script it is the test itself: Triton's interpreter is chosen when triton is first imported.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from millrace.kernels import sample, sample_shard
from millrace.kernels._triton import TARGETS

pytest.importorskip("triton")

NUM_ROWS, NUM_LANES = 16, 16


def run_in_interpreter(name: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-P", __file__, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_chunks_and_overflowing_candidates_change_no_id():
    assert run_in_interpreter("check_chunks").split() == ["row", "chunks", "candidates", "row"]


def test_tiles_that_cannot_win_are_skipped_and_change_no_id():
    assert run_in_interpreter("check_skipped_tiles").split() == ["flat", "peaked", "rising", "tied", "filtered"]


def test_chunks_fill_waves_of_programs_and_cover_the_vocabulary():
    module = importlib.import_module("millrace.kernels.sample.triton")
    target, wave = TARGETS["sm_90"], 4 * TARGETS["sm_90"].num_processors
    assert module.split(256, 151_936, target) == (2, 75 * 1024), "one wave"
    assert module.split(1, 151_936, target) == (75, 2 * 1024), "no more chunks than a program can merge"
    for num_rows in (1, 2, 7, 100, 255, 300, 500, 528, 529, 1024, 4000):
        for vocab_size in (1, 1025, 32_000, 151_936):
            num_chunks, chunk_size = module.split(num_rows, vocab_size, target)
            assert 1 <= num_chunks <= module.MAX_CHUNKS and chunk_size % module.TILE == 0
            assert (num_chunks - 1) * chunk_size < vocab_size <= num_chunks * chunk_size
            if vocab_size > 30_000:
                num_tiles = -(-num_rows * num_chunks // wave) * chunk_size // module.TILE
                assert num_tiles < 1.4 * num_rows * vocab_size / module.TILE / wave + 2, (num_rows, vocab_size)


def test_compiled_code_rounds_as_the_definition_does():
    report = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "kernels_report.py"))
    target = report["TARGETS"]["sm_90"]
    forms = report["specialisations"]("sample", target)
    code = "\n".join(report["compile_form"](form, target).asm["ptx"] for form in forms)
    divisions = set(re.findall(r"\bdiv\.\S*f32", code))
    flushing = set(re.findall(r"\b\S+\.ftz\.\S+", code))
    assert divisions == {"div.rn.f32"}
    # The exponential is that of a bound with a margin, which is also right where the result is flushed to 0.
    assert flushing == {"cvt.rmi.ftz.f32.f32", "ex2.approx.ftz.f32"}
    assert not re.findall(r"\b(?:fma|mad)\.\S*f32", code)


def test_ranks_draw_together_what_one_draws_alone():
    assert run_in_interpreter("check_shards").split() == ["2", "3"]


def arguments(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rows of every kind: filters on and off, ties, forbidden tokens, distances of all sizes."""

    def uniform(high: float) -> torch.Tensor:
        return torch.rand(NUM_ROWS, generator=generator) * high

    def either(values: torch.Tensor, off: float) -> torch.Tensor:
        return torch.where(uniform(1.0) < 0.3, torch.full_like(values, off), values)

    logits = torch.randn(NUM_ROWS, 203, generator=generator) * 10 ** (uniform(4).unsqueeze(-1) - 2)
    logits[::3] = logits[::3].round(decimals=1)
    logits[1::4] = logits[1::4].masked_fill(logits[1::4] < -1, -torch.inf)
    logits[5] = 0.25
    top_k = torch.randint(1, 220, (NUM_ROWS,), generator=generator).int()
    return (
        logits,
        either(uniform(2.0), 0.0),
        either(top_k, 0),
        either(uniform(1.0), 1.0),
        either(uniform(0.1), 0.0),
        torch.randint(-(2**62), 2**62, (NUM_ROWS,), generator=generator),
        torch.randint(0, 2**30, (NUM_ROWS,), generator=generator),
    )


def check_chunks() -> None:
    """Draws the same rows with several tile sizes and buffers, and prints the name of each that was right."""
    generator = torch.Generator().manual_seed(0)
    rows = arguments(generator)
    for name, tile, room in (("row", 1024, 16_384), ("chunks", 32, 16_384), ("candidates", 64, 4), ("row", 256, 40)):
        MODULE.TILE, MODULE.MAX_CANDIDATES = tile, room
        MODULE.split.cache_clear()
        assert torch.equal(IMPLEMENTATION(*rows), sample.plain(*rows)), name
        print(name)


def logits_in_many_tiles(generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yields kinds of rows, and the largest share of their tiles for which noise has to be computed."""
    flat = torch.randn(6, 30 * NUM_LANES, generator=generator)
    peaked = flat.scatter(1, torch.randint(0, flat.shape[1], (6, 1), generator=generator), 15.0)
    yield "flat", flat, 0.4
    yield "peaked", peaked, 0.1
    yield "rising", flat.sort(dim=-1).values, 0.6
    yield "tied", (flat * 2).round().masked_fill(flat < -1, -torch.inf), 0.4
    yield "filtered", flat * 3, 0.4


def check_skipped_tiles() -> None:
    """Draws rows of many tiles in two chunks, and prints the name of each kind that was right."""
    MODULE.TILE = NUM_LANES
    MODULE.split = lambda num_rows, vocab_size, target: (2, vocab_size // 2)
    computed, noise = [], MODULE.noise
    MODULE.noise = lambda v: computed.append(None) or noise(v)
    generator = torch.Generator().manual_seed(0)
    for name, logits, share in logits_in_many_tiles(generator):
        _, _, *filters, seeds, positions = (column[: len(logits)] for column in arguments(generator))
        if name != "filtered":
            filters = [torch.zeros(6).int(), torch.ones(6), torch.zeros(6)]
        draws = (torch.linspace(0.3, 2, 6), *filters, seeds, positions)
        computed.clear()
        assert torch.equal(IMPLEMENTATION(logits, *draws), sample.plain(logits, *draws)), name
        assert 0 < len(computed) < share * logits.numel() / NUM_LANES, (name, len(computed))
        print(name)


def check_shards() -> None:
    """Draws rows whose columns are divided among ranks, several chunks each, and prints the numbers of ranks."""
    draw_in_shards = importlib.import_module("test_sample").draw_in_shards
    MODULE.TILE = NUM_LANES
    implementation = sample_shard.implementations()["cuda"]
    generator = torch.Generator().manual_seed(0)
    logits, temperature, _, _, min_p, seeds, positions = (column[:8] for column in arguments(generator))
    temperature = temperature.clamp(min=0.01)
    no_filters = torch.zeros(8).int(), torch.ones(8)
    expected = sample.plain(logits, temperature, *no_filters, min_p, seeds, positions).int()
    for num_ranks in (2, 3):
        drawn = draw_in_shards(implementation, num_ranks, logits, temperature, min_p, seeds, positions)
        assert torch.equal(drawn, expected), num_ranks
        print(num_ranks)


if __name__ == "__main__":
    importlib.import_module("interpret").patch_language_once()
    MODULE = importlib.import_module("millrace.kernels.sample.triton")
    IMPLEMENTATION = sample.implementations()["cuda"]
    globals()[sys.argv[1]]()

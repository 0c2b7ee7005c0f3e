"""Log-probabilities: long rows, ties, and that a row's bits do not depend on its batch.

Run as a script it checks the Triton implementation: Triton's interpreter is chosen when triton is first imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from millrace.kernels import top_logprobs

CPU = top_logprobs.implementations()["cpu"]


def rows(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 5
    logits[::2, : vocab_size // 3] = -torch.inf
    return logits, torch.randint(vocab_size // 2, vocab_size, (num_rows,), generator=generator)


def assert_same(results, expected) -> None:
    torch.testing.assert_close(results[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1], expected[1]) and torch.equal(results[2], expected[2])


def assert_alone_as_in_a_batch(implementation, logits, token_ids, k: int) -> None:
    together = implementation(logits, token_ids, k)
    for row in range(len(logits)):
        alone = implementation(logits[row : row + 1], token_ids[row : row + 1], k)
        assert all(torch.equal(one[0], all_rows[row]) for one, all_rows in zip(alone, together, strict=True))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("k", [0, 1, 20, 64, 65, 300])
def test_cpu_agrees_on_long_rows_alone_and_in_a_batch(k):
    logits, token_ids = rows(7, 30_011)
    assert_same(CPU(logits, token_ids, k), top_logprobs.plain(logits, token_ids, k))
    assert_alone_as_in_a_batch(CPU, logits, token_ids, k)


def test_the_whole_vocabulary_can_be_asked_for():
    logits, token_ids = torch.arange(50.0).flip(0).reshape(1, -1), torch.tensor([3])
    logprobs, ids, ranks = CPU(logits, token_ids, 50)
    assert ids[0].tolist() == [3, *range(50)] and ranks.tolist() == [4]
    assert logprobs[0, 1:].exp().sum().item() == pytest.approx(1)


def test_of_tied_tokens_each_is_reported_once():
    logits = torch.zeros(1, 3000)
    logprobs, ids, ranks = CPU(logits, torch.tensor([2999]), 10)
    assert len(set(ids[0, 1:].tolist())) == 10 and ranks.tolist() == [1]
    assert logprobs.unique().item() == pytest.approx(-torch.tensor(3000.0).log().item())


def test_nan_gives_nan():
    logits = torch.zeros(2, 5)
    logits[0, 1] = torch.nan
    logprobs, _, _ = CPU(logits, torch.tensor([0, 0]), 2)
    assert logprobs[0].isnan().all() and logprobs[1].isfinite().all()


def test_triton_merges_chunks_and_gives_a_row_the_same_bits_in_any_batch():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-P", __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "5 chunks\n"), done.stderr


def main() -> None:
    """Compares rows of several chunks with the definition, and rows alone with rows in a batch."""
    implementation = top_logprobs.implementations()["cuda"]
    logits, token_ids = rows(3, 40_000)
    for k in (0, 5, 130):
        assert_same(implementation(logits, token_ids, k), top_logprobs.plain(logits, token_ids, k))
    assert_alone_as_in_a_batch(implementation, logits, token_ids, 5)
    split = sys.modules[implementation.__module__].split
    print(split(40_000)[0], "chunks")


if __name__ == "__main__":
    main()

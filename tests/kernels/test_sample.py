"""Sampling: the distribution of draws, and the independence of a draw from its batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.kernels import sample, sample_shard
from millrace.kernels.sample.exact import (
    LARGEST_NOISE,
    SMALLEST_NOISE,
    exp32,
    gumbel,
    log32,
    may_win,
    noise,
    random_bits,
    uniform,
)


def on_the_gpu(*arguments):
    return sample(*(argument.cuda() for argument in arguments)).cpu()


IMPLEMENTATIONS = [sample.plain, sample.implementations()["cpu"]]
each_implementation = pytest.mark.parametrize(
    "implementation", [*IMPLEMENTATIONS, pytest.param(on_the_gpu, marks=pytest.mark.gpu)], ids=lambda f: f.__name__
)

LOGITS = torch.tensor([2.0, 1.5, 0.0, -1.0, 1.0, 0.5, -torch.inf, -3.0])


def draw_tokens(implementation, logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=0, positions=0):
    """Draws one token per row; each parameter is one number, or a tensor with one per row."""
    columns = zip(
        (temperature, top_k, top_p, min_p, seeds, positions),
        (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64),
        strict=True,
    )
    return implementation(logits, *(torch.as_tensor(x).to(dtype).expand(len(logits)).clone() for x, dtype in columns))


def assert_follows(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Fails if such a deviation of draws has a probability of 1e-6 (chi-square, Wilson and Hilferty, 1931)."""
    counts = tokens.bincount(minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * len(tokens)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    if freedom:
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        assert z < 4.75


FILTERS = {
    "none": ({}, range(8)),
    "temperature": ({"temperature": 0.5}, range(8)),
    "top_k": ({"top_k": 3}, [0, 1, 4]),
    "top_p": ({"top_p": 0.7}, [0, 1, 4]),
    "min_p": ({"min_p": 0.3}, [0, 1, 4]),
    "min_p of one": ({"min_p": 1.0}, [0]),
    "top_p after top_k": ({"top_k": 3, "top_p": 0.75}, [0, 1]),
    "top_p after min_p": ({"min_p": 0.2, "top_p": 0.9}, [0, 1, 4, 5]),
}


@each_implementation
@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_softmax_of_what_is_kept(implementation, over, name):
    parameters, kept = FILTERS[name]
    num_draws = 20_000
    counter = {"seeds": torch.arange(num_draws), "positions": torch.arange(num_draws)}[over]
    tokens = draw_tokens(implementation, LOGITS.expand(num_draws, -1), **parameters, **{over: counter})
    scaled = torch.full_like(LOGITS, -torch.inf)
    scaled[list(kept)] = LOGITS[list(kept)] / parameters.get("temperature", 1.0)
    assert_follows(tokens, scaled.softmax(-1))


@each_implementation
def test_a_draw_does_not_depend_on_the_batch(implementation):
    torch.manual_seed(0)
    logits = torch.randn(40, 3000) * 3
    parameters = {
        "temperature": torch.rand(40) + 0.2,
        "top_k": torch.randint(0, 60, (40,)),
        "top_p": torch.rand(40) * 0.5 + 0.5,
        "min_p": torch.rand(40) * 0.1,
        "seeds": torch.randint(-(2**62), 2**62, (40,)),
        "positions": torch.arange(40),
    }
    parameters["temperature"][::7] = 0
    together = draw_tokens(implementation, logits, **parameters)
    order = torch.randperm(40)
    shuffled = draw_tokens(implementation, logits[order], **{name: value[order] for name, value in parameters.items()})
    assert torch.equal(shuffled, together[order])
    for row in (0, 7, 39):
        alone = draw_tokens(implementation, logits[row : row + 1], **{k: v[row] for k, v in parameters.items()})
        assert alone.item() == together[row]


@pytest.mark.usefixtures("two_threads")
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 400),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 100.0]),
    digits=st.sampled_from([0, 1, 6]),
)
@settings(deadline=None, max_examples=100)
def test_implementations_choose_the_very_same_ids(seed, vocab_size, spread, digits):
    generator = torch.Generator().manual_seed(seed)
    rows = 12
    # Few digits make many ties.
    logits = (torch.randn(rows, vocab_size, generator=generator) * spread).round(decimals=digits)
    arguments = (
        torch.rand(rows, generator=generator) * 2,
        torch.randint(-1, vocab_size + 5, (rows,), generator=generator).int(),
        torch.rand(rows, generator=generator) * 1.2,
        torch.rand(rows, generator=generator) * 0.2,
        torch.randint(0, 2**60, (rows,), generator=generator),
        torch.randint(0, 2**30, (rows,), generator=generator),
    )
    first, *others = (implementation(logits, *arguments) for implementation in IMPLEMENTATIONS)
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.usefixtures("two_threads")
def test_implementations_agree_on_a_real_vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(6, 50_257) * 3
    top_k, top_p = torch.tensor([0, 50, 0, 20, 50_000, 0]), torch.tensor([1.0, 1.0, 0.9, 0.8, 0.99, 0.9999])
    results = [draw_tokens(f, logits, top_k=top_k, top_p=top_p, seeds=torch.arange(6)) for f in IMPLEMENTATIONS]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws_over_a_real_vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(64, 151_936) * torch.linspace(0.1, 5, 64).unsqueeze(-1)
    parameters = {
        "temperature": torch.tensor([1.0, 0.7, 0.0, 1.5]).repeat(16),
        "top_k": torch.tensor([0, 50, 0]).repeat(22)[:64],
        "top_p": torch.tensor([1.0, 0.9, 0.99, 0.99995, 1.0]).repeat(13)[:64],
        "seeds": torch.arange(64),
    }
    expected = draw_tokens(sample, logits, **parameters)
    for num_rows in (64, 3, 1):
        rows = {name: value[:num_rows] for name, value in parameters.items()}
        assert torch.equal(draw_tokens(on_the_gpu, logits[:num_rows], **rows), expected[:num_rows])


def draw_in_shards(implementation, num_ranks, logits, temperature, min_p, seeds, positions):
    """Draws as ranks do that each have some columns, the last ones fewer, padded with minus infinity."""
    num_rows, vocab_size = logits.shape
    room = -(-vocab_size // num_ranks)
    peaks = logits.amax(-1)
    columns = torch.full((num_rows, num_ranks * room), -torch.inf)
    columns[:, :vocab_size] = logits
    shards = [part.contiguous() for part in columns.split(room, dim=1)]
    parts = [
        implementation(shard, rank * room, peaks, temperature, min_p, seeds, positions)
        for rank, shard in enumerate(shards)
    ]
    scores, token_ids = (torch.stack(part) for part in zip(*parts, strict=True))
    return token_ids.gather(0, scores.max(0, keepdim=True).indices)[0]


@pytest.mark.parametrize("implementation", [sample_shard.plain, sample_shard.implementations()["cpu"]])
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 300),
    num_ranks=st.integers(1, 5),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]),
    digits=st.sampled_from([0, 1, 6]),
)
@settings(deadline=None, max_examples=60)
def test_ranks_draw_together_what_one_draws_alone(implementation, seed, vocab_size, num_ranks, spread, digits):
    generator = torch.Generator().manual_seed(seed)
    rows = 8
    logits = (torch.randn(rows, vocab_size, generator=generator) * spread).round(decimals=digits)
    logits[0, 1:], logits[1] = -torch.inf, -torch.inf
    temperature = torch.rand(rows, generator=generator) * 2 + 0.01
    min_p = torch.rand(rows, generator=generator).mul(0.3).sub(0.1).clamp(min=0)
    seeds = torch.randint(0, 2**60, (rows,), generator=generator)
    positions = torch.randint(0, 2**30, (rows,), generator=generator)
    whole = draw_tokens(sample.plain, logits, temperature=temperature, min_p=min_p, seeds=seeds, positions=positions)
    assert torch.equal(
        draw_in_shards(implementation, num_ranks, logits, temperature, min_p, seeds, positions), whole.int()
    )


@each_implementation
def test_greedy_takes_the_lowest_of_several_best(implementation):
    logits = torch.tensor([[0.0, 3.0, 3.0], [3.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    assert draw_tokens(implementation, logits, temperature=0.0).tolist() == [1, 0, 0]


@each_implementation
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}], ids=str)
def test_ties_at_a_threshold_are_all_kept(implementation, filters):
    logits = torch.tensor([1.0, 1.0, 1.0, -5.0]).expand(300, -1)
    assert set(draw_tokens(implementation, logits, seeds=torch.arange(300), **filters).tolist()) == {0, 1, 2}


@each_implementation
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_best_gives_minus_one(implementation, temperature):
    logits = torch.zeros(5, 9)
    logits[1, 4], logits[2, 8], logits[3] = torch.nan, torch.inf, -torch.inf
    tokens = draw_tokens(implementation, logits, temperature=temperature, seeds=torch.arange(5))
    assert (tokens == -1).tolist() == [False, True, True, True, False]


def test_known_draws_stay_as_they_are():
    """A job that is resumed with a newer release must draw the same tokens."""
    assert random_bits(torch.tensor([5]), torch.tensor([7]), 4).tolist() == [
        [1241435289, 1439013770, 2537540674, 1902978517]
    ]


def test_bits_are_fair_and_independent():
    bits = random_bits(torch.arange(256), torch.full((256,), 3), 512)
    assert bits.unique().numel() > 0.999 * bits.numel()
    digits = ((bits.unsqueeze(-1) >> torch.arange(32)) & 1).double()
    error = 0.5 / math.sqrt(bits.numel())
    assert ((digits.mean((0, 1)) - 0.5).abs() < 5 * error).all()
    for axis in (0, 1):  # neighbours in seed, and in token id
        same = (digits.diff(dim=axis) == 0).double().mean((0, 1))
        assert ((same - 0.5).abs() < 5 * error).all()


def test_the_noise_is_gumbels():
    noise = gumbel(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096).double()
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772156649) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    for level in (-1.0, 0.0, 2.0, 6.0):
        assert abs((noise < level).double().mean().item() - math.exp(-math.exp(-level))) < 0.005


def bits_at_edges() -> Iterator[torch.Tensor]:
    """Yields the random bits where `uniform` is extreme or changes its resolution, and many others."""
    powers = torch.tensor([2**i for i in range(33)]).unsqueeze(-1)
    yield (powers + torch.arange(-2000, 2000)).clamp(0, 2**32 - 1)
    yield torch.arange(2**16)
    yield torch.randint(0, 2**32, (2**18,), generator=torch.Generator().manual_seed(0))


def all_bits() -> Iterator[torch.Tensor]:
    """Yields bits that give every number that `uniform` can give: float32 has 24 significant bits."""
    for start in range(0, 2**24, 2**21):
        yield start + torch.arange(2**21)
    for octave in range(24, 32):
        for start in range(0, 2**23, 2**21):
            yield 2**octave + 2 ** (octave - 23) * (start + torch.arange(2**21))
    yield torch.tensor([2**32 - 1])


@pytest.mark.parametrize("bits", [bits_at_edges, pytest.param(all_bits, marks=pytest.mark.soak)])
def test_no_token_that_can_win_is_rejected_early(bits):
    """The bounds are never below a score, for all random bits and for distances from 0 to beyond the span of noise."""
    smallest, largest = math.inf, -math.inf
    for part in bits():
        v = uniform(part.flatten())
        drawn = noise(v)
        smallest, largest = min(smallest, drawn.min().item()), max(largest, drawn.max().item())
        for distance in (0.0, 1e-30, 0.3, 2.0, 9.7, 20.0, 25.6):
            scaled = torch.tensor(-distance)
            score = scaled + drawn
            is_possible = score >= SMALLEST_NOISE
            assert may_win(v, scaled, score)[is_possible].all()
            # A bound without the margin would hold too, up to the rounding errors.
            assert may_win(v, scaled, score + 0.0009)[is_possible].all()
    assert (smallest, largest) == (SMALLEST_NOISE, LARGEST_NOISE)


def test_most_tokens_that_cannot_win_are_rejected_early():
    v = uniform(torch.arange(0, 2**32, 2**12))
    for best, scaled in ((0.0, -3.0), (5.0, 0.0), (SMALLEST_NOISE, -10.0), (10.0, -8.0)):
        wins = scaled + noise(v) >= best
        rejected = ~may_win(v, torch.tensor(scaled), torch.tensor(best))
        assert not (wins & rejected).any()
        assert (~wins & ~rejected).sum() < 0.002 * len(v) + 0.03 * wins.sum()


def test_exp32_and_log32_are_accurate():
    x = -torch.linspace(0, 80, 100_001)
    torch.testing.assert_close(exp32(x).double(), x.double().exp(), rtol=3e-7, atol=0)
    assert exp32(torch.tensor([-torch.inf])).item() < 1e-37
    y = torch.cat((torch.logspace(-30, 3, 100_000), 1 + torch.linspace(-1e-3, 1e-3, 1001)))
    torch.testing.assert_close(log32(y).double(), y.double().log(), rtol=4e-7, atol=0)

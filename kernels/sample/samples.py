"""Inputs for `sample`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample

_CASES: dict[str, tuple[list[float], list[int], list[float], list[float]]] = {
    # name: temperatures, top_k, top_p, min_p; row i takes entry i modulo the length
    "greedy": ([0.0], [0], [1.0], [0.0]),
    "plain draw": ([1.0, 0.7, 2.5], [0], [1.0], [0.0]),
    "top k": ([1.0], [1, 5, 50, 10**6], [1.0], [0.0]),
    "top p": ([1.0, 3.0], [0], [0.001, 0.3, 0.9, 0.999999], [0.0]),
    "min p": ([1.0], [0], [1.0], [0.05, 0.5, 1.0]),
    "all filters": ([0.8, 1.5], [3, 40, 0], [0.95, 0.5, 1.0, 0.7], [0.0, 0.01]),
    "greedy and drawn": ([0.0, 1.0], [0, 0, 7], [1.0, 0.9], [0.0]),
    "tiny temperature": ([1e-6, 1e-30], [0, 3], [0.9, 1.0], [0.0]),
}


def samples(draw: Draw) -> Iterator[Sample]:
    """Yields samples of `sample`: every kind of row, odd vocabularies, ties, masks, rows that cannot be sampled."""
    for num_rows, vocab_size in ((1, 1), (3, 63), (4, 500), (4, 1103)):
        logits = draw.normal(num_rows, vocab_size) * 4
        for name, case in _CASES.items():
            yield Sample(f"{name} {num_rows}x{vocab_size}", (logits, *_parameters(draw, num_rows, case)))
    for name, logits in _awkward_logits(draw).items():
        for case_name, case in _CASES.items():
            yield Sample(f"{name}, {case_name}", (logits, *_parameters(draw, len(logits), case)))


def _awkward_logits(draw: Draw) -> dict[str, Tensor]:
    masked = draw.normal(4, 300)
    masked[:, 7:] = -torch.inf
    impossible = draw.normal(5, 70)
    impossible[0, 3], impossible[1, 4], impossible[3] = torch.nan, torch.inf, -torch.inf
    return {
        "ties": (draw.normal(4, 300) * 2).round(),
        "all equal": draw.full(3.0, 3, 2100),
        "masked": masked,
        "impossible rows": impossible,
        "far apart": draw.normal(4, 400) * 1e4,
        "long tail": torch.cat((draw.normal(4, 3), draw.normal(4, 1500) * 0.01 - 40), dim=-1),
        "every other column": draw.normal(4, 200)[:, ::2],
        "no rows": draw.normal(0, 64),
    }


def _parameters(
    draw: Draw, num_rows: int, case: tuple[list[float], list[int], list[float], list[float]]
) -> tuple[Tensor, ...]:
    temperature, top_k, top_p, min_p = ([column[i % len(column)] for i in range(num_rows)] for column in case)
    return (
        draw.tensor(temperature, torch.float32),
        draw.tensor(top_k, torch.int32),
        draw.tensor(top_p, torch.float32),
        draw.tensor(min_p, torch.float32),
        draw.integers(-(2**63), 2**63 - 1, num_rows),
        draw.integers(0, 10**6, num_rows),
    )

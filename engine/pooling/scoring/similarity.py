"""Similarities of two texts: of their embeddings, by the functions of sentence-transformers, or of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import CheckpointError, quote

__all__ = ["SIMILARITIES", "Similarity", "cosine", "find_similarity", "max_sim"]

Similarity = Callable[[np.ndarray, np.ndarray], float]
"""Returns a number for two vectors, or for the vectors of all tokens; higher is more similar."""


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the cosine of the angle between two embeddings `[size]`; 0 if one of them is zero."""
    length = float(np.linalg.norm(first.astype(np.float64)) * np.linalg.norm(second.astype(np.float64)))
    return dot(first, second) / max(length, 1e-12)


def dot(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the dot product of two embeddings `[size]`."""
    return float(first.astype(np.float64) @ second.astype(np.float64))


def euclidean(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the negative distance of two embeddings `[size]`."""
    return -float(np.linalg.norm(first.astype(np.float64) - second))


def manhattan(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the negative sum of the differences between two embeddings `[size]`."""
    return -float(np.abs(first.astype(np.float64) - second).sum())


def max_sim(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the late interaction of ColBERT (Khattab and Zaharia, 2020).

    Each token of the first text is matched with the most similar token of the second; the dot products are added up.

    Args:
        first: `[num_tokens, size]`, vectors of the tokens of the query.
        second: `[num_tokens, size]`, vectors of the tokens of the document.
    """
    return float((first @ second.T).max(axis=1).sum(dtype=np.float64))


SIMILARITIES: dict[str, Similarity] = {"cosine": cosine, "dot": dot, "euclidean": euclidean, "manhattan": manhattan}
"""`similarity_fn_name` of a model of sentence-transformers -> the function."""


def find_similarity(name: Any) -> Similarity:
    """Returns the function that compares two embeddings of a model.

    Args:
        name: `similarity_fn_name` of the model's folder; None for the cosine.

    Raises:
        CheckpointError: There is no function of that name.
    """
    if name is None:
        return cosine
    if not isinstance(name, str) or name not in SIMILARITIES:
        raise CheckpointError(f"similarity_fn_name of the model is {quote(name)}; it can be {', '.join(SIMILARITIES)}")
    return SIMILARITIES[name]

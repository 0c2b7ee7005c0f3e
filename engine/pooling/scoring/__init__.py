"""Scores of pairs of texts: by the similarity of two embeddings, by a classifier, or by the vectors of all tokens."""

from .cross_encoder import ClassScoring
from .pairs import Pair, pair_up
from .scoring import Scoring, ScoringOptions
from .separate import EmbeddingScoring, LateScoring
from .similarity import SIMILARITIES, find_similarity

__all__ = [
    "SIMILARITIES",
    "ClassScoring",
    "EmbeddingScoring",
    "LateScoring",
    "Pair",
    "Scoring",
    "ScoringOptions",
    "find_similarity",
    "pair_up",
]

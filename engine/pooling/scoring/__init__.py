"""Scores of pairs of texts: by the similarity of two embeddings, by a classifier, or by the vectors of all tokens."""

from .cross_encoder import ClassScoring
from .pairs import pair_up
from .scoring import Scoring, ScoringOptions, ScoringPlan
from .separate import EmbeddingScoring, LateScoring
from .similarity import SIMILARITIES, find_similarity

__all__ = [
    "SIMILARITIES",
    "ClassScoring",
    "EmbeddingScoring",
    "LateScoring",
    "Scoring",
    "ScoringOptions",
    "ScoringPlan",
    "find_similarity",
    "pair_up",
]

"""The pairs of a row: where its texts are looked for, and what a row without them is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from millrace.engine import PoolingOutput, PoolingRequestOutput
from millrace.engine.errors import PromptTypeError
from millrace.engine.pooling.scoring import EmbeddingScoring
from millrace.pipeline.pooling.pairs import Pairs, ScoreAnswers


@pytest.mark.parametrize(
    ("row", "names", "pairs", "are_listed"),
    [
        ({"text_1": "a", "text_2": "b", "query": "q"}, None, [("a", "b")], False),
        ({"query": "q", "document": "d"}, None, [("q", "d")], False),
        ({"query": "q", "documents": np.array(["d", "e"], object)}, None, [("q", "d"), ("q", "e")], True),
        ({"text_1": ("a", "b"), "text_2": ["c", "d"]}, None, [("a", "c"), ("b", "d")], True),
        ({"text_1": "a", "text_2": "b", "x": "", "y": ["z"]}, ("x", "y"), [("", "z")], True),
    ],
)
def test_a_row_has_the_pairs_of_its_columns(
    row: dict[str, Any], names: tuple[str, str] | None, pairs: list[tuple[str, str]], are_listed: bool
) -> None:
    found = Pairs.of(row, names)
    assert ([tuple(side.text for side in pair.sides) for pair in found.texts], found.are_listed) == (pairs, are_listed)


@pytest.mark.parametrize(
    ("row", "names", "said"),
    [
        ({"text_1": "a", "doc": "b"}, None, "score needs two columns of texts: 'text_1' and 'text_2', or 'query'"),
        ({"text_1": "a"}, ("text_1", "b"), "the row has no column 'b'; its columns are: text_1"),
        ({"text_1": "a", "text_2": None}, None, "column 'text_2' must be a text or a list of texts"),
        ({"text_1": "a", "text_2": []}, None, "at least one; got []"),
        ({"text_1": "a", "text_2": ["b", 3]}, None, "column 'text_2' must be a text or a list of texts"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, None, "lists of the same length; got 2 and 3"),
    ],
)
def test_a_row_without_pairs_is_told_why(row: dict[str, Any], names: tuple[str, str] | None, said: str) -> None:
    with pytest.raises(PromptTypeError) as raised:
        Pairs.of(row, names)
    assert said in str(raised.value)


def test_a_list_of_texts_has_a_list_of_scores() -> None:
    def answer(vectors: Any, **row: Any) -> Any:
        output = PoolingRequestOutput("r", PoolingOutput(np.array(vectors, np.float32)), [1])
        return ScoreAnswers(EmbeddingScoring()).of(output, row)["score"]

    assert answer([[3, 0], [1, 1]], text_1="a", text_2="b") == pytest.approx(0.5**0.5)
    several = answer([[3, 0], [1, 1], [0, 1]], text_1="a", text_2=["b", "c"])
    assert several == pytest.approx([0.5**0.5, 0.0])

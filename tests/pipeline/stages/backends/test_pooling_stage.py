"""The requests of pooling stages: parameters of the task, of the processor and of the row, and prompts of pairs."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.engine import PoolingParams
from millrace.engine.errors import PoolingParamsError, PromptTypeError
from millrace.engine.inputs import ParsedPrompt
from millrace.engine.pooling.scoring import EmbeddingScoring
from millrace.pipeline.pooling.answers import VectorAnswers
from millrace.pipeline.pooling.pairs import ScoreAnswers
from millrace.pipeline.stages.adapters import AdapterNames
from millrace.pipeline.stages.backends.pooling import PoolingStage, ScoreStage

SETTINGS: dict[str, Any] = {"adapters": AdapterNames(("m",)), "task_params": {"task": "embed"}}


def test_a_row_sets_its_parameters_within_the_size_of_all() -> None:
    default = PoolingParams(task="embed", dimensions=8)
    free, fixed = (
        PoolingStage(None, answers=VectorAnswers(), params=default, has_fixed_size=is_fixed, **SETTINGS)  # type: ignore[arg-type]
        for is_fixed in (False, True)
    )

    def asked(stage: PoolingStage, given: Any) -> PoolingParams:
        return stage.make_request("r", "text", None, {"pooling_params": given}).pooling_params

    assert asked(fixed, None) is default
    assert asked(free, {"dimensions": 4, "use_activation": None}) == PoolingParams(task="embed", dimensions=4)
    assert asked(fixed, {"use_activation": False}) == PoolingParams("embed", 8, use_activation=False)
    assert asked(fixed, PoolingParams(dimensions=8)) == default
    with pytest.raises(PoolingParamsError, match="dimensions=4, but the vectors of all rows have one length here"):
        asked(fixed, {"dimensions": 4})
    with pytest.raises(PoolingParamsError, match="must be a dict or PoolingParams; got int 3"):
        asked(free, 3)


def test_a_request_holds_the_prompts_of_all_pairs_of_its_row() -> None:
    class Joined(EmbeddingScoring):
        """A scoring of pairs as token ids, of which one text cannot be read."""

        def prompts(self, pairs: Any) -> Any:
            """Returns the lengths of the texts as tokens."""
            broken = PromptTypeError("no text")
            texts = [tuple(side.text for side in pair.sides) for pair in pairs]
            return [broken if "bad" in pair else ParsedPrompt(token_ids=list(map(len, pair))) for pair in texts]

    def stage(scoring: Any) -> ScoreStage:
        answers = ScoreAnswers(scoring)
        return ScoreStage(None, scoring=scoring, answers=answers, params=PoolingParams(), **SETTINGS)  # type: ignore[arg-type]

    row = {"query": "a", "documents": ["bc", "def"]}
    apart = stage(EmbeddingScoring()).make_request("r", None, None, row)
    assert apart.prompts == ["a", "bc", "def"]
    assert stage(Joined()).make_request("r", None, None, row).prompts == [[1, 2], [1, 3]]
    with pytest.raises(PromptTypeError, match="no text"):
        stage(Joined()).make_request("r", None, None, {"query": "a", "documents": ["b", "bad"]})

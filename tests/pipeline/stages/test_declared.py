"""The stages that the files of the room declare, and what follows from the declarations."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from millrace.pipeline import EngineProcessorConfig
from millrace.pipeline.processor import config as config_module
from millrace.pipeline.processor.engine_stages import stages_on
from millrace.pipeline.stages import declared
from millrace.pipeline.stages.declaration import Side


def test_every_file_of_the_room_declares_a_stage() -> None:
    files = [path for path in Path(declared.__file__).parent.glob("*.py") if path.name != "__init__.py"]
    assert len(declared.STAGES) == len(files) >= 5


@pytest.mark.parametrize("what", ["place", "field", "name"])
def test_no_two_stages_share_a_place_a_field_or_a_name(what: str) -> None:
    values = [getattr(stage, what) for stage in declared.STAGES]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("stage", declared.STAGES, ids=lambda stage: stage.name)
def test_a_declared_stage_has_a_field_that_switches_it(stage: Any) -> None:
    parser = {"parser": next(iter(stage.config.formats))} if hasattr(stage.config, "formats") else {}
    for enabled in (True, False):
        config = EngineProcessorConfig(model_source="somewhere", **{stage.field: {"enabled": enabled, **parser}})
        assert (stage.name in [spec.info.name for spec in stages_on(stage.side, config)]) == enabled


def test_stages_that_read_generated_text_do_not_run_where_none_is_generated() -> None:
    config = EngineProcessorConfig(model_source="somewhere", task_type="embed")
    assert stages_on(Side.AFTER_ENGINE, config) == []
    assert [spec.info.name for spec in stages_on(Side.BEFORE_ENGINE, config)] == ["ChatTemplateStage", "TokenizeStage"]


def test_the_fields_that_editors_show_are_the_declared_ones() -> None:
    tree = ast.parse(inspect.getsource(config_module))
    (shown,) = [one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == "StageFields"]
    lines = [one for one in shown.body if isinstance(one, ast.AnnAssign)]
    assert lines
    for line in lines:
        field = EngineProcessorConfig.model_fields[ast.unparse(line.target)]
        assert field.annotation is not None
        assert field.annotation.__name__ == ast.unparse(line.annotation)
        assert line.value is not None
        assert field.default == eval(ast.unparse(line.value), vars(config_module))

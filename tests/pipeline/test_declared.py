"""Formats declare themselves: a module of a folder is in every list, and nothing else names it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from millrace.engine.errors import ConfigError
from millrace.pipeline import JobConfig
from millrace.pipeline.declared import Declared
from millrace.pipeline.sinks.format import SinkFormat
from millrace.pipeline.sinks.formats import FORMATS as SINK_FORMATS
from millrace.pipeline.sinks.formats import OutputFormat
from millrace.pipeline.sources.format import SourceFormat, TableKind
from millrace.pipeline.sources.formats import FORMATS as SOURCE_FORMATS
from millrace.pipeline.sources.formats import InputFormat
from millrace.pipeline.sources.tables import TABLES


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Declared[int]]:
    """A package with two modules, each of which declares a number of corners."""
    package = tmp_path / "shapes_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "square.py").write_text("CORNERS = 4\n")
    (package / "broken.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Declared(package.name, [str(package)], "CORNERS", "shape")
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def test_a_module_is_imported_when_its_thing_is_asked_for(shapes: Declared[int]) -> None:
    assert shapes.names == ("broken", "square")
    assert shapes["square"] == 4
    with pytest.raises(RuntimeError, match="imported"):
        shapes["broken"]


def test_an_unknown_name_lists_the_known_ones(shapes: Declared[int]) -> None:
    with pytest.raises(ConfigError, match="shape must be one of broken, square; got 'circle'"):
        shapes["circle"]


def test_every_module_declares_what_its_folder_is_for() -> None:
    assert {type(format) for _, format in SINK_FORMATS.items()} == {SinkFormat}
    assert all(isinstance(format, SourceFormat) for _, format in SOURCE_FORMATS.items())
    assert {type(kind) for _, kind in TABLES.items()} == {TableKind}
    assert all(kind.file_format in SOURCE_FORMATS.names for _, kind in TABLES.items())


def test_no_two_formats_of_input_share_an_extension() -> None:
    extensions = [extension for _, format in SOURCE_FORMATS.items() for extension in format.extensions]
    assert len(extensions) == len(set(extensions))


def test_a_job_takes_every_format_and_refuses_others() -> None:
    assert get_args(OutputFormat) == SINK_FORMATS.names
    assert set(get_args(InputFormat)) == {*SOURCE_FORMATS.names, *TABLES.names}
    places = {"model": "m", "input": "in", "output": "out", "prompt": "{line}"}
    for name in SINK_FORMATS.names:
        assert JobConfig(**places, output_format=name).output_format == name
    for name in (*SOURCE_FORMATS.names, *TABLES.names):
        assert JobConfig(**places, format=name).format == name
    with pytest.raises(ConfigError, match=r"JobConfig\.output_format: input should be 'arrow', 'csv'"):
        JobConfig(**places, output_format="orc")

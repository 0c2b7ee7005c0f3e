"""The catalog lists every family that the registry knows, and docs/models.md is up to date."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from millrace.engine import model_catalog
from millrace.engine.models import supported_architectures

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_every_architecture_is_in_the_catalog_once() -> None:
    names = [name for entry in model_catalog() for name in entry.architectures]
    assert sorted(names) == supported_architectures()
    assert len(set(names)) == len(names)


def test_the_page_of_models_is_up_to_date() -> None:
    index = runpy.run_path(str(DOCS / "model_index.py"))["index"]()
    assert (DOCS / "models.md").read_text(encoding="utf-8") == index, "run `make docs`"


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("LlamaForCausalLM", "full attention, rotary positions"),
        ("Gemma2ForCausalLM", "full attention and windows, rotary positions"),
        ("OPTForCausalLM", "full attention, learned positions"),
    ],
)
def test_the_layers_of_a_family_are_those_of_its_default_config(architecture: str, layers: str) -> None:
    (entry,) = [entry for entry in model_catalog() if architecture in entry.architectures]
    assert entry.layers == layers

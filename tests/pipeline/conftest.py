"""Settings without a model, and stand-ins for the engine side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from millrace.pipeline import EngineProcessorConfig, Processor
from millrace.pipeline.processor.engine_backend import EngineBackend
from millrace.pipeline.processor.engine_stages import engine_stages

sys.path.insert(0, str(Path(__file__).parent))

import fake_client

# Workers cannot import from the tests, so the stand-ins travel as they are.
cloudpickle.register_pickle_by_value(fake_client)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that passes for a model wherever no weights are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def make_config(model_folder: Path) -> Callable[..., EngineProcessorConfig]:
    """Makes settings of a processor whose stages need no tokenizer."""

    def make(**changes: Any) -> EngineProcessorConfig:
        off = {"chat_template_stage": False, "tokenize_stage": False, "detokenize_stage": False}
        fields = {"model_source": str(model_folder), "batch_size": 16, "should_continue_on_error": True, **off}
        return EngineProcessorConfig(**{**fields, **changes})

    return make


@pytest.fixture
def make_processor(make_config: Callable[..., EngineProcessorConfig]) -> Callable[..., Processor]:
    """Makes a processor whose engine reads the prompt back."""

    def make(preprocess: Any = None, postprocess: Any = None, pool: Any = None, **changes: Any) -> Processor:
        config = make_config(**changes)
        backend = EngineBackend(
            config, start_pool=lambda config: pool or fake_client.FakePool(), make_client=fake_client.EchoClient
        )
        return Processor(config, engine_stages(config, backend), preprocess, postprocess)

    return make

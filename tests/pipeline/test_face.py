"""The names of the pipeline's face: scripts for Ray Data LLM find theirs, and a name loads nothing large."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import millrace.pipeline

HEAVY = ("torch", "transformers", "vllm", "ray.serve", "aiohttp")


@pytest.mark.parametrize("name", ["HttpRequestProcessorConfig", "ServeDeploymentProcessorConfig", "build_processor"])
def test_importing_a_name_loads_nothing_heavy(name: str, tmp_path: Path) -> None:
    code = f"import sys; from millrace.pipeline import {name}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_ray_data_llm_is_here() -> None:
    theirs = {
        "ProcessorConfig", "Processor", "SGLangEngineProcessorConfig", "HttpRequestProcessorConfig",
        "vLLMEngineProcessorConfig",
        "ServeDeploymentProcessorConfig", "ChatTemplateStageConfig", "DetokenizeStageConfig",
        "PrepareMultimodalStageConfig", "TokenizerStageConfig", "HttpRequestStageConfig", "build_processor",
    }  # fmt: skip
    assert theirs <= set(millrace.pipeline.__all__)

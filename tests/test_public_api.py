"""The public names of the package, and the cost of importing it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FACES = ("millrace", "millrace.actors", "millrace.engine", "millrace.kernels", "millrace.pipeline")

BLOCK_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
"""


def run_python(code: str, cwd: Path) -> str:
    """Runs code in a process of its own, where nothing is imported yet, and returns what it prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("face", FACES)
def test_all_is_sorted_and_there(face: str) -> None:
    module = importlib.import_module(face)
    constants = sorted(name for name in module.__all__ if name.isupper())
    classes = sorted(name for name in module.__all__ if name[0].isupper() and not name.isupper())
    rest = sorted(name for name in module.__all__ if name not in {*constants, *classes})
    assert list(module.__all__) == [*constants, *classes, *rest]
    assert not [name for name in module.__all__ if getattr(module, name, None) is None]


@pytest.mark.parametrize("face", FACES)
def test_dir_shows_what_is_exported(face: str) -> None:
    module = importlib.import_module(face)
    assert set(module.__all__) <= set(dir(module))


def test_the_two_ways_to_build_a_processor_and_its_config_are_there() -> None:
    import millrace

    assert millrace.vLLMEngineProcessorConfig is millrace.EngineProcessorConfig
    assert {"build_llm_processor", "build_processor", "LLM", "SamplingParams"} <= set(millrace.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    import millrace

    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        millrace.LMM  # noqa: B018


def test_import_is_light(tmp_path: Path) -> None:
    heavy = run_python(
        "import sys, millrace; print([m for m in ('ray', 'torch', 'transformers', 'pyarrow') if m in sys.modules])",
        tmp_path,
    )
    assert heavy == "[]"


def test_llm_is_there_without_ray(tmp_path: Path) -> None:
    use_llm = "from millrace import LLM, SamplingParams, RequestOutput; print(LLM.__name__, 'ray' in sys.modules)"
    assert run_python(BLOCK_RAY + use_llm, tmp_path) == "LLM False"


def test_checkout_on_the_path_does_not_disturb_transformers(root: Path) -> None:
    use_transformers = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert run_python(f"import sys; sys.path.insert(0, {str(root)!r}); {use_transformers}", root) == "LlamaForCausalLM"

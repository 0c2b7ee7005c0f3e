"""Every script in examples/ runs to its end, as a user would start it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SCENARIOS = sorted((ROOT / "examples" / "ray_data_llm").glob("*.py"))

RUN_SCENARIOS = """
import contextlib, io, json, runpy, sys, traceback
import ray, ray.data
from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
# Open from the first scenario to the last, so that all that run this engine share one replica.
with build_processor(vLLMEngineProcessorConfig(model_source="bundled:invoices")) as processor:
    processor(ray.data.range(1))
    for script in sys.argv[1:]:
        shown, problem = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(shown):
                runpy.run_path(script, run_name="__main__")
        except BaseException:
            problem = traceback.format_exc()
        print(json.dumps({"script": script, "shown": shown.getvalue(), "problem": problem}), flush=True)
"""

QUICK = {"01_quickstart", "07_row_errors", "18_structured_output"}
"""Scenarios of `make test`; `make test-soak` runs all."""

SHOWN = {
    "02_replicas": "concurrency (1, 2) is 1 to 2 replicas",
    "03_text_generation": '{"id": 2, "answers": ["',
    "05_tokenization": "in the engine: ['ChatTemplateStage', 'GenerateStage']",
    "07_row_errors": 'bad ["far too long for the model far", "',
    "08_checkpoint": "40 rows in, 40 answers",
    "13_shared_engine": "pools of engines: 1",
    "14_multi_turn": '"second": "',
    "16_embeddings": '"dimensions": 64, "cosine": ',
    "17_classification": '"label": "invoice", "probability": 0.',
    "18_structured_output": '{"line": "Thank you for your visit!", "answer": "{\\"invoice\\":',
}
"""Text that the output of a scenario must contain."""


def test_there_are_examples() -> None:
    assert SCRIPTS
    assert SCENARIOS


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "an example shows something"


@pytest.fixture(scope="module")
def scenarios(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of the selected scenarios, which run one after the other in one process, on one Ray."""
    params = [item.callspec.params for item in request.session.items if "scenarios" in item.fixturenames]
    scripts = [str(ROOT / "examples" / "ray_data_llm" / f"{one['name']}.py") for one in params]
    command = [sys.executable, "-P", "-c", RUN_SCENARIOS, *scripts]
    folder = tmp_path_factory.mktemp("scenarios")
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"script"')]
    assert len(lines) == len(scripts), ran.stderr
    return {Path(one["script"]).stem: one for one in lines}


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Returns the marks of a scenario's test."""
    soak = [] if name in QUICK else [pytest.mark.soak]
    no_serve = importlib.util.find_spec("starlette") is None
    return [*soak, *([pytest.mark.skipif(no_serve, reason="needs ray[serve]")] if "serve" in name else [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(path.stem, marks=marks(path.stem)) for path in SCENARIOS])
def test_scenario_of_ray_data_llm_runs(name: str, scenarios: dict[str, dict[str, Any]]) -> None:
    assert not scenarios[name]["problem"]
    assert SHOWN.get(name, "answer") in scenarios[name]["shown"]


def test_scenarios_use_what_ray_data_llm_has_too() -> None:
    import ray.data.llm

    for path in SCENARIOS:
        imports = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        names = [alias.name for node in imports if node.module == "millrace.pipeline" for alias in node.names]
        assert names
        assert set(names) <= set(ray.data.llm.__all__), path.name


def test_the_page_for_users_of_ray_data_llm_names_every_scenario() -> None:
    page = (ROOT / "docs" / "ray_data_llm.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\(\.\./examples/ray_data_llm/(\w+)\.py\)", page)) == [path.stem for path in SCENARIOS]

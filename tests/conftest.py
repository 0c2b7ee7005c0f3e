"""The fixtures of all tests: the package, found with or without an install; tiny models; the marker for GPU tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3 import S3Server

# Tiny models gain nothing from threads, and on a busy machine threads that wait for each other lose a lot. Torch reads
# the variable when it is first imported, here and in every process that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


def register_checkout() -> None:
    """Makes the checkout importable as `millrace`, so that tests that need neither Ray nor the CLI run uninstalled."""
    spec = importlib.util.spec_from_file_location(
        "millrace", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["millrace"] = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("millrace") is None:
    register_checkout()


def pytest_report_header() -> str:
    """Returns the line that names the package under test, because an install may come from another checkout."""
    import millrace

    return f"millrace {millrace.__version__} from {millrace.__path__[0]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` on a machine without a GPU; torch is loaded only if there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The name of a device: a test with this fixture runs on the CPU, and on a GPU if there is one."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to the folder of a tiny random checkpoint, built once a session."""
    folders: dict[str, Path] = {}

    def build(family: str) -> Path:
        from checkpoints import tiny_checkpoint

        if family not in folders:
            folder = tmp_path_factory.mktemp("tiny") / family
            tiny_checkpoint(folder, family)
            folders[family] = folder
        return folders[family]

    return build


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A server of the S3 API on loopback."""
    from s3 import start_s3

    with start_s3() as server:
        yield server


@pytest.fixture
def cluster() -> None:
    """A local Ray with two CPUs, like a small laptop. The first test that needs it starts it; later tests share it."""
    import ray

    if not ray.is_initialized():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False


@pytest.fixture(scope="session", autouse=True)
def end_of_ray() -> Iterator[None]:
    """Ends Ray after the last test, if any test has started it."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()

"""Models by their name on a hub: what is downloaded, from where, and what errors say."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import make_adapter
from checkpoints import tiny_checkpoint
from hub import Hub, start_hub
from millrace.engine.checking.model_check import check_model
from millrace.engine.errors import AdapterError, CheckpointError, ConfigError, StorageError
from millrace.engine.llm import LLM
from millrace.engine.loading import hub as module
from millrace.engine.loading.hub import HubSettings
from millrace.engine.loading.model_source import locate_model, resolve_model, resolve_tokenizer
from millrace.engine.lora.files import locate_adapter, read_files
from millrace.engine.weights.checkpoint import checkpoint_files
from running import one

SETTINGS = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 20}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for Hugging Face's, with an empty cache."""
    from huggingface_hub import constants

    with start_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        module._fetch.cache_clear()
        yield hub
        module._fetch.cache_clear()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama", shards=2)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """The folder of a repository, with files that are not to be downloaded."""
    folder = Path(shutil.copytree(llama, tmp_path / "repository"))
    for name in ("pytorch_model.bin", "original/model.safetensors", "flax_model.msgpack", "picture.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"0" * 100)
    return folder


def test_a_model_runs_by_its_name(folder: Path, llama: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/tiny"] = {"main": folder}
    with LLM("org/tiny", **SETTINGS, download_dir=str(tmp_path / "here")) as llm, LLM(str(llama), **SETTINGS) as local:
        assert one(llm, max_tokens=5).token_ids == one(local, max_tokens=5).token_ids
    assert {name for name in hub.downloaded if name.endswith((".safetensors", ".bin", ".png", ".msgpack"))} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert len(hub.downloaded) == len(set(hub.downloaded))
    assert (tmp_path / "here").is_dir()
    assert not (tmp_path / "cache").exists()


def test_weights_wait_until_they_are_needed(folder: Path, hub: Hub) -> None:
    hub.repositories["org/tiny"] = {"main": folder}
    assert (resolve_model("org/tiny") / "config.json").is_file()
    assert (resolve_tokenizer("org/tiny") / "tokenizer.json").is_file()
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]
    assert len(checkpoint_files(locate_model("org/tiny"))) == 2


def test_pickles_are_taken_where_there_are_no_safetensors(folder: Path, hub: Hub) -> None:
    hub.repositories["org/tiny"] = {"main": folder}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (file,) = checkpoint_files(locate_model("org/tiny"))
    assert file.name == "pytorch_model.bin"


def test_a_revision_is_a_version_of_its_own(folder: Path, hub: Hub, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "config.json").write_text('{"other": 1}')
    hub.repositories["org/tiny"] = {"main": folder, "v2": other}
    assert "other" not in (resolve_model("org/tiny") / "config.json").read_text()
    assert "other" in (resolve_model("org/tiny", HubSettings("v2")) / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"model 'org/tiny' is no local folder, .* has no revision 'v3'"):
        resolve_model("org/tiny", HubSettings("v3"))


def test_the_check_reads_the_revision_that_it_is_given(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "checks"))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "config.json").write_text('{"other": 1}')
    hub.repositories["org/tiny"] = {"main": other, "v2": folder}
    options = {"prompts": ["The mill"], "max_tokens": 2, "shows_progress": False, "device": "cpu"}
    found = check_model("org/tiny", revision="v2", download_dir=str(tmp_path / "downloads"), **options)
    assert found.is_good
    assert not (tmp_path / "cache").exists(), "everything is in the download_dir"
    with pytest.raises(CheckpointError, match="model_type"):
        check_model("org/tiny", **options)


def test_a_local_folder_wins_over_a_name(folder: Path, hub: Hub, tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(folder, tmp_path / "org" / "tiny")
    with caplog.at_level(logging.WARNING, "millrace"), LLM("org/tiny", revision="v2", **SETTINGS):
        pass
    assert "revision: ignored, because 'org/tiny' is not downloaded from a hub" in caplog.text
    assert not hub.downloaded


def test_a_gguf_file_of_a_repository_is_downloaded_alone(llama: Path, hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    (tmp_path / "r").mkdir()
    plain = tiny_checkpoint(tmp_path / "plain", "llama")
    for name in ("a-Q4.gguf", "a-Q8.gguf"):
        write_gguf(plain, tmp_path / "r" / name, "llama")
    hub.repositories["org/tiny-GGUF"] = {"main": tmp_path / "r"}
    with LLM("org/tiny-GGUF/a-Q8.gguf", **SETTINGS) as llm:
        assert len(one(llm, max_tokens=3, ignore_eos=True).token_ids) == 3
    assert hub.downloaded == ["a-Q8.gguf"]
    with pytest.raises(ConfigError, match=r"holds no config\.json; .* name one, as in org/tiny-GGUF/FILE\.gguf"):
        resolve_model("org/tiny-GGUF")
    with pytest.raises(ConfigError, match=r"'org/tiny-GGUF' holds no file 'b\.gguf'"):
        resolve_model("org/tiny-GGUF/b.gguf")


def test_a_gated_repository_asks_for_a_token(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/tiny"] = {"main": folder}
    hub.gated.add("org/tiny")
    with pytest.raises(ConfigError, match="is gated; ask for access on its page, and set HF_TOKEN"):
        resolve_model("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve_model("org/tiny").is_dir()
    assert "Bearer hf_secret" in hub.tokens


def test_a_name_that_is_not_there_is_one_clear_error(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="tokenizer 'org/absent' is no local folder, and no public repository"):
        resolve_tokenizer("org/absent", what="tokenizer")


def test_a_hub_that_cannot_be_reached_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="'org/tiny' is no local folder, and the hub cannot be reached"):
        resolve_model("org/tiny")


RUN = """
import sys
from millrace.engine import resolve_model
from millrace.engine.errors import MillraceError
try:
    print(resolve_model("org/tiny"))
except MillraceError as error:
    print(type(error).__name__, error)
"""


def test_offline_the_cache_is_read_and_nothing_else(folder: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/tiny"] = {"main": folder}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def run(**changes: str) -> str:
        command = [sys.executable, "-P", "-c", RUN]
        done = subprocess.run(command, env={**environment, **changes}, capture_output=True, text=True, check=True)
        return done.stdout

    assert "ConfigError model 'org/tiny' is no local folder, and the cache of the hub lacks files" in run()
    assert "hf download org/tiny" in run()
    online = run(HF_HUB_OFFLINE="0")
    num_downloads = len(hub.downloaded)
    assert num_downloads
    assert run() == online
    assert len(hub.downloaded) == num_downloads


@pytest.mark.parametrize("variable", ["MILLRACE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"])
def test_modelscope_takes_the_place_of_the_hub(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(model_id: str, **options: Any) -> str:
        calls.append({"model_id": model_id, **options})
        return str(folder)

    monkeypatch.setenv(variable, "true")
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub", types.ModuleType("modelscope.hub"))
    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", fake)
    assert locate_model("org/tiny", HubSettings("v2", "there")).url == str(folder)
    assert [one["model_id"] for one in calls] == ["org/tiny", "org/tiny"]
    assert {"revision": "v2", "cache_dir": "there", "local_files_only": False}.items() <= calls[1].items()
    assert "*.safetensors" in calls[1]["allow_patterns"]
    assert "*.safetensors" not in calls[0]["allow_patterns"]
    assert not hub.downloaded


def test_without_modelscope_an_error_says_what_to_install(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install modelscope"):
        resolve_model("org/tiny")


@pytest.mark.parametrize("is_pickle", [False, True])
def test_an_adapter_is_downloaded_by_its_name(llama: Path, hub: Hub, tmp_path: Path, *, is_pickle: bool) -> None:
    folder = make_adapter(tmp_path / "repository", llama)
    kept, other = "adapter_model.safetensors", "adapter_model.bin"
    if is_pickle:
        kept, other = other, kept
        torch.save(load_file(folder / other), folder / kept)
        (folder / other).unlink()
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    hub.repositories["org/tune"] = {"main": folder}
    found = locate_adapter("org/tune", str(tmp_path / "here"))
    assert read_files(found, 1 << 20).digest == read_files(locate_adapter(str(folder)), 1 << 20).digest
    assert sorted(hub.downloaded) == ["adapter_config.json", kept]
    assert (tmp_path / "here").is_dir()
    with pytest.raises(ConfigError, match="adapter 'org/none' is no local folder"):
        locate_adapter("org/none")
    with pytest.raises(AdapterError, match="a name on a hub"):
        locate_adapter("none")

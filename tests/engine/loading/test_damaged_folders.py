"""A model folder whose files hold nonsense is refused by a short error, before memory is taken for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_checkpoint
from millrace.engine.errors import CheckpointError, ConfigError, UnsupportedModelError, UserError
from millrace.engine.llm import LLM
from running import one

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model, tmp_path: Path) -> Path:
    """A copy of a valid folder."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def fields(name: str, **values: Any) -> Change:
    """Returns the change of some fields of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **values}))

    return change


def content(name: str, data: bytes) -> Change:
    """Returns the change of a whole file."""
    return lambda folder: (folder / name).write_bytes(data)


def make_folder(name: str) -> Change:
    """Returns the change that puts a folder in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


FAULTS = [
    (fields("config.json", intermediate_size=2**12), CheckpointError, "has shape .* config.json asks for"),
    (fields("config.json", hidden_size=2**31 - 4, head_dim=16), ConfigError, "check the sizes in config.json"),
    (fields("config.json", vocab_size=2**31 - 1), UserError, "config.json"),
    (fields("config.json", max_position_embeddings=2**31 - 1), ConfigError, "max_position_embeddings"),
    (fields("config.json", num_hidden_layers=1001), UnsupportedModelError, "'num_hidden_layers' is 1001"),
    (
        fields("config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1e38}),
        UnsupportedModelError,
        "its positions are more than",
    ),
    (fields("config.json", dtype="int8"), UnsupportedModelError, "'dtype' is torch.int8"),
    (fields("config.json", architectures=["x" * 5000]), UnsupportedModelError, "architectures"),
    (fields("config.json", eos_token_id="2"), UserError, "eos_token_id"),
    (fields("generation_config.json", eos_token_id=[2, "3"]), CheckpointError, "eos_token_id"),
    (fields("generation_config.json", eos_token_id=True), CheckpointError, "eos_token_id"),
    (content("generation_config.json", b"\xff\xfe{"), CheckpointError, "generation_config.json cannot be read"),
    (content("generation_config.json", b"[" * 100_000), CheckpointError, "generation_config.json cannot be read"),
    (content("generation_config.json", b"[]"), CheckpointError, "must hold a JSON object"),
    (make_folder("generation_config.json"), CheckpointError, "generation_config.json cannot be read"),
    (make_folder("config.json"), CheckpointError, "config.json cannot be read"),
    (fields("tokenizer_config.json", tokenizer_class=5), ConfigError, "no tokenizer could be"),
    (content("tokenizer.json", b"{"), ConfigError, "no tokenizer could be loaded from .*/tokenizer.json:"),
    (fields("tokenizer.json", model={"type": "BPE"}), ConfigError, "loaded from .*/tokenizer.json:"),
    (content("tokenizer_config.json", b"\xff{"), ConfigError, "loaded from .*/tokenizer_config.json:"),
    (content("tokenizer_config.json", b"[]"), ConfigError, "loaded from .*/tokenizer_config.json:"),
]


@pytest.mark.parametrize(("change", "kind", "message"), FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_a_damaged_folder_is_a_short_error(folder, change, kind, message):
    change(folder)
    with pytest.raises(kind, match=message) as caught:
        LLM(str(folder), device="cpu")
    assert len(str(caught.value)) < 2500  # An unknown architecture is told all that are known.


@pytest.mark.parametrize("weight_map", [{}, [], None, {"a": 5}, {"a": None}, {"a": "x" * 5000}], ids=str)
def test_a_damaged_index_is_a_short_error(tmp_path, weight_map):
    folder = tiny_checkpoint(tmp_path / "model", "llama", shards=2)
    fields("model.safetensors.index.json", weight_map=weight_map)(folder)
    with pytest.raises(CheckpointError, match="index") as caught:
        LLM(str(folder), device="cpu")
    assert len(str(caught.value)) < 1500


def test_end_tokens_beyond_the_vocabulary_warn_and_are_left_out(folder, caplog):
    fields("generation_config.json", eos_token_id=[2, 10**9, -5])(folder)
    with LLM(str(folder), device="cpu", max_num_seqs=4) as llm:
        assert one(llm, max_tokens=4, min_tokens=4).finish_reason == "length"
    assert "eos_token_id [1000000000, -5] ends no output" in caplog.text


def test_nobody_is_asked_whether_to_run_the_code_of_a_tokenizer(folder, monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    fields("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})(folder)
    (folder / "own.py").write_text("raise SystemExit('this code has run')")
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        LLM(str(folder), device="cpu")
    assert not asked

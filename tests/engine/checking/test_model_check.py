"""`check_model` says that a good folder is good, and finds what is wrong with others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import VOCAB_SIZE, tiny_checkpoint, tiny_tokenizer
from fallback import own_code_checkpoint
from millrace.engine import check_model
from millrace.engine.checking.tensors import TensorFacts, unusual_tensors
from millrace.engine.errors import CheckpointError, ConfigError, UnsupportedModelError

PROMPTS = ["The mill wheel", "Rows stream in, engines stay full, and results stream out.", "a"]
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a good folder, with a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check(folder: Path, **options):
    return check_model(str(folder), prompts=PROMPTS, max_tokens=6, shows_progress=False, device="cpu", **options)


def test_a_good_folder_is_good_twice(folder: Path) -> None:
    first, second = check(folder), check(folder)
    assert first.is_good and second.is_good
    assert first.architecture == "Qwen2ForCausalLM"
    assert len(first.outputs) == 2 * len(PROMPTS)
    assert all(output.num_tokens == 6 and output.same_prompt_tokens for output in first.outputs)
    assert 0 < first.max_logprob_error < 1e-4
    assert first.changed_since is None and second.changed_since is not None


def test_a_falcon_with_alibi_is_compared_with_attention_that_adds_it_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None, "alibi": True}
    assert check(tiny_checkpoint(tmp_path / "model", "falcon", **fields)).is_good


def test_a_tensor_that_changed_since_the_last_check_is_named_until_it_is_accepted(folder: Path) -> None:
    assert check(folder).is_good
    change(folder, lambda tensors: tensors[NAME].add_(0.01))
    for _ in range(2):
        found = check(folder)
        assert not found.is_good
        assert found.changed == (f"{NAME} has other numbers",)
        assert not found.num_different, "transformers reads the same folder"
    assert check(folder, accept=True).is_good
    assert check(folder).is_good


def test_a_changed_tensor_differs_from_the_reference_folder_in_numbers_and_in_outputs(folder: Path, tiny_model) -> None:
    change(folder, lambda tensors: tensors[NAME].mul_(1.5))
    found = check(folder, reference=str(tiny_model("qwen2")))
    assert found.changed == (f"{NAME} has other numbers",)
    assert found.max_logprob_error > 0.01 and found.num_different
    assert not found.is_good


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors[NAME].fill_(0.5), "one number everywhere"),
        (lambda tensors: tensors["model.layers.0.input_layernorm.weight"][3:4].fill_(torch.nan), "NaN or infinity"),
    ],
)
def test_a_damaged_tensor_is_named(folder: Path, edit: Callable[[dict[str, Tensor]], object], said: str) -> None:
    change(folder, edit)
    found = check(folder)
    assert not found.is_good
    assert any(said in sentence for sentence in found.damaged)


def test_a_damaged_folder_is_nothing_to_compare_with_later(folder: Path, tiny_model) -> None:
    change(folder, lambda tensors: tensors[NAME].fill_(0.5))
    assert not check(folder).is_good
    shutil.copy(tiny_model("qwen2") / "model.safetensors", folder)
    found = check(folder)
    assert found.is_good and found.changed_since is None


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        check(folder)


def test_a_fault_of_this_engine_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millrace.engine.layers import GatedMLP

    plain = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, hidden: plain(self, hidden) * 1.01)
    found = check(folder)
    assert not found.is_good and found.max_logprob_error > found.tolerance
    assert not found.changed and not found.damaged


def test_a_prompt_that_does_not_fit_is_said_and_the_others_are_checked(folder: Path) -> None:
    found = check_model(str(folder), prompts=["a", "long " * 300], max_tokens=2, shows_progress=False, device="cpu")
    assert len(found.outputs) == 2 and len(found.skipped) == 1
    assert "longer" in found.skipped[0] or "max_model_len" in found.skipped[0]


def test_the_settings_of_the_engine_are_those_of_transformers_too(folder: Path) -> None:
    plain = check(folder)
    changed = check(folder, hf_overrides={"rope_theta": 50.0}, model_impl="transformers")
    assert plain.is_good and changed.is_good


def test_code_of_the_folder_runs_on_both_sides_where_it_is_trusted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = own_code_checkpoint(tmp_path / "model", vocab_size=VOCAB_SIZE)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        check(folder)
    assert check(folder, trust_remote_code=True).is_good


def test_a_gguf_file_is_compared_with_what_transformers_reads_from_it(tiny_model, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("gguf")
    from gguf_files import MIXED, write_gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tiny_model("llama"), tmp_path / "model.gguf", "llama", MIXED)
    found = check(file)
    assert found.is_good and found.outputs[0].same_prompt_tokens

    def double(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.ffn_down.weight"] *= 2

    other = write_gguf(tiny_model("llama"), tmp_path / "other.gguf", "llama", MIXED, edit=double)
    found = check(file, reference=str(other))
    assert found.changed == ("blk.1.ffn_down.weight has other numbers",) and found.max_logprob_error > 0.01
    with pytest.raises(ConfigError, match="only one of the two is a GGUF file"):
        check(file, reference=str(tiny_model("llama")))


def test_a_model_that_makes_vectors_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="generate"):
        check(folder, task="embed")


def test_a_layer_whose_size_stands_out_is_named_and_one_of_a_spread_is_not() -> None:
    def facts(sizes: list[float]) -> dict[str, TensorFacts]:
        return {f"model.layers.{i}.w": TensorFacts("", True, False, rms) for i, rms in enumerate(sizes)}

    assert [text[:16] for text in unusual_tensors(facts([1.0, 1.1, 9.0, 0.9, 1.0]))] == ["model.layers.2.w"]
    assert not unusual_tensors(facts([1.0, 1.1, 2.0, 0.9, 1.0]))
    assert not unusual_tensors(facts([1.0, 3.0, 9.0, 27.0, 81.0]))
    assert not unusual_tensors(facts([1.0, 9.0]))

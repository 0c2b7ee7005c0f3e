"""A model folder with any content is served, or refused by a short error that names the file or the field."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import tiny_checkpoint, tiny_classifier
from fuzzing import JSON, check_serves, fuzz, only_user_errors
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams
from running import PROMPT, one

pytestmark = pytest.mark.soak

ADDRESS_BYTES = 24 << 30
"""Most address space while a folder is loaded: a size that no check has refused then fails the test."""

SMALL = {"device": "cpu", "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 20, "enforce_eager": True}
SIZES = [0, -1, 1, 2, 63, 65, 2**20, 2**31 - 1, 2**31, 2**40, 10**9, 1.5, "64", True, [], {}, None]
ODD = [float("nan"), float("inf"), 1e-320, 1e300, -1.0, "x", "", "0x10", [[]], {"": None}]
NAMES = {
    "config.json": [
        "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
        "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id", "bos_token_id",
        "pad_token_id", "dtype", "torch_dtype", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window",
        "layer_types", "num_labels", "id2label", "label2id", "problem_type", "is_causal", "quantization_config",
        "matryoshka_dimensions", "to_dict", "__class__", "attribute_map", "use_cache", "initializer_range",
        "transformers_version", "pretraining_tp", "auto_map",
    ],
    "generation_config.json": ["eos_token_id", "temperature", "top_k", "top_p", "max_new_tokens", "do_sample", "min_p"],
    "tokenizer.json": [
        "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
        "model",
    ],
    "tokenizer_config.json": [
        "tokenizer_class", "chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "model_max_length",
        "added_tokens_decoder", "extra_special_tokens", "add_bos_token", "auto_map", "backend", "padding_side",
        "clean_up_tokenization_spaces", "additional_special_tokens",
    ],
    "special_tokens_map.json": ["bos_token", "eos_token", "pad_token", "additional_special_tokens"],
    "model.safetensors.index.json": ["weight_map", "metadata"],
    "modules.json": ["idx", "name", "path", "type"],
    "1_Pooling/config.json": [
        "pooling_mode", "word_embedding_dimension", "pooling_mode_mean_tokens", "pooling_mode_cls_token",
        "include_prompt",
    ],
    "sentence_bert_config.json": ["max_seq_length", "do_lower_case"],
    "config_sentence_transformers.json": ["prompts", "default_prompt_name", "similarity_fn_name"],
}  # fmt: skip
NESTED = {
    "rope_parameters": ["rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast"],
    "model": ["type", "vocab", "merges", "unk_token", "dropout", "byte_fallback"],
    "decoder": ["type"],
    "pre_tokenizer": ["type", "add_prefix_space", "use_regex"],
    "weight_map": ["lm_head.weight", "model.norm.weight", "extra"],
    "added_tokens": ["id", "content", "special"],
}
VALUES = st.sampled_from(SIZES + ODD) | JSON
TYPES = ["sentence_transformers.models.Dense", "sentence_transformers.models.Transformer", "Pooling", "Normalize"]


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Draws a change of a file: another value of a field, a field less, other bytes, or a file cut short."""
    file = draw(st.sampled_from(sorted(NAMES)))
    kind = draw(st.sampled_from(["set"] * 8 + ["nested"] * 4 + ["drop", "cut", "bytes", "whole", "folder"]))
    name = draw(st.sampled_from(NAMES[file]))
    value: Any = draw(VALUES)
    if kind == "nested":
        name = draw(st.sampled_from([one for one in NAMES[file] if one in NESTED] or NAMES[file]))
        name = f"{name}/{draw(st.sampled_from(NESTED.get(name, ['x'])))}"
    if name == "type" and draw(st.booleans()):
        value = draw(st.sampled_from(TYPES))
    if kind == "bytes":
        value = draw(st.sampled_from([b"", b"\xff\xfe{", b"[" * 100_000, b"null", b"[]", b'"x"', b"\x00", b"{}"]))
    return {"file": file, "kind": kind, "name": name, "value": value, "at": draw(st.integers(0, 2000))}


def apply(folder: Path, change: dict[str, Any]) -> None:
    """Makes a change in a folder; a file that the change needs and that is absent becomes an empty object."""
    path, name = folder / change["file"], change["name"]
    path.parent.mkdir(exist_ok=True)
    content = path.read_text(errors="replace") if path.is_file() else "{}"
    if change["kind"] == "folder":
        if path.is_file():
            path.unlink()
        path.mkdir(exist_ok=True)
    elif path.is_dir():
        return
    elif change["kind"] == "bytes":
        path.write_bytes(change["value"])
    elif change["kind"] == "cut":
        path.write_text(content[: change["at"]])
    elif change["kind"] == "whole":
        path.write_text(as_json(change["value"]))
    else:
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            return
        target = fields
        for key in name.split("/")[:-1]:
            target = target.setdefault(key, {}) if isinstance(target, dict) else target
        target = target[0] if isinstance(target, list) and target and isinstance(target[0], dict) else target
        if not isinstance(target, dict):
            return
        if change["kind"] == "drop":
            target.pop(name, None)
        else:
            target[name.split("/")[-1]] = change["value"]
        path.write_text(as_json(fields))


def as_json(value: Any) -> str:
    """Returns JSON text; integers of any length are written."""
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each task, with all the files that a task may read."""
    place = tmp_path_factory.mktemp("valid")
    sharded = tiny_checkpoint(place / "generate", "llama", shards=2)
    (sharded / "generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.5}')
    embed = tiny_checkpoint(place / "embed", "qwen2")
    (embed / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (embed / "1_Pooling").mkdir()
    (embed / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    tiny_classifier(place / "classify", "llama", num_labels=3)
    tiny_checkpoint(place / "opt", "opt")
    return {"generate": sharded, "embed": embed, "classify": place / "classify", "opt": place / "opt"}


@pytest.fixture(scope="module")
def neighbour(tiny_model) -> Iterator[tuple[LLM, list[int]]]:
    """An engine in the same process, which must go on."""
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=4) as llm:
        yield llm, one(llm, max_tokens=4).token_ids


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@given(
    st.sampled_from(["generate", "generate", "embed", "classify", "opt"]), st.lists(changes(), min_size=1, max_size=2)
)
@fuzz
def test_a_folder_with_any_content_serves_or_is_refused(folders, neighbour, tmp_path_factory, task, changed):
    folder = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[task], folder, copy_function=os.link)
    for change in changed:
        path = folder / change["file"]
        if path.is_file():  # The valid folder has the same file under a hard link.
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        apply(folder, change)
    with only_user_errors(), LLM(str(folder), runner="pooling" if task == "embed" else "auto", **SMALL) as llm:
        if llm.llm_engine.task.name == "generate":
            params = SamplingParams(temperature=0, max_tokens=3, min_tokens=2)
            outputs = llm.generate([PROMPT, [5, 6, 7]], params, use_tqdm=False, on_error="return")
            outputs += llm.chat([{"role": "user", "content": "x"}], params, use_tqdm=False, on_error="return")
        else:
            outputs = llm.encode(
                [PROMPT, [5, 6]], use_tqdm=False, pooling_task=llm.llm_engine.task.name, on_error="return"
            )
        for output in outputs:
            assert output.error is None or output.error.kind != "ModelExecutionError", output.error
        llm.llm_engine.check_integrity()
    check_serves(*neighbour)

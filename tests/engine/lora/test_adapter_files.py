"""What the reader of adapters takes, what it warns of, and what it refuses by name."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import make_adapter
from checkpoints import tiny_checkpoint
from gguf_files import write_gguf
from millrace.engine.config import EngineConfig
from millrace.engine.errors import AdapterError
from millrace.engine.loading.adapter_base import describe_adapter_base
from millrace.engine.loading.model_source import resolve_model
from millrace.engine.lora.adapter import Adapter
from millrace.engine.lora.base import AdapterBase
from millrace.engine.lora.config import HARMLESS, READ, REFUSED
from millrace.engine.lora.reader import read_adapter
from millrace.engine.lora.request import LoRARequest
from millrace.engine.models import load_hf_config

Q, K, V = (f"base_model.model.model.layers.1.self_attn.{name}_proj" for name in "qkv")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def base(model: Path) -> AdapterBase:
    config = EngineConfig(model=str(model), enable_lora=True, max_lora_rank=8)
    return describe_adapter_base(config, load_hf_config(model), "lm_head", torch.float32)


@pytest.fixture
def tune(tmp_path: Path, model: Path) -> Path:
    return make_adapter(tmp_path / "tune", model, rank=4, targets=["q_proj", "k_proj", "v_proj"])


def read(folder: Path | str, base: AdapterBase) -> Adapter:
    return read_adapter(LoRARequest("tune", 1, str(folder)), base)


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / WEIGHTS)


def renamed(pattern: str, by: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}


def equal(one: Adapter, other: Adapter) -> bool:
    return one.updates.keys() == other.updates.keys() and all(
        torch.equal(one.updates[name].a, other.updates[name].a)
        and torch.equal(one.updates[name].b, other.updates[name].b)
        for name in one.updates
    )


NAMES = {
    "the name of the adapter": (r"lora_([AB])\.", r"lora_\1.default."),
    "no prefix": (r"^base_model\.model\.", ""),
    "no prefix of the model": (r"^base_model\.model\.model\.", ""),
    "a text model inside": (r"^base_model\.model\.model\.", "base_model.model.model.language_model."),
    "a text model around": (r"^base_model\.model\.model\.", "base_model.model.language_model.model."),
    "torch.compile": (r"^base_model\.model\.", "base_model.model._orig_mod."),
    "FSDP and checkpoints": (r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize(("pattern", "by"), NAMES.values(), ids=NAMES.keys())
def test_names_of_other_trainers_are_understood(tune: Path, base: AdapterBase, pattern: str, by: str) -> None:
    plain = read(tune, base)
    edit(tune, renamed(pattern, by))
    assert equal(read(tune, base), plain)


def test_a_model_in_a_gguf_file_takes_the_adapters_of_the_original(tune: Path, model: Path, base: AdapterBase) -> None:
    file = write_gguf(model, tune / "model.gguf", "llama")
    config = EngineConfig(model=str(file), enable_lora=True)
    other = describe_adapter_base(config, load_hf_config(resolve_model(str(file))), "lm_head", torch.float32)
    assert equal(read(tune, other), read(tune, base))


def test_fused_matrices_are_cut_into_the_parts_of_a_model_that_has_them_apart(
    tmp_path: Path, model: Path, base: AdapterBase
) -> None:
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    plain = read(make_adapter(tmp_path / "tune", model, rank=3, targets=names), base)

    def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        fused = {}
        for whole, parts in {"self_attn.qkv_proj": names[:3], "mlp.gate_up_proj": names[3:]}.items():
            for layer in range(2):
                start = f"base_model.model.model.layers.{layer}.{whole.partition('.')[0]}"
                b = [tensors[f"{start}.{part}.lora_B.weight"] for part in parts]
                outer = f"base_model.model.model.layers.{layer}.{whole}"
                fused[f"{outer}.lora_A.weight"] = tensors[f"{start}.{parts[0]}.lora_A.weight"]
                fused[f"{outer}.lora_B.weight"] = torch.cat(b)
        return fused

    edit(tmp_path / "tune", fuse)
    configure(tmp_path / "tune", target_modules=["qkv_proj", "gate_up_proj"])
    adapter = read(tmp_path / "tune", base)
    first = {"key": "query", "value": "query", "up": "gate"}
    assert adapter.updates.keys() == plain.updates.keys()
    for name, update in adapter.updates.items():
        outer, _, part = name.rpartition(".")
        assert torch.equal(update.b, plain.updates[name].b)
        assert torch.equal(update.a, plain.updates[f"{outer}.{first.get(part, part)}"].a)


def test_separate_matrices_change_their_parts_of_a_model_that_fuses_them(tmp_path: Path) -> None:
    """Adapters are trained on copies of such models that have the modules apart."""
    model = tiny_checkpoint(tmp_path / "model", "phi3")
    config = EngineConfig(model=str(model), enable_lora=True)
    base = describe_adapter_base(config, load_hf_config(model), "lm_head", torch.float32)
    tune = make_adapter(tmp_path / "tune", model, rank=3, targets=["qkv_proj", "gate_up_proj"])
    plain = read(tune, base)

    def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        apart = {}
        for name in plain.updates:
            outer, _, part = name.rpartition(".")
            whole, last = {
                "query": ("qkv_proj", "q_proj"),
                "key": ("qkv_proj", "k_proj"),
                "value": ("qkv_proj", "v_proj"),
                "gate": ("gate_up_proj", "gate_proj"),
                "up": ("gate_up_proj", "up_proj"),
            }[part]
            start = "base_model.model.model." + outer.rpartition(".")[0].replace("attention", "self_attn")
            apart[f"{start}.{last}.lora_A.weight"] = tensors[f"{start}.{whole}.lora_A.weight"].clone()
            apart[f"{start}.{last}.lora_B.weight"] = plain.updates[name].b / 2  # The scale is alpha / rank = 2.
        return apart

    edit(tune, split)
    configure(tune, target_modules="all-linear")
    assert equal(read(tune, base), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_scaled_before_they_are_cast(tune: Path, base: AdapterBase, dtype: torch.dtype) -> None:
    edit(tune, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    configure(tune, lora_alpha=3)
    b = load_file(tune / WEIGHTS)[f"{Q}.lora_B.weight"]
    update = read(tune, base).updates["layers.1.attention.qkv.query"]
    assert update.b.dtype == torch.float32
    assert torch.equal(update.b, b.float() * 0.75)


def test_a_pickle_of_tensors_gives_what_safetensors_give(tune: Path, base: AdapterBase) -> None:
    plain, tensors = read(tune, base), load_file(tune / WEIGHTS)
    (tune / WEIGHTS).unlink()
    for is_new in (True, False):
        torch.save(tensors, tune / "adapter_model.bin", _use_new_zipfile_serialization=is_new)
        assert equal(read(tune, base), plain)


def test_the_digest_follows_the_content_and_not_the_place(tune: Path, base: AdapterBase) -> None:
    plain = read(tune, base)
    moved = tune.rename(tune.with_name("moved"))
    assert read(moved, base).digest == plain.digest
    configure(moved, lora_alpha=9)
    scaled = read(moved, base)
    edit(moved, _with(f"{Q}.lora_A.weight", lambda a: 2 * a))
    assert len({plain.digest, scaled.digest, read(moved, base).digest}) == 3
    assert plain.num_bytes == sum(tensor.nbytes for tensor in load_file(moved / WEIGHTS).values())


def test_links_are_followed(tune: Path, base: AdapterBase, tmp_path: Path) -> None:
    """The cache of a hub consists of links."""
    (tmp_path / "links").mkdir()
    for file in tune.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert equal(read(tmp_path / "links", base), read(tune, base))


def test_modules_that_the_config_names_and_the_file_lacks_are_warned_of(
    tune: Path, base: AdapterBase, caplog: pytest.LogCaptureFixture
) -> None:
    configure(tune, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert len(read(tune, base).updates) == 6
    assert "no matrices of layers.0.self_attn.o_proj and 1 more" in caplog.text


def test_modules_that_the_config_leaves_out_are_not_missed(
    tune: Path, base: AdapterBase, caplog: pytest.LogCaptureFixture
) -> None:
    edit(
        tune, lambda tensors: {name: tensor for name, tensor in tensors.items() if ".1." in name and ".k_" not in name}
    )
    configure(tune, layers_to_transform=[1], exclude_modules=["k_proj"])
    assert len(read(tune, base).updates) == 2
    assert not caplog.text


def test_fields_of_megatron_do_no_harm(tune: Path, base: AdapterBase, caplog: pytest.LogCaptureFixture) -> None:
    configure(tune, share_expert_adapters=True, lora_dtype="bfloat16", dropout_position="pre")
    read(tune, base)
    assert not caplog.text


def test_an_unknown_field_warns(tune: Path, base: AdapterBase, caplog: pytest.LogCaptureFixture) -> None:
    configure(tune, trained_by="us", also_new=None)
    read(tune, base)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "trained_by" in caplog.text


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "VERA"}, "peft_type .* 'VERA'"),
    "no method": ({"peft_type": None}, "peft_type"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "rows of the bias": ({"lora_bias": True}, "lora_bias"),
    "biases": ({"bias": "all"}, "bias .* 'all'"),
    "biases of LoRA": ({"bias": "lora_only"}, "bias .* 'lora_only'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights .* 'pissa_niter_16'.*path_initial"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "copied layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "a new switch": ({"use_xlora": True}, "use_xlora.*not known"),
    "a new object": ({"some_new_config": {"a": 1}}, "some_new_config.*not known"),
    "no rank": ({"r": None}, "rank 'r'"),
    "rank 0": ({"r": 0}, "rank 'r'"),
    "rank true": ({"r": True}, "rank 'r'"),
    "rank of a float": ({"r": 4.0}, "rank 'r'"),
    "another rank": ({"r": 5}, "has the rank 4, and r or rank_pattern .* 5"),
    "rank of a pattern": ({"rank_pattern": {"k_proj": 2}}, r"k_proj.* has the rank 4, .* say 2"),
    "rank pattern of a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank 0 of a pattern": ({"rank_pattern": {"v_proj": 0}}, "v_proj"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "alpha of text": ({"alpha_pattern": {"q_proj": "8"}}, "alpha 'q_proj'"),
    "rsLoRA of text": ({"use_rslora": "yes"}, "use_rslora"),
    "a broken pattern": ({"alpha_pattern": {"(q_proj": 8}}, r"'\(q_proj' is no regular expression"),
    "a slow pattern": ({"alpha_pattern": {"(([a-z]+)*)*x": 8}}, "long to match"),
    "alternatives again and again": ({"rank_pattern": {"(?:a|a|_)+y": 8}}, "long to match"),
    "many repetitions": ({"rank_pattern": {".*.*.*.*.*.*.*y": 8}}, "long to match"),
    "target_modules of a number": ({"target_modules": 3}, "target_modules"),
    "targets without the tensors": ({"target_modules": ["q_proj", "k_proj"]}, "v_proj.*leave out"),
    "layers without the tensors": ({"layers_to_transform": 0}, "layers.1.*leave out"),
    "layers of text": ({"layers_to_transform": ["one"]}, "layers_to_transform"),
}


@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS.keys())
def test_a_config_that_is_wrong_or_not_implemented_is_refused_by_name(
    tune: Path, base: AdapterBase, fields: dict[str, Any], message: str
) -> None:
    configure(tune, **fields)
    with pytest.raises(AdapterError, match=f"(?s)adapter 'tune' .*{message}"):
        read(tune, base)


def _without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _added(name: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def _nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([1]), float("nan"))


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "A alone": (_without(f"{Q}.lora_B.weight"), "lora_A of .*layers.1.self_attn.q_proj.* no lora_B"),
    "B alone": (_without(f"{Q}.lora_A.weight"), "lora_B of .*q_proj.* no lora_A"),
    "no tensors": (lambda tensors: tensors.clear(), "no matrices"),
    "A too wide": (_with(f"{Q}.lora_A.weight", lambda a: torch.cat([a, a], 1)), r"\[4, 128\].*asks for \[4, 64\]"),
    "B too long": (_with(f"{K}.lora_B.weight", lambda b: torch.cat([b, b])), r"\[64, 4\].*asks for \[32, 4\]"),
    "B of another rank": (_with(f"{K}.lora_B.weight", lambda b: b[:, :3]), r"\[32, 3\].*asks for \[32, 4\]"),
    "A not gathered": (_with(f"{Q}.lora_A.weight", lambda a: a[:0, 0]), r"shape \[0\]"),
    "A without rows": (_with(f"{Q}.lora_A.weight", lambda a: a[:0]), "rank 0"),
    "A of experts": (_with(f"{Q}.lora_A.weight", lambda a: a[None]), r"shape \[1, 4, 64\]"),
    "NaN": (_with(f"{V}.lora_B.weight", _nan), "lora_B of .*v_proj.*NaN"),
    "infinite": (_with(f"{V}.lora_A.weight", lambda a: a / 0), "lora_A of .*v_proj.*infinite"),
    "integers": (_with(f"{V}.lora_A.weight", lambda a: a.to(torch.int8)), "torch.int8"),
    "8-bit floats": (_with(f"{V}.lora_A.weight", lambda a: a.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "a magnitude": (_added(f"{Q}.lora_magnitude_vector", 64), "lora_magnitude_vector"),
    "a bias": (_added(f"{Q}.lora_B.bias", 64), "lora_B.bias"),
    "a saved norm": (_added("base_model.model.model.norm.weight", 64), "norm.weight"),
    "a longer vocabulary": (_added("base_model.model.lm_head.weight", 400, 64), r"\[400, 64\].*vocabulary"),
    "a foreign module": (renamed("q_proj", "Wq_proj"), "Wq_proj.*no such module.*nearest name is .*q_proj"),
    "a layer too many": (renamed(r"layers\.1", "layers.7"), r"layers\.7.*no such module"),
    "the vision model": (renamed(r"model\.layers", "vision_tower.layers"), "vision_tower.*no such module"),
    "experts": (renamed("self_attn.q_proj", "mlp.experts.0.gate_proj"), "experts.0.gate_proj.*not supported"),
    "a norm": (renamed("self_attn.q_proj", "input_layernorm"), "input_layernorm.*takes no adapters"),
    "a name without an end": (renamed(r"1\.", "1." + 300 * "a" + "."), "at most 300"),
    "two adapters": (renamed(r"(\d)(.*lora_A)", r"\1\2.tune\1"), "several adapters, 'tune0, tune1'"),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    tune: Path, base: AdapterBase, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit(tune, change)
    configure(tune, target_modules="all-linear")
    with pytest.raises(AdapterError, match=f"(?s)adapter 'tune' .*{message}"):
        read(tune, base)


def test_a_module_that_is_changed_twice_is_refused(tune: Path, base: AdapterBase) -> None:
    outer = Q.removesuffix("q_proj")
    edit(tune, _added(f"{outer}qkv_proj.lora_A.weight", 4, 64))
    edit(tune, _added(f"{outer}qkv_proj.lora_B.weight", 128, 4))
    with pytest.raises(AdapterError, match="twice"):
        read(tune, base)


def test_a_rank_above_the_setting_is_refused_with_the_number_to_set(
    tmp_path: Path, model: Path, base: AdapterBase
) -> None:
    tune = make_adapter(tmp_path / "tune", model, rank=4, rank_pattern={r".*\.1\..*v_proj": 9})
    with pytest.raises(AdapterError, match=r"v_proj.* has the rank 9, and max_lora_rank is 8; set .* at least 9"):
        read(tune, base)


def test_numbers_that_the_dtype_of_the_model_cannot_hold_are_refused(tune: Path, model: Path) -> None:
    config = EngineConfig(model=str(model), enable_lora=True)
    half = describe_adapter_base(config, load_hf_config(model), "lm_head", torch.float16)
    configure(tune, lora_alpha=1e7)
    with pytest.raises(AdapterError, match=r"infinite numbers in torch.float16"):
        read(tune, half)


class Bomb:
    """Pickles as a call that leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["plain", "zip", "value"])
def test_nothing_in_a_pickle_is_executed(tune: Path, base: AdapterBase, tmp_path: Path, kind: str) -> None:
    tensors: Any = load_file(tune / WEIGHTS)
    (tune / WEIGHTS).unlink()
    bomb, file = Bomb(tmp_path / "mark"), tune / "adapter_model.bin"
    if kind == "plain":
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb if kind == "zip" else {**tensors, "more": bomb}, file)
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is truncated, damaged or not just tensors") as raised:
        read(tune, base)
    assert not (tmp_path / "mark").exists()
    assert "weights_only" not in str(raised.value), "PyTorch advises to load the file without the check"
    assert kind == "plain" or "posix.system" in str(raised.value)


PICKLES: dict[str, Any] = {
    "a list": [torch.ones(2)],
    "numbers": {"a": 1},
    "nested": {"state": {"a": torch.ones(2)}},
    "sparse": {f"{Q}.lora_A.weight": torch.eye(4).to_sparse()},
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_of_anything_but_tensors_is_refused(tune: Path, base: AdapterBase, content: Any) -> None:
    (tune / WEIGHTS).unlink()
    torch.save(content, tune / "adapter_model.bin")
    with pytest.raises(AdapterError, match="no mapping of names to dense tensors"):
        read(tune, base)


def test_an_archive_that_grows_is_refused(tune: Path, base: AdapterBase) -> None:
    (tune / WEIGHTS).unlink()
    with zipfile.ZipFile(tune / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(AdapterError, match="compressed"):
        read(tune, base)


def _header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "truncated"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    "one byte short": (lambda data: data[:-1], "truncated"),
    "one byte more": (lambda data: data + b"\0", "truncated"),
    "a huge header": (lambda data: _header(1 << 62), "truncated"),
    "a header that is no JSON": (lambda data: _header(2, b"[["), "truncated"),
    "a huge shape": (
        lambda data: (
            _header(78, b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}') + bytes(8)
        ),
        "truncated",
    ),
    "a Git LFS pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused(
    tune: Path, base: AdapterBase, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = tune / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(AdapterError, match=f"adapter 'tune' .*{WEIGHTS} is .*{message}"):
        read(tune, base)


def test_a_file_that_is_too_large_is_not_read(tune: Path, base: AdapterBase) -> None:
    with (tune / WEIGHTS).open("ab") as file:
        file.truncate(1 << 40)  # A file with a hole, which takes no room.
    with pytest.raises(AdapterError, match=r"1,099,511,627,776 bytes, and at most .* max_lora_rank"):
        read(tune, base)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"a":' * 100_000], ids=["cut", "a list", "not UTF-8", "deep"])
def test_a_config_that_is_no_object_is_refused(tune: Path, base: AdapterBase, text: str) -> None:
    (tune / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=CONFIG):
        read(tune, base)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=4) | st.just("q_proj"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "a", "q_proj", ".*"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(READ | HARMLESS | REFUSED.keys())), VALUES, min_size=1, max_size=3))
def test_a_config_of_anything_is_read_or_refused(tune: Path, base: AdapterBase, fields: dict[str, Any]) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (tune / CONFIG).write_text(json.dumps({**plain, **fields}))
    with contextlib.suppress(AdapterError):
        read(tune, base)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=9), st.booleans())
def test_a_file_with_wrong_bytes_is_read_or_refused(
    tune: Path, base: AdapterBase, place: float, data: bytes, is_header: bool
) -> None:
    plain = (tune / WEIGHTS).read_bytes()
    start = int(place * (1_500 if is_header else len(plain)))
    (tune / WEIGHTS).write_bytes(plain[:start] + data + plain[start + len(data) :])
    try:
        with contextlib.suppress(AdapterError):
            read(tune, base)
    finally:
        (tune / WEIGHTS).write_bytes(plain)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=9))
def test_a_pickle_with_wrong_bytes_is_read_or_refused(tune: Path, base: AdapterBase, place: float, data: bytes) -> None:
    file = tune / "adapter_model.bin"
    if not file.exists():
        torch.save(load_file(tune / WEIGHTS), file)
        (tune / WEIGHTS).unlink()
    plain = file.read_bytes()
    start = int(place * len(plain))
    file.write_bytes(plain[:start] + data + plain[start + len(data) :])
    try:
        with contextlib.suppress(AdapterError):
            read(tune, base)
    finally:
        file.write_bytes(plain)


def test_a_config_that_is_nested_as_deep_as_can_be_read_is_no_crash(tune: Path, base: AdapterBase) -> None:
    for depth in (100, 500, 700):
        configure(tune, trained_by=json.loads("[" * depth + "1" + "]" * depth))
        with contextlib.suppress(AdapterError):
            read(tune, base)


def test_a_missing_adapter_is_refused_with_what_is_there(tune: Path, base: AdapterBase, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter 'tune' .*its subfolder 'tune' holds an adapter"):
        read(tmp_path, base)
    (tune / WEIGHTS).rename(tune / f"{WEIGHTS}.index.json")
    with pytest.raises(AdapterError, match=f"does not hold .*{WEIGHTS}; it holds .*{WEIGHTS}.index.json"):
        read(tune, base)
    for path in ("", str(tmp_path / "absent"), "\0", "a" * 5000, str(tune / CONFIG)):
        with pytest.raises(AdapterError, match="lora_path"):
            read(path, base)


def test_a_pipe_is_refused(tune: Path, base: AdapterBase) -> None:
    (tune / WEIGHTS).unlink()
    os.mkfifo(tune / WEIGHTS)
    with pytest.raises(AdapterError, match=f"{WEIGHTS}.* pipe"):
        read(tune, base)

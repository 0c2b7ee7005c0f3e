"""The format compressed-tensors: every kind gives the numbers that were written, and what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints import tiny_checkpoint
from compressed_tensors_files import PRESETS, quantise, write_compressed_tensors
from millrace.engine.device import Device
from millrace.engine.errors import CheckpointError, UnsupportedModelError
from millrace.engine.layers import Attention, LinearBase
from millrace.engine.llm import LLM
from millrace.engine.loading.kv_scales import prepare_kv_scales
from millrace.engine.loading.stored_forms import read_stored_forms
from millrace.engine.models import Decoder, ModelOptions, build_model, load_hf_config, load_model
from millrace.engine.models.hf_config import quantization_settings
from millrace.engine.models.registry import weight_map
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.quantization.formats.compressed_tensors import FORMAT
from millrace.engine.quantization.group_linear import GroupLinear
from millrace.engine.quantization.registry import find_format
from millrace.engine.quantization.split_linear import SplitLinear
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.storage import Location
from millrace.engine.weights.checkpoint import match_weights
from millrace.engine.weights.model_slots import weight_slots
from millrace.engine.weights.quantised_matrix import numbers_of
from paged import PagedSequences, random_sequences

WEIGHT_ONLY = [name for name, (_, _, inputs) in PRESETS.items() if inputs is None]
LINEAR = ("Linear",)


def load(folder: Path, place: Location | None = None) -> Decoder:
    config, dtype = load_hf_config(folder), torch.float32
    place, device = place or Location.at(str(folder)), Device.choose("cpu")
    stored = read_stored_forms(place, weight_map(place, config, dtype), config, None, device)
    return load_model(place, config, dtype, "cpu", ModelOptions(stored=stored))


@torch.inference_mode()
def log_probs(model: Decoder) -> Tensor:
    """Returns the log-probabilities of all tokens, `[num_tokens, vocab_size]`."""
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, torch.float32).run(whole)).log_softmax(-1)


def config_of(preset: str, **fields: Any) -> dict[str, Any]:
    """Returns the config of a checkpoint with one group, for linear layers."""
    form, weights, inputs = PRESETS[preset]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {"format": form, "config_groups": {"group_0": group}, "quantization_status": "compressed", **fields}


def write_pair(folder: Path, family: str, groups: Mapping[str, Any], **more: Any) -> tuple[Path, Path]:
    """Returns the folder of a quantised checkpoint, and that of the plain one with the same numbers in float32."""
    sizes = more.pop("sizes", {})
    plain = tiny_checkpoint(folder / "plain", family, **sizes)
    return write_compressed_tensors(plain, folder / "quantised", groups, **more), plain


@pytest.mark.parametrize("preset", PRESETS)
def test_every_part_of_a_matrix_has_the_numbers_that_were_written(preset: str) -> None:
    weight = torch.randn(150, 288, generator=torch.Generator().manual_seed(1))
    tensors, exact = quantise(weight, *PRESETS[preset])
    joined = dict(FORMAT(config_of(preset)).join((f"x.proj.{leaf}", each) for leaf, each in tensors.items()))
    assert joined.keys() == {"x.proj.weight"}
    matrix = joined["x.proj.weight"]
    assert [*matrix.shape] == [150, 288]
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(matrix.read(), exact, **tolerance)
    # No range but the last begins or ends with a word, a group of columns or a block of rows.
    for rows, columns in ((range(37, 131), range(288)), (range(150), range(57, 201)), (range(150), range(144, 288))):
        part = matrix.narrow(0, rows.start, len(rows)).narrow(1, columns.start, len(columns))
        expected = exact[rows.start : rows.stop, columns.start : columns.stop]
        assert part.shape == expected.shape
        torch.testing.assert_close(part.read(), expected, **tolerance)


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym-g-idx", "w8a16-naive-asym", "fp8-block"])
def test_codes_are_those_of_layers_that_multiply_by_them(preset: str) -> None:
    tensors, _ = quantise(torch.randn(40, 96), *PRESETS[preset])
    ((_, matrix),) = FORMAT(config_of(preset)).join((f"x.{leaf}", each) for leaf, each in tensors.items())
    codes, form = matrix.codes(), matrix.form
    dtype = torch.float8_e4m3fn if form.kind == "fp8" else torch.uint8 if form.has_zeros else torch.int8
    assert codes.values.dtype == dtype and codes.values.shape == (40, 96) and codes.values.is_contiguous()
    assert codes.scales.dtype == torch.float32 and len(codes.scales) == 40
    assert (codes.zeros is not None) == form.has_zeros
    assert (codes.groups is not None) == (form.act_order or preset == "fp8-block")
    if form.kind == "int" and form.bits == 4:
        assert int(codes.values.min()) >= (0 if form.has_zeros else -8)
        assert int(codes.values.max()) <= (15 if form.has_zeros else 7)


@pytest.mark.parametrize("preset", WEIGHT_ONLY)
def test_log_probabilities_are_those_of_the_dequantised_model(tmp_path: Path, preset: str) -> None:
    # Groups of 16 columns do not end where a rank's or a word's columns do; rows are no multiples of 32.
    quantised, plain = write_pair(tmp_path, "llama", {preset: LINEAR}, sizes={"intermediate_size": 160})
    ours, theirs = log_probs(load(quantised)), log_probs(load(plain))
    assert (ours - theirs).abs().max() < 1e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma2", "qwen3-moe", "deepseek-v3", "mixtral"])
def test_every_kind_of_layer_takes_quantised_matrices(tmp_path: Path, family: str) -> None:
    # Biases, tied heads, fused tensors, experts as linear layers, latents. One scale a row takes any number of columns.
    ignore = ["lm_head", r"re:.*mlp\.gate$", "re:.*block_sparse_moe.gate$"]
    quantised, plain = write_pair(tmp_path, family, {"w4a16-channel-asym": LINEAR}, ignore=ignore)
    names = load_file(quantised / "model.safetensors").keys()
    assert any("expert" in name and "packed" in name for name in names) == (
        family in ("qwen3-moe", "deepseek-v3", "mixtral")
    )
    ours, theirs = log_probs(load(quantised)), log_probs(load(plain))
    assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("preset", ["w3a16-asym", "w5a16-channel"])
def test_integers_of_any_width_stay_in_4_or_8_bits(tmp_path: Path, preset: str) -> None:
    quantised, _ = write_pair(tmp_path, "llama", {preset: LINEAR}, sizes={"intermediate_size": 160})
    layers = [module for module in load(quantised).layers.modules() if isinstance(module, LinearBase)]
    assert layers and {type(layer) for layer in layers} == {GroupLinear}


IGNORED = {
    "by name": ["lm_head", "model.layers.0.self_attn.q_proj"],
    "by pattern": ["lm_head", r"re:.*layers\.1\.mlp\.up_proj", "re:.*v_proj"],
    "a layer": ["lm_head", r"re:model\.layers\.0\."],
}


@pytest.mark.parametrize("ignore", IGNORED.values(), ids=IGNORED)
def test_fused_layers_fall_apart_where_a_part_is_ignored(tmp_path: Path, ignore: list[str]) -> None:
    quantised, plain = write_pair(tmp_path, "qwen2", {"w4a16": LINEAR}, ignore=ignore)
    model = load(quantised)
    split = [name for name, module in model.named_modules() if isinstance(module, SplitLinear)]
    assert bool(split) == (len(ignore) > 2 or "q_proj" in ignore[1])
    assert (log_probs(model) - log_probs(load(plain))).abs().max() < 1e-3


def test_groups_are_found_by_name_then_by_pattern_then_by_class(tmp_path: Path) -> None:
    groups = {
        "w8a16": LINEAR,
        "w4a16-asym": ["re:.*self_attn.[qk]_proj$"],
        "w3a16": ["model.layers.1.self_attn.q_proj", "re:.*o_proj"],
        "w8a16-channel": ["Embedding", "lm_head"],
    }
    quantised, plain = write_pair(tmp_path, "llama", groups, ignore=[], sizes={"intermediate_size": 160})
    settings = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized" and len(settings["config_groups"]) == 4
    stored = load_file(quantised / "model.safetensors")
    assert {"lm_head.weight_packed", "model.embed_tokens.weight_packed"} <= stored.keys()
    assert (log_probs(load(quantised)) - log_probs(load(plain))).abs().max() < 1e-3


def test_each_group_may_have_a_format_of_its_own(tmp_path: Path) -> None:
    groups = {"fp8-a16": ["re:.*self_attn.*"], "w4a16": ["re:.*mlp.*"], "nvfp4-a16": LINEAR}
    quantised, plain = write_pair(tmp_path, "llama", groups, ignore=[])
    assert json.loads((quantised / "config.json").read_text())["quantization_config"]["format"] == "mixed-precision"
    assert (log_probs(load(quantised)) - log_probs(load(plain))).abs().max() < 1e-3


def test_a_checkpoint_behind_a_url_is_read_by_parts(tmp_path: Path) -> None:
    quantised, plain = write_pair(tmp_path, "llama", {"w4a16-asym": LINEAR})
    place = Location.at("memory://compressed")
    for path in quantised.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    assert (log_probs(load(quantised, place=place)) - log_probs(load(plain))).abs().max() < 1e-3


def generate(folder: Path, **settings: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(folder), dtype="float32", max_num_seqs=4, **settings) as llm:
        outputs = llm.generate([[5, 6, 7] * 5, [9, 8]], params, use_tqdm=False)
    return [[*output.outputs[0].token_ids] for output in outputs]


HALVES = {"intermediate_size": 80}
"""With two ranks a rank has 40 rows of gate and up, and 40 columns of down: no whole word of zeros, no whole group."""


def parts_of(folder: Path, rank: int) -> dict[str, Tensor]:
    """Returns the numbers of every weight of one of two ranks, by our names."""
    config, dtype = load_hf_config(folder), torch.float32
    found = find_format(quantization_settings(config))
    slots = weight_slots(build_model(config, dtype, "meta", parallel=ParallelContext.of_rank(rank, 2, 1)))
    everything = weight_slots(build_model(config, dtype, "meta"))
    join = found.join if found else iter
    sources = match_weights(slots, folder, weight_map(folder, config, dtype), everything, join)
    return {name: numbers_of(slots[name].cut(found[0][1])) for name, found in sources.items()}


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym-g-idx", "w3a16-asym", "w8a16-naive-asym", "fp8-a16-block"])
def test_ranks_have_the_numbers_of_their_rows_and_columns(tmp_path: Path, preset: str) -> None:
    quantised, plain = write_pair(tmp_path, "llama", {preset: LINEAR}, sizes=HALVES)
    for rank in range(2):
        ours, theirs = (parts_of(folder, rank) for folder in (quantised, plain))
        assert ours.keys() == theirs.keys()
        for name, numbers in theirs.items():
            torch.testing.assert_close(ours[name].float(), numbers, rtol=1e-6, atol=1e-7)


def test_two_ranks_draw_what_the_dequantised_model_draws(tmp_path: Path) -> None:
    quantised, plain = write_pair(tmp_path, "llama", {"w4a16-asym": LINEAR}, sizes=HALVES)
    assert generate(quantised, tensor_parallel_size=2) == generate(plain)


@torch.inference_mode()
def reference_log_probs(folder: Path, preset: str | None) -> Tensor:
    """Returns the log-probabilities of transformers' model, which rounds inputs of linear layers as a preset asks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and preset is not None:
            module.register_forward_pre_hook(lambda _, args: (round_inputs(args[0], PRESETS[preset][2] or {}),))
    return torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in random_sequences()]).log_softmax(-1)


def round_inputs(x: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """Returns activations rounded to 8 bits and back: with a fixed scale, or one for each token or group of columns."""
    largest, dtype = (448.0, torch.float8_e4m3fn) if fields["type"] == "float" else (127.0, torch.int8)
    if fields["dynamic"] is False:
        scale, zero = torch.tensor(0.08), 0.0 if fields["symmetric"] else -9.0
    else:
        parts = x.unflatten(-1, (-1, min(fields.get("group_size") or x.shape[-1], x.shape[-1])))
        scale, zero = (parts.abs().amax(-1, keepdim=True) / largest).expand(parts.shape).reshape(x.shape), 0.0
    low = -128.0 if dtype == torch.int8 else -largest
    scaled = x / scale + zero
    return ((scaled.round() if dtype == torch.int8 else scaled).clamp(low, largest).to(dtype).float() - zero) * scale


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-static", "w8a8-static-asym", "w4a8", "w4afp8", "fp8", "fp8-dynamic"])
def test_inputs_of_8_bits_are_rounded_as_the_format_says_or_kept_with_a_word(
    tmp_path: Path, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    quantised, plain = write_pair(tmp_path, "llama", {preset: LINEAR})
    ours, kept, rounded = (
        log_probs(load(quantised)),
        reference_log_probs(plain, None),
        reference_log_probs(plain, preset),
    )
    assert (kept - rounded).abs().mean() > 0.01
    if "are not quantised as the checkpoint asks, which is more exact" in caplog.text:
        assert (ours - kept).abs().max() < 1e-3
    else:
        # One number that rounds the other way disturbs all later ones: in float64 the reference itself moves by 0.05.
        assert (ours - rounded).abs().mean() < 0.1


@pytest.mark.parametrize("preset", ["w8a8-asym-inputs", "nvfp4", "mxfp4", "mxfp8"])
def test_inputs_that_no_layer_rounds_stay_plain_with_a_word(
    tmp_path: Path, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    quantised, plain = write_pair(tmp_path, "llama", {preset: LINEAR})
    assert (log_probs(load(quantised)) - log_probs(load(plain))).abs().max() < 1e-3
    message = "the inputs of layers are not quantised, which is more exact: 'quantization_config.config_groups.group_0."
    assert caplog.text.count(message) == 1


DENSE = {"format": "dense", "registry_requires_subclass": False}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"quantization_status": "frozen", "sparsity_config": DENSE}, "quantization_config"),
        ({"transform_config": None, "run_compressed": True, "version": "0.9.1"}, "compression_config"),
    ],
)
def test_configs_of_older_checkpoints_are_read(tmp_path: Path, fields: dict[str, Any], key: str) -> None:
    quantised, plain = write_pair(tmp_path, "llama", {"w4a16": LINEAR}, key=key, **fields)
    path = quantised / "config.json"
    settings = json.loads(path.read_text())
    del (
        settings[key]["config_groups"]["group_0"]["format"],
        settings[key]["quant_method" * (key[0] == "c") or "version"],
    )
    path.write_text(json.dumps(settings))
    assert (log_probs(load(quantised)) - log_probs(load(plain))).abs().max() < 1e-3


def test_zero_points_of_older_checkpoints_are_not_packed(tmp_path: Path) -> None:
    def unpack(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("weight_zero_point"):
                numbers = (tensor.t().unsqueeze(-1) >> torch.arange(0, 32, 4) & 15) - 8
                tensors[name] = numbers.flatten(1).t().to(torch.int8).contiguous()

    quantised, plain = write_pair(tmp_path, "llama", {"w4a16-asym": LINEAR}, edit=unpack)
    assert (log_probs(load(quantised)) - log_probs(load(plain))).abs().max() < 1e-3


KV_FLOATS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def add_kv_scales(tensors: dict[str, Tensor]) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([0.5])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([[[0.25]], [[0.75]]])


def test_scales_of_a_kv_cache_are_used_with_an_8_bit_cache_and_else_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantised, plain = write_pair(
        tmp_path, "llama", {"w4a16": LINEAR}, edit=add_kv_scales, kv_cache_scheme={**KV_FLOATS, "strategy": "attn_head"}
    )
    model = load(quantised)
    tables = [module.kv_scales.table for module in model.modules() if isinstance(module, Attention)]
    assert [table.tolist() for table in tables] == [[[0.5, 0.5], [0.25, 0.75]]] * 2
    config = load_hf_config(quantised)
    for kv_dtype, is_used in ((torch.float32, False), (torch.float8_e4m3fn, True)):
        caplog.clear()
        prepare_kv_scales(model, config, device=torch.device("cpu"), block_size=16, kv_dtype=kv_dtype)
        assert ("scales of an 8-bit KV cache" in caplog.text and "are not used" in caplog.text) != is_used
    assert [table.tolist() for table in tables] == [[[0.5, 0.5], [0.25, 0.75]]] * 2
    assert (log_probs(model) - log_probs(load(plain))).abs().max() < 1e-3


@pytest.mark.parametrize("change", [{"type": "int"}, {"symmetric": False}, {"strategy": "group"}])
def test_scales_of_another_kv_cache_are_dropped_with_a_word(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    quantised, plain = write_pair(
        tmp_path, "llama", {"w4a16": LINEAR}, edit=add_kv_scales, kv_cache_scheme={**KV_FLOATS, **change}
    )
    model = load(quantised)
    assert not any(module.kv_scales.is_given.any() for module in model.modules() if isinstance(module, Attention))
    assert caplog.text.count("the checkpoint's scales of a KV cache are not used") == 1
    assert (log_probs(model) - log_probs(load(plain))).abs().max() < 1e-3


def change(preset: str, path: str, value: Any, **fields: Any) -> dict[str, Any]:
    """Returns the config of a preset with the value of one field replaced."""
    config = json.loads(json.dumps(config_of(preset, **fields)))
    *owners, last = path.split(".")
    place = config
    for owner in owners:
        place = place[owner]
    place[last] = value
    return config


WEIGHTS, INPUTS = "config_groups.group_0.weights", "config_groups.group_0.input_activations"


@pytest.mark.parametrize(
    ("preset", "path", "value"),
    [
        ("w4a16", "format", "marlin-24"),
        ("w4a16", "format", "exl9"),
        ("w4a16", "config_groups.group_0.format", "sparse-24-bitmask"),
        ("w4a16", "quantization_status", "thawed"),
        ("w4a16", "sparsity_config", {"format": "sparse-24-bitmask"}),
        ("w4a16", "transform_config", {"config_groups": {"u": {"type": "hadamard"}}}),
        ("w4a16", "moe_sparsity_config", {"method": "prune", "num_experts": [3]}),
        ("w4a16", "strange_field", 1),
        ("w4a16", "ignore", "lm_head"),
        ("w4a16", "config_groups", ["group_0"]),
        ("w4a16", "config_groups.W4A16", ["Linear"]),
        ("w4a16", "config_groups.group_0.targets", ["re:("]),
        ("w4a16", "config_groups.group_0.output_activations", {"num_bits": 8}),
        ("w4a16", WEIGHTS, None),
        ("w4a16", f"{WEIGHTS}.num_bits", 9),
        ("w4a16", f"{WEIGHTS}.num_bits", "4"),
        ("w4a16", f"{WEIGHTS}.type", "float"),
        ("w4a16", f"{WEIGHTS}.strategy", "token"),
        ("w4a16", f"{WEIGHTS}.group_size", None),
        ("w4a16", f"{WEIGHTS}.group_size", -2),
        ("w4a16", f"{WEIGHTS}.dynamic", True),
        ("w4a16", f"{WEIGHTS}.actorder", "shuffled"),
        ("w4a16", f"{WEIGHTS}.codebook", [1]),
        ("nvfp4-a16", f"{WEIGHTS}.group_size", 32),
        ("fp8-dynamic", f"{WEIGHTS}.num_bits", 4),
        ("fp8-dynamic", f"{WEIGHTS}.symmetric", False),
        ("fp8-block", f"{WEIGHTS}.block_structure", [128]),
        ("w8a8", f"{INPUTS}.num_bits", 16),
        ("w8a8", f"{INPUTS}.strategy", "channel"),
        ("w8a8", "kv_cache_scheme", {"strategy": "block"}),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_the_name_of_its_field(
    preset: str, path: str, value: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match="config field 'quantization_config") as error:
        FORMAT(change(preset, path, value))
    name = path if path not in ("sparsity_config", "kv_cache_scheme") else next(f"{path}.{field}" for field in value)
    assert f"'quantization_config.{name}'" in str(error.value)


ODD_VALUES = (None, True, -1, 0.5, 10**30, "", "group", "re:", [], [[1]], [None], {}, {"a": 1}, float("nan"))


def paths_of(config: Any, path: str = "") -> Iterator[str]:
    """Yields the paths of all fields of a config."""
    if isinstance(config, dict):
        for field, value in config.items():
            yield f"{path}{field}"
            yield from paths_of(value, f"{path}{field}.")


@pytest.mark.parametrize("preset", ["w8a8-static-asym", "fp8-block", "nvfp4"])
def test_a_field_with_any_value_is_read_or_refused_by_name(preset: str) -> None:
    for path in paths_of(config_of(preset, kv_cache_scheme=KV_FLOATS, transform_config={"config_groups": {}})):
        for value in ODD_VALUES:
            try:
                FORMAT(change(preset, path, value, kv_cache_scheme=KV_FLOATS, transform_config={"config_groups": {}}))
            except UnsupportedModelError as error:
                assert path.split(".")[-2:][0] in str(error) or path in str(error)  # noqa: PT017


def drop(leaf: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{DAMAGED}.{leaf}"]

    return edit


def put(leaf: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = f"{DAMAGED}.{leaf}"
        tensors[name] = make(tensors.get(name, torch.zeros(3))).contiguous()

    return edit


DAMAGED = "model.layers.1.mlp.down_proj"  # 64 rows and 96 columns, 6 groups of 16


@pytest.mark.parametrize(
    ("preset", "edit", "message"),
    [
        ("w4a16", drop("weight_scale"), "lacks weight_scale"),
        ("w4a16", drop("weight_shape"), "lacks weight_shape"),
        ("w4a16", drop("weight_packed"), "lacks weight_packed"),
        ("w4a16-asym", drop("weight_zero_point"), "lacks weight_zero_point"),
        ("w4a16-g-idx", drop("weight_g_idx"), "lacks weight_g_idx"),
        ("nvfp4-a16", drop("weight_global_scale"), "lacks weight_global_scale"),
        ("fp8", drop("input_scale"), "lacks input_scale"),
        ("w4a16", put("weight_scale", lambda x: x[:, :5]), r"weight_scale has shape \[64, 5\].*asks for \[64, 6\]"),
        (
            "w4a16",
            put("weight_packed", lambda x: x[:, :11]),
            r"weight_packed has shape \[64, 11\].*asks for \[64, 12\]",
        ),
        ("w4a16", put("weight_shape", lambda x: x + 7), r"weight_packed has shape \[64, 12\].*\[71, 103\]"),
        ("w4a16-asym", put("weight_zero_point", lambda x: x[:7]), r"has shape \[7, 6\].*asks for \[8, 6\]"),
        ("w4a16-g-idx", put("weight_g_idx", lambda x: x + 5), "weight_g_idx has numbers from 5 to 10, and there are 6"),
        ("w4a16", put("weight_scale", lambda x: x.int()), "weight_scale is of torch.int32"),
        ("w8a8", put("weight", lambda x: x.float()), "saved before its weights were compressed"),
        ("w8a8", put("weight", lambda x: x.to(torch.float8_e4m3fn)), "weight is of torch.float8_e4m3fn"),
        ("fp8", put("weight_scale", lambda x: x.expand(64, 1)), r"weight_scale has shape \[64, 1\].*asks for \[1\]"),
        ("fp8", put("input_scale", lambda x: -x), "input_scale is -0.0.*positive"),
        ("w4a16", put("weight_bias", lambda x: x), "unexpected.*weight_bias"),
        ("w4a16", put("weight_global_scale", lambda x: x[:1]), "unexpected.*weight_global_scale"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    tmp_path: Path, preset: str, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    quantised, _ = write_pair(tmp_path, "llama", {preset: LINEAR}, edit=edit)
    with pytest.raises(CheckpointError, match=message) as error:
        load(quantised)
    assert DAMAGED.removeprefix("model.") in str(error.value)


def test_groups_that_do_not_divide_the_columns_are_refused(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", {"w4a16": LINEAR})
    path = quantised / "config.json"
    path.write_text(path.read_text().replace('"group_size": 16', '"group_size": 40'))
    with pytest.raises(CheckpointError, match=r"group_size=40 .* does not divide the 96 columns of model\.layers"):
        load(quantised)


def test_a_quantised_module_without_a_group_is_refused(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", {"w4a16": LINEAR})
    path = quantised / "config.json"
    path.write_text(path.read_text().replace('"Linear"', '"re:.*mlp.*", "SomeAttention"'))
    with pytest.raises(CheckpointError, match=r"self_attn\.. is quantised.*SomeAttention|self_attn.*SomeAttention"):
        load(quantised)


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("g-idx")])
def test_the_library_reads_and_writes_the_matrices_that_these_tests_write(preset: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    form, weights, inputs = PRESETS[preset]
    tensors, exact = quantise(torch.randn(150, 288), form, weights, inputs)
    if tensors["weight_scale"].dtype == torch.bfloat16:
        tensors["weight_scale"] = tensors["weight_scale"].float()  # The library dequantises in the type of the scales.
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    theirs = compressor.decompress(tensors, scheme)
    assert {*compressor.compression_param_names(scheme)} <= tensors.keys()
    tolerance = 2**-8 if form.startswith("nvfp4") else 1e-6
    torch.testing.assert_close(theirs["weight"].float(), exact, rtol=tolerance, atol=1e-7)
    # What it has read has scales as floats, and zero points that are not packed.
    written = compressor.compress({**theirs, "weight": exact, "weight_scale": theirs["weight_scale"].float()}, scheme)
    assert written.keys() == tensors.keys()
    for leaf, tensor in written.items():
        assert tensor.shape == tensors[leaf].shape and tensor.dtype == tensors[leaf].dtype
        assert torch.equal(tensor.float(), tensors[leaf].float()), leaf

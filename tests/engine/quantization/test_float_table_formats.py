"""Checkpoints in 8-bit and 4-bit floats, of bitsandbytes and of torchao run as the model with dequantised matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bnb_torchao_files import bnb_4bit, bnb_int8, torchao_int4, torchao_intx
from checkpoints import tiny_checkpoint
from float_files import Write, fp8_blocks, fp8_rows, fp8_tensor, nvfp4
from gptq_files import quantise_folder
from millrace.engine.device import Device
from millrace.engine.errors import CheckpointError, UnsupportedModelError
from millrace.engine.llm import LLM
from millrace.engine.loading.stored_forms import read_stored_forms
from millrace.engine.models import Decoder, ModelOptions, load_hf_config, load_model, weight_map
from millrace.engine.quantization.registry import find_format
from millrace.engine.quantization.stored import StoredForms
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.storage import Location
from millrace.engine.weights.codes import InputQuant
from millrace.engine.weights.quantised_matrix import QuantisedMatrix
from millrace.engine.weights.remote import iter_remote_tensors
from millrace.engine.weights.tensor_view import StoredTensor
from paged import PagedSequences, random_sequences

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {**FP8, "activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"}
MISTRAL = {**STATIC, "weight_block_size": None, "dequantize": False, "modules_to_not_convert": ["lm_head"]}
BLOCKS = {**FP8, "fmt": "e4m3", "weight_block_size": [24, 40]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", "*router*"]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB_INT8 = {"quant_method": "bitsandbytes", "_load_in_8bit": True, "llm_int8_threshold": 6.0}


def torchao(kind: str, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": fields}}}


INT8_ROWS = torchao("Int8WeightOnlyConfig", granularity={"_type": "PerRow", "_version": 1, "_data": {"dim": -1}})
INTX = torchao(
    "IntxWeightOnlyConfig",
    weight_dtype={"_type": "torch.dtype", "_data": "int4"},
    granularity={"_type": "PerGroup", "_version": 1, "_data": {"group_size": 16}},
    mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
)
INT4 = torchao(
    "Int4WeightOnlyConfig", group_size=32, int4_packing_format={"_type": "Int4PackingFormat", "_data": "PLAIN"}
)

KINDS: dict[str, tuple[str, Write, Mapping[str, Any]]] = {
    "fp8": ("llama", fp8_tensor(), FP8),
    "fp8-static": ("qwen2", fp8_tensor(inputs=0.01), STATIC),
    "fp8-mistral": ("mistral", fp8_tensor(0.01, "weight_scale_inv", "activation_scale"), MISTRAL),
    "fp8-blocks": ("qwen3", fp8_blocks(24, 40), BLOCKS),
    "fp8-128": ("qwen3", fp8_blocks(128, 128), {**BLOCKS, "weight_block_size": [128, 128]}),
    "fp8-ue8m0": ("llama", fp8_blocks(24, 40), {**BLOCKS, "scale_fmt": "ue8m0"}),
    "fp8-e8m0fnu": ("llama", fp8_blocks(24, 40, dtype=torch.float8_e8m0fnu), {**BLOCKS, "scale_fmt": "ue8m0"}),
    "fp8-bytes": ("llama", fp8_blocks(24, 40, dtype=torch.uint8), {**BLOCKS, "scale_fmt": "ue8m0"}),
    "fp8-mla": ("deepseek-v3", fp8_blocks(24, 40), BLOCKS),
    "fp8-experts": ("qwen3-moe", fp8_blocks(16, 32), {**BLOCKS, "weight_block_size": [16, 32]}),
    "fp8-fused": ("phi3", fp8_blocks(24, 40), BLOCKS),
    "fbgemm": ("llama", fp8_rows(), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt-fp8": ("llama", fp8_tensor(inputs=0.01), MODELOPT),
    "modelopt-rows": ("llama", fp8_rows((-1,)), {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "modelopt-blocks": (
        "llama",
        fp8_blocks(128, 128, "weight_scale", dims=4),
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}},
    ),
    "nvfp4": ("llama", nvfp4(inputs=0.01), {**MODELOPT, "quant_algo": "NVFP4", "group_size": 16}),
    "nf4": ("qwen2", bnb_4bit(), BNB),
    "nf4-nested": ("llama", bnb_4bit(block=32, nested=True), {**BNB, "bnb_4bit_use_double_quant": True}),
    "nf4-bfloat16": ("llama", bnb_4bit(storage=torch.bfloat16), {**BNB, "bnb_4bit_quant_storage": "bfloat16"}),
    "fp4": ("llama", bnb_4bit("fp4"), {**BNB, "bnb_4bit_quant_type": "fp4"}),
    "bnb-int8": ("qwen3-moe", bnb_int8, BNB_INT8),
    "torchao-int8": ("llama", torchao_intx(), {**INT8_ROWS, "quant_type_kwargs": {}}),
    "torchao-intx": ("llama", torchao_intx(4, 16, symmetric=False), INTX),
    "torchao-int4": ("llama", torchao_int4(32), INT4),
}
"""Name -> family, writer of a matrix, quantization_config."""


BOUND = 1e-3  # of a log-probability: both models compute with the same numbers, in another order.


def stored_forms(folder: Path) -> StoredForms | None:
    config, place = load_hf_config(folder), Location.at(folder)
    weights = weight_map(folder, config, torch.float32)
    return read_stored_forms(place, weights, config, None, Device.choose("cpu"))


def load(folder: Path) -> Decoder:
    options = ModelOptions(stored=stored_forms(folder))
    return load_model(folder, load_hf_config(folder), torch.float32, "cpu", options)


@torch.inference_mode()
def logprobs(folder: Path) -> Tensor:
    """Returns the log-probabilities of some sequences, `[num_tokens, vocab_size]`."""
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(load(folder), sequences, torch.float32).run(whole)).log_softmax(-1)


def assert_same(quantised: Path, plain: Path) -> None:
    ours, theirs = logprobs(quantised), logprobs(plain)
    torch.testing.assert_close(ours, theirs, atol=BOUND, rtol=0)
    best = theirs.topk(2, dim=-1)
    sure = best.values[:, 0] - best.values[:, 1] > 2 * BOUND
    assert sure.float().mean() > 0.9 and torch.equal(ours.argmax(-1)[sure], best.indices[sure, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_probabilities_of_its_dequantised_model(tmp_path: Path, kind: str) -> None:
    family, write, config = KINDS[kind]
    folder = tiny_checkpoint(tmp_path / "model", family, tie_word_embeddings=False)
    assert_same(*quantise_folder(folder, tmp_path, lambda name, matrix: write(matrix), dict(config)))


def joined(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> QuantisedMatrix:
    """Returns the matrix that a format makes of the tensors of one module."""
    checkpoint_format = find_format(config)
    assert checkpoint_format is not None
    ((name, matrix),) = checkpoint_format.join((f"x.{leaf}", tensor) for leaf, tensor in tensors.items())
    assert name == "x.weight" and isinstance(matrix, QuantisedMatrix)
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@hypothesis_settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_part_of_a_matrix_is_read_as_the_layout_says(kind: str, data: st.DataObject) -> None:
    _, write, config = KINDS[kind]
    num_rows, num_columns = data.draw(st.integers(1, 150)), 32 * data.draw(st.integers(1, 5))
    packed = write(torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0)))
    matrix = joined(config, packed.tensors)
    assert matrix.shape == packed.weight.shape
    first, left = data.draw(st.integers(0, num_rows - 1)), data.draw(st.integers(0, num_columns - 1))
    height, width = data.draw(st.integers(1, num_rows - first)), data.draw(st.integers(1, num_columns - left))
    part = matrix.narrow(0, first, height).narrow(1, left, width)
    assert part.shape == (height, width)
    expected = packed.weight[first : first + height, left : left + width]
    torch.testing.assert_close(part.read(), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_matrix_behind_a_url_is_read_as_one_on_disk(tmp_path: Path, kind: str) -> None:
    _, write, config = KINDS[kind]
    packed = write(torch.randn(50, 96, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "model.safetensors"
    save_file({leaf: tensor.contiguous() for leaf, tensor in packed.tensors.items()}, path)
    matrix = joined(config, dict(iter_remote_tensors([Location.at(path)])))
    expected = packed.weight[13:40, 32:64]
    torch.testing.assert_close(matrix.narrow(0, 13, 27).narrow(1, 32, 32).read(), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8-mla", pytest.param("nf4", marks=pytest.mark.soak)])
def test_two_ranks_give_what_the_dequantised_model_gives(tmp_path: Path, kind: str) -> None:
    # No rank's part begins with a block of scales, of rows, columns or experts.
    family, write, config = KINDS[kind]
    folder = tiny_checkpoint(tmp_path / "model", family)
    quantised, plain = quantise_folder(folder, tmp_path, lambda name, matrix: write(matrix), dict(config))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    outputs = []
    for place, num_ranks in ((quantised, 2), (plain, 1)):
        settings = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "tensor_parallel_size": num_ranks}
        with LLM(str(place), **settings) as llm:
            outputs.append(llm.generate([list(range(5, 30)), [7, 8, 9]], params, use_tqdm=False))
    for ours, theirs in zip(*outputs, strict=True):
        (one,), (two,) = ours.outputs, theirs.outputs
        assert one.token_ids == two.token_ids
        for mine, other in zip(one.logprobs, two.logprobs, strict=True):
            assert mine.keys() == other.keys()
            assert all(mine[token].logprob == pytest.approx(other[token].logprob, abs=BOUND) for token in mine)


@torch.inference_mode()
def test_parts_of_a_fused_layer_keep_their_own_scales(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    quantised, _ = quantise_folder(folder, tmp_path, lambda name, matrix: fp8_tensor(0.01)(matrix), STATIC)
    tensors = load_file(quantised / "model.safetensors")
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert len({float(tensors[f"{module}.weight_scale"]) for module in modules}) == 3
    rows = [tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"] for module in modules]
    torch.testing.assert_close(load(quantised).layers[0].attention.qkv(torch.eye(64)), torch.cat(rows).t())


def test_modules_are_left_plain_by_their_whole_names(tmp_path: Path) -> None:
    # `mlp.up` is no module. A pattern would take it for the beginning of one.
    plain = "model.layers.0.mlp.gate_proj"
    config = {**STATIC, "ignored_layers": ["lm_head", plain, "model.layers.0.mlp.up"]}
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    write = lambda name, matrix: None if name == plain else fp8_tensor(0.01)(matrix)  # noqa: E731
    quantised, expected = quantise_folder(folder, tmp_path, write, config)
    stored = stored_forms(quantised)
    assert stored is not None
    assert stored.of("layers.0.mlp.gate_up.gate") is None and stored.of("layers.0.mlp.gate_up.up") is not None
    assert_same(quantised, expected)


def test_inputs_are_quantised_as_the_checkpoint_says() -> None:
    matrix = torch.randn(48, 80)
    expected = {
        "fp8": InputQuant("fp8"),
        "fp8-static": InputQuant("fp8", scale=0.25),
        "fp8-mistral": InputQuant("fp8", scale=0.25),
        "fp8-blocks": InputQuant("fp8", 40),
        "fbgemm": InputQuant("fp8"),
        "modelopt-fp8": InputQuant("fp8", scale=0.25),
        "modelopt-rows": InputQuant("fp8"),
        "modelopt-blocks": None,
        "nvfp4": None,
        "bnb-int8": None,
        "torchao-int8": None,
    }
    for kind, inputs in expected.items():
        _, write, config = KINDS[kind]
        tensors = write(matrix).tensors
        tensors |= {leaf: torch.tensor(0.25) for leaf in ("input_scale", "activation_scale") if leaf in tensors}
        assert joined(config, tensors).form.inputs == inputs, kind
        planned = find_format(config).planned_form
        assert (planned.kind, planned.bits) == ((form := joined(config, tensors).form).kind, form.bits)


def test_the_scales_of_a_cache_are_read_beside_those_of_matrices(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    config = {**MODELOPT, "kv_cache_quant_algo": "FP8"}
    quantised, _ = quantise_folder(folder, tmp_path, lambda name, matrix: fp8_tensor(0.01)(matrix), config)
    tensors = load_file(quantised / "model.safetensors")
    for layer in range(2):
        for name in "kv":
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.{name}_scale"] = torch.tensor(
                0.5 if name == "k" else 3.0
            )
    save_file(tensors, quantised / "model.safetensors")
    table = load(quantised).layers[1].attention.kv_scales.table
    assert table.tolist() == [[0.5, 0.5], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (FP8, {"activation_scheme": "token"}, r"\.activation_scheme' is 'token'; it can be dynamic or static"),
        (FP8, {"fmt": "e5m2"}, r"\.fmt' is 'e5m2'; it can be e4m3"),
        (FP8, {"scale_fmt": "ue4m3"}, r"\.scale_fmt' is 'ue4m3'"),
        (FP8, {"expert_dtype": "fp4"}, r"\.expert_dtype' is 'fp4'; it can be fp8"),
        (
            FP8,
            {"weight_block_size": [128]},
            r"\.weight_block_size' is \[128\]; it can be null or two",
        ),
        (FP8, {"weight_block_size": [0, 128]}, r"\.weight_block_size' is \[0, 128\]"),
        (STATIC, {"weight_block_size": [128, 128]}, r"\.activation_scheme' is 'static'; it can be dynamic, with"),
        (FP8, {"ignored_layers": "lm_head"}, r"\.ignored_layers' is 'lm_head'; it can be a list of names"),
        (FP8, {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, r"\.kv_cache_scheme' is .*; it can be null, static"),
        (FP8, {"activation_scale_ub": -1}, r"\.activation_scale_ub' is -1; it can be a positive number"),
        (FP8, {"rotation": "hadamard"}, r"\.rotation' is 'hadamard'; it can be absent"),
        (MODELOPT, {"quant_algo": "W4A8_AWQ"}, r"\.quant_algo' is 'W4A8_AWQ'; it can be fp8 or .* or nvfp4"),
        (MODELOPT, {"quant_algo": None}, r"\.quant_algo' is None"),
        (MODELOPT, {"kv_cache_quant_algo": "NVFP4"}, r"\.kv_cache_quant_algo' is 'NVFP4'"),
        (MODELOPT, {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, r"\.kv_cache_scheme' is"),
        (MODELOPT, {"quantization": 8}, r"\.quantization' is 8; it can be an object"),
        (MODELOPT, {"quant_algo": "NVFP4", "group_size": 32}, r"\.group_size' is 32; it can be 16"),
        (BNB, {"bnb_4bit_quant_type": "nf3"}, r"\.bnb_4bit_quant_type' is 'nf3'; it can be nf4 or fp4"),
        (BNB, {"bnb_4bit_quant_storage": "int32"}, r"\.bnb_4bit_quant_storage' is 'int32'; it can be uint8"),
        (INT8_ROWS, {"quant_type": "int4wo"}, r"\.quant_type' is 'int4wo'; it can be Int8WeightOnlyConfig or"),
        ({**INT8_ROWS, "quant_type_kwargs": {"group_size": 32}}, {}, r"\.quant_type_kwargs' is \{'group_size': 32\}"),
        (torchao("FqnToConfig"), {}, r"\.quant_type' is 'FqnToConfig'"),
        (
            torchao("Int4WeightOnlyConfig", int4_packing_format={"_type": "Int4PackingFormat", "_data": "PRESHUFFLED"}),
            {},
            r"\.int4_packing_format' is 'PRESHUFFLED'; it can be plain",
        ),
        ({"quant_method": "quark"}, {}, r"\.quant_method' is 'quark'; implemented are .*use another checkpoint"),
        ({"quant_method": "bitsandbyte"}, {}, r"the nearest is bitsandbytes"),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(
    config: Mapping[str, Any], fields: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_format({**config, **fields})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "fp8",
            {"weight_scale": None},
            "x has weight; it must have weight and one of weight_scale and weight_scale_inv",
        ),
        ("fp8-blocks", {"weight_scale_inv": None}, "x has weight; it must have weight and one of"),
        ("fp8", {"weight": None}, "x has weight_scale; it must have weight and one of"),
        ("fp8", {"weight": torch.ones(32, 64)}, r"x\.weight is of torch.float32 .* matrix of torch.float8_e4m3fn"),
        ("fp8", {"weight_scale": torch.ones(3)}, r"x\.weight_scale has shape \[3\] .*_size=null .* \[32, 1\]"),
        ("fp8", {"weight_scale": torch.tensor(math.nan)}, r"the scales of x hold NaN or infinite numbers; fetch"),
        ("bnb-int8", {"SCB": torch.full((32,), math.inf)}, "the scales of x hold NaN"),
        ("nf4", {"weight.absmax": torch.full((32,), math.nan)}, "the scales of x hold NaN"),
        ("fp8", {"input_scale": torch.tensor(1.0)}, r"x has input_scale, and .*activation_scheme' is 'dynamic'"),
        ("fp8-static", {"input_scale": None}, "x has no input_scale, which a static quantisation of inputs needs"),
        ("fp8-static", {"input_scale": torch.tensor(0.0)}, r"x\.input_scale is 0\.0; it must be one positive number"),
        ("fp8-static", {"input_scale": torch.ones(2)}, r"x\.input_scale is of shape \[2\]"),
        (
            "fp8-blocks",
            {"weight_scale_inv": torch.ones(1, 2)},
            r"shape \[1, 2\] .* weight_block_size=\[24, 40\] .* \[2, 2\]",
        ),
        ("modelopt-fp8", {"weight_scale": torch.ones(3)}, r"x\.weight_scale has shape \[3\] .* quant_algo=FP8"),
        ("fp8-blocks", {"weight_scale_inv": torch.ones(2, 2).byte()}, "is of torch.uint8; scales are floats, or with"),
        ("modelopt-fp8", {"weight_scale": None}, "x has no weight_scale, and .*quant_algo' is 'FP8', which stores"),
        ("modelopt-fp8", {"input_scale": None}, "x has no input_scale"),
        ("nvfp4", {"weight_scale_2": None}, "x has no weight_scale_2, and .*quant_algo' is 'NVFP4'"),
        ("nvfp4", {"weight_scale": torch.ones(32, 2).to(torch.float8_e4m3fn)}, r"x\.weight_scale has shape \[32, 2\]"),
        ("nvfp4", {"weight": torch.ones(32, 30).byte()}, r"multiple of 8 bytes"),
        ("nf4", {"weight.absmax": None}, r"x has .*, and no weight\.absmax; fetch all files"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": None}, "and no weight.quant_state.bitsandbytes__nf4 or fp4"),
        ("nf4", {"weight": torch.ones(1000, 1).byte()}, r"x\.weight has shape \[1000, 1\] .* asks for \[1024, 1\]"),
        ("nf4", {"weight.absmax": torch.ones(32).byte()}, r"weight.absmax of torch.uint8; .* of torch.float32"),
        (
            "nf4",
            {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b'{"quant_type": "fp4"}')).byte()},
            r"x\.weight\.quant_state\.bitsandbytes__nf4 is '.*'; it must be an object in JSON",
        ),
        ("bnb-int8", {"SCB": None}, r"x has weight, weight_format, and no SCB"),
        ("bnb-int8", {"SCB": torch.ones(31)}, r"x\.SCB has shape \[31\] .* asks for \[32\]"),
        ("bnb-int8", {"weight_format": torch.tensor(2).byte()}, r"x\.weight_format is 2: .* a GPU's kernel"),
        ("torchao-int8", {"_weight_scale": None}, "x has _weight_qdata, _weight_zero_point; implemented are"),
        ("torchao-int8", {"_weight_act_pre_scale": torch.ones(64)}, "x has .*_weight_act_pre_scale"),
        ("torchao-int8", {"_weight_zero_point": torch.ones(32, 1).char()}, "is not 0, and .* symmetric"),
        (
            "torchao-intx",
            dict.fromkeys(("_weight_scale", "_weight_zero_point"), torch.ones(32, 3).char()),
            "3 groups do not divide its 64 columns",
        ),
        ("torchao-int4", {"_weight_zero_point": torch.ones(2, 32).char()}, "which is not what .*quant_type' says"),
    ],
)
def test_damaged_matrices_are_refused_by_name(kind: str, changes: Mapping[str, Tensor | None], message: str) -> None:
    _, write, config = KINDS[kind]
    tensors = {**write(torch.linspace(-1.0, 1.0, 32 * 64).view(32, 64)).tensors, **changes}
    with pytest.raises(CheckpointError, match=message):
        joined(config, {leaf: tensor for leaf, tensor in tensors.items() if tensor is not None}).read()

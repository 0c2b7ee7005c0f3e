"""Experts of quantised checkpoints stay as they are stored, and give what their dequantised matrices give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints import tiny_checkpoint
from compressed_tensors_files import write_compressed_tensors
from float_files import fp8_blocks
from gptq_files import Packed, awq, gptq, quantise_folder, settings
from millrace import LLM, SamplingParams
from millrace.engine.device import Device
from millrace.engine.errors import ConfigError
from millrace.engine.layers import Experts, ExpertsLayer
from millrace.engine.loading.stored_forms import read_stored_forms
from millrace.engine.models import Decoder, ModelOptions, load_hf_config, load_model, weight_map
from millrace.engine.parallel.shard import Shard
from millrace.engine.quantization import coded_experts
from millrace.engine.quantization.coded_experts import CodedExperts
from millrace.engine.quantization.registry import find_format, find_scheme
from millrace.engine.quantization.stored import StoredForms, StoredScheme
from millrace.engine.storage import Location
from millrace.engine.weights.checkpoint import read_part
from millrace.engine.weights.codes import Codes, InputQuant, QuantForm
from paged import PagedSequences, random_sequences

CPU = torch.device("cpu")
DEVICE = Device.choose("cpu")
BOUND = 1e-3  # of a log-probability: both models compute with the same numbers, in another order.


def load(folder: Path) -> Decoder:
    """Loads a checkpoint as an engine does."""
    config, place = load_hf_config(folder), Location.at(folder)
    stored = read_stored_forms(place, weight_map(folder, config, torch.float32), config, None, DEVICE)
    return load_model(folder, config, torch.float32, "cpu", ModelOptions(stored=stored))


@torch.inference_mode()
def logprobs(model: Decoder) -> Tensor:
    """Returns the log-probabilities of some sequences, `[num_tokens, vocab_size]`."""
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, torch.float32).run(whole)).log_softmax(-1)


def assert_same(quantised: Path, plain: Path) -> Experts:
    """Compares two checkpoints, and returns the experts of a layer of the first."""
    model = load(quantised)
    torch.testing.assert_close(logprobs(model), logprobs(load(plain)), atol=BOUND, rtol=0)
    return model.layers[1].mlp.experts


def names_of_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


FOLDERS: Mapping[str, tuple[str, dict[str, Any], Callable[[str, Tensor], Packed], dict[str, Any], list[str]]] = {
    "mixtral in AWQ": (
        "mixtral",
        {"intermediate_size": 128},
        lambda name, weight: awq(weight, 32),
        settings("awq"),
        ["codes", "scales", "zeros"],
    ),
    "qwen3-moe in GPTQ, 8 bits, one group": (
        "qwen3-moe",
        {"moe_intermediate_size": 64},
        lambda name, weight: gptq(weight, bits=8, group_size=-1),
        settings("gptq", bits=8, group_size=-1),
        ["codes", "scales"],
    ),
    "qwen3-moe in fp8, by block": (
        "qwen3-moe",
        {"moe_intermediate_size": 96},
        lambda name, weight: fp8_blocks(64, 32)(weight),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 32]},
        ["codes", "scales"],
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_quantised_experts_give_the_probabilities_of_the_dequantised_model(tmp_path: Path, case: str) -> None:
    family, sizes, quantise, config, parts = FOLDERS[case]
    plain = tiny_checkpoint(tmp_path / "model", family, **sizes)
    experts = assert_same(*quantise_folder(plain, tmp_path, quantise, config))
    assert type(experts) is CodedExperts
    assert names_of_parameters(experts) == [f"{matrix}_{part}" for matrix in ("w13", "w2") for part in parts]


def test_experts_of_compressed_tensors_stay_packed(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", "qwen3-moe", moe_intermediate_size=64)
    ignored = ["lm_head", "re:.*mlp.gate$"]
    quantised = write_compressed_tensors(plain, tmp_path / "packed", {"w4a16-channel": ["Linear"]}, ignore=ignored)
    assert type(assert_same(quantised, plain)) is CodedExperts


@pytest.mark.slow
def test_two_ranks_with_slices_or_with_whole_experts_give_what_the_dequantised_model_gives(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "model", "mixtral", intermediate_size=128, num_local_experts=4)
    quantised, plain = quantise_folder(plain, tmp_path, lambda name, weight: awq(weight, 32), settings("awq"))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    ways = ((plain, {}), (quantised, {"tensor_parallel_size": 2}))
    ways += ((quantised, {"tensor_parallel_size": 2, "enable_expert_parallel": True}),)
    tokens, numbers = [], []
    for folder, more in ways:
        with LLM(str(folder), dtype="float32", device="cpu", max_model_len=64, **more) as llm:
            (output,) = llm.generate([list(range(5, 30))], params, use_tqdm=False)
        tokens.append(output.outputs[0].token_ids)
        numbers.append([next(iter(found.values())).logprob for found in output.outputs[0].logprobs])
    assert tokens == [tokens[0]] * 3
    for ours in numbers[1:]:
        assert ours == pytest.approx(numbers[0], abs=BOUND)


def test_experts_in_mxfp4_stay_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"intermediate_size": 64}
    packed, plain = (tiny_checkpoint(tmp_path / name, "gpt-oss", **sizes) for name in ("packed", "plain"))
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(plain / "model.safetensors")
    numbers = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = tensors.pop(name).shape
        shape = (num_experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        halves = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        numbers[name] = convert_moe_packed_tensors(*halves, dtype=torch.float32).contiguous()
    save_file(tensors, packed / "model.safetensors")
    save_file(numbers, plain / "model.safetensors")
    config = packed / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "mxfp4"},', 1))
    experts = assert_same(packed, plain)
    assert type(experts) is CodedExperts
    weights = {name: tensor for name, tensor in experts.named_parameters() if "bias" not in name}
    assert {tensor.dtype for tensor in weights.values()} == {torch.uint8}
    assert sum(tensor.nbytes for tensor in weights.values()) == 5 * 3 * 64 * 64 * 17 // 32
    assert "dequantised" not in caplog.text


def experts_layer(inner: Shard, own: Shard | None = None, gate: str = "silu", hidden_size: int = 64) -> ExpertsLayer:
    return ExpertsLayer(
        name="layers.0.mlp.experts",
        own=own or Shard(4),
        hidden_size=hidden_size,
        inner=inner,
        gate=gate,
        bias=True,
        adds_down_bias=inner.index == 0,
        dtype=torch.float32,
        device=CPU,
    )


INT4 = QuantForm("awq", "int", 4, 32, has_zeros=True)


def stored_scheme(layer: ExpertsLayer, *forms: QuantForm | None) -> StoredScheme:
    """Returns the scheme of a checkpoint whose experts' matrices have some forms in turns."""
    parts = [
        f"{layer.name}.{expert}.{part}" for expert in range(layer.own.size) for part in (*layer.projections, "down")
    ]
    found = {name: forms[i % len(forms)] for i, name in enumerate(parts)}
    checkpoint_format = find_format(settings("awq"))
    assert checkpoint_format is not None
    return StoredScheme(StoredForms(DEVICE, checkpoint_format, {name: form for name, form in found.items() if form}))


def fill(experts: Experts, whole: dict[str, Any]) -> None:
    """Fills experts from the tensors of a checkpoint, which are made as they are asked for."""
    torch.manual_seed(len(whole))
    checkpoint_format = find_format(settings("awq"))
    assert checkpoint_format is not None
    for name, slot in experts.slots():
        if name not in whole and name.endswith("weight"):
            packed = awq(torch.randn(slot.whole_shape) / 8)
            ((_, whole[name]),) = checkpoint_format.join((f"x.{leaf}", each) for leaf, each in packed.tensors.items())
        elif name not in whole:
            whole[name] = torch.randn(slot.whole_shape)
        slot.fill(read_part(slot, whole[name]))


@pytest.mark.parametrize("gate", ["clamped_swiglu", "relu_squared"])
@pytest.mark.parametrize("whole_experts", [False, True], ids=["slices of experts", "whole experts"])
@torch.inference_mode()
def test_the_addends_of_two_ranks_are_the_result_of_one(whole_experts: bool, gate: str) -> None:
    tensors: dict[str, Any] = {}
    one = experts_layer(Shard(64), gate=gate)
    ranks = [
        experts_layer(Shard(64), Shard(4, i, 2), gate) if whole_experts else experts_layer(Shard(64, i, 2), gate=gate)
        for i in range(2)
    ]
    made = [stored_scheme(layer, INT4).make_experts(layer) for layer in (one, *ranks)]
    plain = Experts(one, deterministic=False)
    for experts in (*made, plain):
        fill(experts, tensors)
    assert [type(experts) for experts in made] == [CodedExperts] * 3
    hidden, weights = torch.randn(9, 64), torch.rand(9, 3)
    ids = torch.stack([torch.randperm(4)[:3] for _ in range(9)]).int()
    wanted, *addends = (experts(hidden, ids, weights) for experts in made)
    torch.testing.assert_close(sum(addends), wanted)
    torch.testing.assert_close(plain(hidden, ids, weights), wanted)


def test_a_rank_whose_slice_cuts_a_group_is_told_to_take_whole_experts() -> None:
    layer = experts_layer(Shard(96, 0, 2))
    with pytest.raises(ConfigError, match=r"has 48 of the 96 columns .* in groups of 32; set enable_expert_parallel"):
        stored_scheme(layer, INT4).make_experts(layer)
    whole = experts_layer(Shard(96), Shard(4, 0, 2))
    assert type(stored_scheme(whole, INT4).make_experts(whole)) is CodedExperts


@pytest.mark.parametrize(
    ("forms", "reason"),
    [
        ((INT4, INT4, INT4, None, INT4, INT4), "the experts of a layer are stored in different ways"),
        ((INT4, replace(INT4, bits=8), INT4), "the experts of a layer are stored in different ways"),
        ((replace(INT4, bits=3),), "there is no kernel for experts in awq with 3 bits"),
        ((replace(INT4, act_order=True),), "with desc_act the columns of each expert have an order of their own"),
        ((INT4, INT4, replace(INT4, group_size=16)), "there is no kernel for experts with groups of 16 of 64 columns"),
    ],
    ids=["one is plain", "gate and up", "bits", "act-order", "groups"],
)
def test_experts_without_a_kernel_are_dequantised_with_a_word(forms: tuple[QuantForm | None, ...], reason: str) -> None:
    layer = experts_layer(Shard(64))
    scheme = stored_scheme(layer, *forms)
    assert type(scheme.make_experts(layer)) is Experts
    assert [*scheme.notes()] == [
        f"layers.0.mlp.experts are dequantised at load, so they take the memory of full precision: {reason}"
    ]


def test_without_the_compiled_kernel_a_cpu_gets_dequantised_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_experts, "can_multiply_codes", lambda device: device != "cpu")
    layer = experts_layer(Shard(64))
    scheme = stored_scheme(layer, INT4)
    assert type(scheme.make_experts(layer)) is Experts
    assert ": the compiled kernels are missing" in next(scheme.notes())


def test_experts_that_a_checkpoint_leaves_plain_are_plain_without_a_word() -> None:
    layer = experts_layer(Shard(64))
    scheme = stored_scheme(layer, None)
    assert type(scheme.make_experts(layer)) is Experts
    assert not [*scheme.notes()]


def test_static_scales_of_activations_differ_between_experts_that_are_stored_alike() -> None:
    layer, fp8 = experts_layer(Shard(64)), QuantForm("fp8", "fp8", 8)
    forms = [replace(fp8, inputs=InputQuant("fp8", scale=1.0 + i)) for i in range(5)]
    assert type(stored_scheme(layer, *forms).make_experts(layer)) is CodedExperts


@pytest.mark.parametrize("block", [(1, 0), (32, 32), (32, 128)], ids=str)
@torch.inference_mode()
def test_experts_in_fp8_are_their_dequantised_matrices(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = experts_layer(Shard(72))  # The last group of 32 columns has 8.
    form = QuantForm("fp8", "fp8", 8, block[1], row_block=block[0])
    coded, plain = CodedExperts(layer, form, form, deterministic=False), Experts(layer, deterministic=False)
    plain_slots = dict(plain.slots())
    for name, slot in coded.slots():
        if name.endswith("bias"):
            numbers = given = torch.randn(slot.shape)
        else:
            num_rows, num_columns = slot.shape
            group = torch.arange(num_columns) // (block[1] or num_columns)
            values = torch.randn(num_rows, num_columns).to(torch.float8_e4m3fn)
            scales = torch.rand(num_rows, int(group.max()) + 1) / 8
            given, numbers = Codes(values, scales, groups=group), values.float() * scales[:, group]
        slot.fill(given)
        plain_slots[name].fill(numbers)
    ids = torch.tensor([[0, 3], [2, 1], [3, 2]], dtype=torch.int32)
    hidden, weights = torch.randn(3, 64), torch.rand(3, 2)
    torch.testing.assert_close(coded(hidden, ids, weights), plain(hidden, ids, weights))


@pytest.mark.parametrize(("name", "error"), [("int4", 0.2), ("int8", 0.02), ("fp8", 0.06)])
@torch.inference_mode()
def test_plain_experts_are_quantised_while_they_are_loaded(name: str, error: float) -> None:
    layer = experts_layer(Shard(96))
    coded, plain = find_scheme(name)().make_experts(layer), Experts(layer, deterministic=False)
    assert type(coded) is CodedExperts
    torch.manual_seed(0)
    for (_, slot), (_, other) in zip(coded.slots(), plain.slots(), strict=True):
        numbers = torch.randn(slot.shape) / 8
        slot.fill(numbers)
        other.fill(numbers)
    hidden, weights = torch.randn(33, 64), torch.ones(33, 1)
    ids = torch.randint(4, (33, 1)).int()
    wanted = plain(hidden, ids, weights)
    distance = (coded(hidden, ids, weights) - wanted).norm() / wanted.norm()
    assert error / 8 < distance < error

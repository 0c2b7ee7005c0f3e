"""Checkpoints in AWQ and GPTQ run as the same model with dequantised matrices; damaged ones are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import tiny_checkpoint
from gptq_files import Packed, Quantise, awq, gptq, quantise_folder, settings
from millrace.engine.device import Device
from millrace.engine.errors import CheckpointError, UnsupportedModelError
from millrace.engine.llm import LLM
from millrace.engine.loading.stored_forms import read_stored_forms
from millrace.engine.models import Decoder, ModelOptions, load_hf_config, load_model, weight_map
from millrace.engine.quantization.group_linear import GroupLinear
from millrace.engine.quantization.registry import find_format
from millrace.engine.quantization.split_linear import SplitLinear
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.storage import Location
from millrace.engine.weights.quantised_matrix import QuantisedMatrix
from millrace.engine.weights.remote import iter_remote_tensors
from oracles import greedy
from paged import PagedSequences, random_sequences

WIDE = {"intermediate_size": 128}
BOUND = 1e-3  # of a log-probability: both models compute with the same numbers, in another order.


def load(folder: Path, model_impl: str = "auto") -> Decoder:
    """Loads a checkpoint as an engine does."""
    config, place = load_hf_config(folder, model_impl=model_impl), Location.at(folder)
    stored = read_stored_forms(place, weight_map(folder, config, torch.float32), config, None, Device.choose("cpu"))
    return load_model(folder, config, torch.float32, "cpu", ModelOptions(stored=stored))


@torch.inference_mode()
def logprobs(model: Decoder) -> Tensor:
    """Returns the log-probabilities of some sequences, `[num_tokens, vocab_size]`."""
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, torch.float32).run(whole)).log_softmax(-1)


def assert_same(quantised: Path, plain: Path, model_impl: str = "auto") -> None:
    ours, theirs = logprobs(load(quantised, model_impl)), logprobs(load(plain))
    torch.testing.assert_close(ours, theirs, atol=BOUND, rtol=0)
    best = theirs.topk(2, dim=-1)
    sure = best.values[:, 0] - best.values[:, 1] > 2 * BOUND
    assert sure.float().mean() > 0.9 and torch.equal(ours.argmax(-1)[sure], best.indices[sure, 0])


def joined(method: str, packed: Packed, **fields: Any) -> QuantisedMatrix:
    """Returns the matrix that a format makes of the tensors of one layer."""
    checkpoint_format = find_format(settings(method, **fields))
    ((name, matrix),) = checkpoint_format.join((f"x.{leaf}", tensor) for leaf, tensor in packed.tensors.items())
    assert name == "x.weight" and isinstance(matrix, QuantisedMatrix)
    return matrix


def assert_every_part_is_read(matrix: QuantisedMatrix, weight: Tensor, draw: Any) -> None:
    num_rows, num_columns = weight.shape
    assert matrix.shape == weight.shape
    assert torch.equal(matrix.read(), weight)
    first, left = draw(st.integers(0, num_rows)), draw(st.integers(0, num_columns))
    height, width = draw(st.integers(0, num_rows - first)), draw(st.integers(1, num_columns - left + 1)) - 1
    part = matrix.narrow(0, first, height).narrow(1, left, width)
    assert part.shape == (height, width)
    assert torch.equal(part.read(), weight[first : first + height, left : left + width])


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_part_of_a_matrix_in_awq_is_read_as_the_layout_says(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from((32, 64, -1)))
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    packed = awq(weight, group)
    assert_every_part_is_read(joined("awq", packed, group_size=group), packed.weight, data.draw)


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_part_of_a_matrix_in_gptq_is_read_as_the_layout_says(data: st.DataObject) -> None:
    bits, group = data.draw(st.sampled_from((2, 3, 4, 8))), data.draw(st.sampled_from((32, 64, -1)))
    sym, desc_act = data.draw(st.booleans()), data.draw(st.booleans())
    version = data.draw(st.sampled_from(("gptq", "gptq_v2")))
    writer = data.draw(st.sampled_from(("auto_gptq", "gptqmodel")))
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if writer == "gptqmodel" and not sym:
        weight[::3] = weight[::3].abs()  # The zero points of these rows are 0.
    fields = {"bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act}
    packed = gptq(weight, **fields, version=version, writer=writer)
    meta = {"quantizer": [f"{writer}:7.7.0"]}
    matrix = joined("gptq", packed, **fields, checkpoint_format=version, meta=meta)
    assert matrix.form.act_order == (desc_act and group != -1)
    assert matrix.form.has_zeros != sym
    assert_every_part_is_read(matrix, packed.weight, data.draw)


def test_the_largest_zero_point_that_is_stored_stands_for_the_next_number() -> None:
    packed = gptq(torch.randn(8, 32), sym=False)
    packed.tensors["qzeros"].fill_(-1)  # 15 everywhere.
    codes = joined("gptq", packed, bits=4, group_size=32, sym=False, checkpoint_format="gptq").codes()
    assert codes.zeros is not None
    assert (codes.zeros == 16).all()


def write(
    folder: Path, family: str, quantise: Quantise, config: Mapping[str, Any], **overrides: Any
) -> tuple[Path, Path]:
    """Writes a tiny model; returns its quantised copy and its copy with the dequantised matrices."""
    plain = tiny_checkpoint(folder / "model", family, **overrides)
    return quantise_folder(plain, folder, quantise, config, transposed=family == "gpt2")


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq_gives_the_probabilities_of_its_dequantised_model(tmp_path: Path, group: int) -> None:
    # Qwen2 has biases, which stay plain.
    sizes = {"hidden_size": 128, "intermediate_size": 128} if group == 128 else WIDE
    config = settings("awq", group_size=group)
    assert_same(*write(tmp_path, "qwen2", lambda name, weight: awq(weight, group), config, **sizes))


GPTQ = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3, "sym": False},
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8, "sym": False, "group_size": 64},
    "act-order": {"desc_act": True},
    "act-order, zero points": {"desc_act": True, "sym": False, "bits": 8},
    "one group": {"group_size": -1, "desc_act": True},
}


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", GPTQ)
def test_gptq_gives_the_probabilities_of_its_dequantised_model(tmp_path: Path, kind: str, version: str) -> None:
    config = settings("gptq", **GPTQ[kind], checkpoint_format=version)
    quantise = lambda name, weight: gptq(weight, **GPTQ[kind], version=version, seed=len(name))  # noqa: E731
    assert_same(*write(tmp_path, "llama", quantise, config, **WIDE))


@pytest.mark.parametrize(
    ("file", "method", "config"),
    [
        ("quantize_config.json", "gptq", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("quantize_config.json", "awq", {"bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}),
        ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_settings_may_be_in_a_file_of_their_own(tmp_path: Path, file: str, method: str, config: dict[str, Any]) -> None:
    plain = tiny_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    pack = awq if method == "awq" else gptq
    quantised, same = quantise_folder(plain, tmp_path, lambda name, weight: pack(weight), config, file=file)
    assert load_hf_config(quantised).quantization_config == {"quant_method": method, **config}
    # AutoGPTQ had a name of its own for the weights too.
    (quantised / "model.safetensors").rename(quantised / "gptq_model-4bit-32g.safetensors")
    assert_same(quantised, same)
    overrides = {"quantization_config": settings("gptq", bits=3)}  # They replace those of the file.
    assert load_hf_config(quantised, overrides).quantization_config["bits"] == 3


WEIGHT = torch.linspace(-1.0, 1.0, 32 * 64).view(32, 64)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("awq", {"bits": 3}, r"quantization_config\.bits' is 3; it can be 4"),
        ("awq", {"version": "gemv"}, r"quantization_config\.version' is 'gemv'; it can be gemm"),
        ("awq", {"version": None, "format": "gemv_fast"}, r"\.format' is 'gemv_fast'"),
        ("awq", {"backend": "llm-awq"}, r"\.backend' is 'llm-awq'"),
        ("awq", {"zero_point": False}, r"\.zero_point' is False; it can be true"),
        (
            "awq",
            {"dynamic": {"+:.*q_proj": {"group_size": 64}}},
            r"\.dynamic' is .*; it can be patterns that begin with",
        ),
        ("awq", {"group_size": 0}, r"\.group_size' is 0; it can be -1 or a positive integer"),
        ("gptq", {"bits": 5}, r"\.bits' is 5; it can be 2 or 3 or 4 or 8"),
        ("gptq", {"bits": 4.0}, r"\.bits' is 4\.0; it can be 2 or 3 or 4 or 8"),
        ("gptq", {"group_size": "128"}, r"\.group_size' is '128'"),
        ("gptq", {"checkpoint_format": "marlin"}, r"\.checkpoint_format' is 'marlin'; it can be gptq or gptq_v2"),
        ("gptq", {"pack_dtype": "int16"}, r"\.pack_dtype' is 'int16'; it can be int32"),
        ("gptq", {"adapter": {"rank": 8}}, r"\.adapter' is {'rank': 8}; it can be absent or null"),
        ("gptq", {"rotation": "hadamard"}, r"\.rotation' is 'hadamard'"),
        ("gptq", {"is_marlin_format": True}, r"\.is_marlin_format' is True"),
        ("gptq", {"sym": "yes"}, r"\.sym' is 'yes'; it can be true or false"),
        ("gptq", {"dynamic": {"+:.*q_proj": {"bits": 7}}}, r"\.bits' is 7"),
        ("gptq", {"dynamic": {"+:(": {}}}, r"\.dynamic' is '\+:\('; it can be a regular expression"),
        ("gptq", {"dynamic": [8]}, r"\.dynamic' is \[8\]"),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(
    method: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_format(settings(method, **fields))


@pytest.mark.parametrize(
    ("method", "fields", "changes", "message"),
    [
        ("awq", {}, {"qzeros": None}, "x has qweight, scales and lacks qzeros; fetch all files"),
        ("awq", {}, {"scales": None}, "x has qweight, qzeros and lacks scales"),
        ("awq", {"group_size": 48}, {}, "group_size=48 in quantization_config does not divide the 64 columns of x"),
        (
            "awq",
            {"group_size": 64},
            {},
            r"x\.qzeros has shape \[2, 4\] .* group_size=64 .* \[1, 4\]",
        ),
        ("awq", {}, {"scales": torch.ones(2, 31)}, r"x\.scales has shape \[2, 31\] .* asks for \[2, 32\]"),
        ("awq", {}, {"scales": torch.full((2, 32), torch.inf)}, "the scales of x hold NaN or infinite numbers"),
        ("awq", {}, {"qweight": torch.ones(64, 4)}, r"x\.qweight is of torch.float32, and its format has torch.int32"),
        ("awq", {}, {"qweight": torch.ones(2, 64, 4).int()}, r"x\.qweight has shape \[2, 64, 4\], .* two dimensions"),
        ("gptq", {}, {"qzeros": None}, "x has g_idx, qweight, scales and lacks qzeros"),
        ("gptq", {}, {"qweight": None}, "x has g_idx, qzeros, scales and lacks qweight"),
        ("gptq", {"group_size": 48}, {}, "group_size=48 in quantization_config does not divide the 64 columns of x"),
        ("gptq", {"bits": 8}, {}, r"x\.qzeros has shape \[2, 4\] .* bits=8, group_size=32 .* asks for \[1, 8\]"),
        ("gptq", {}, {"g_idx": torch.arange(64) // 16}, r"x\.g_idx does not put 32 columns into each of 2 groups"),
        ("gptq", {}, {"g_idx": torch.arange(64) // 32 - 1}, r"x\.g_idx does not put 32 columns into each of 2 groups"),
        ("gptq", {}, {"g_idx": torch.zeros(63)}, r"x\.g_idx has shape \[63\]"),
        ("gptq", {"desc_act": True}, {"g_idx": None}, "x lacks g_idx, and quantization_config says desc_act=true"),
        (
            "gptq",
            {"checkpoint_format": "gptq_v2"},
            {},
            r"x\.qzeros has zero points other than 8, .* sym=true",
        ),
    ],
)
def test_damaged_matrices_are_refused_by_name(
    method: str, fields: dict[str, Any], changes: dict[str, Tensor | None], message: str
) -> None:
    packed = awq(WEIGHT) if method == "awq" else gptq(WEIGHT)
    tensors = {leaf: tensor for leaf, tensor in {**packed.tensors, **changes}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        joined(method, Packed(tensors, WEIGHT), **fields).read()


def test_columns_in_order_are_not_act_order_and_columns_out_of_order_are(tmp_path: Path) -> None:
    assert not joined("gptq", gptq(WEIGHT), desc_act=True).form.act_order
    packed = gptq(WEIGHT, desc_act=True)
    matrix = joined("gptq", packed, desc_act=False)  # The tensors decide.
    assert matrix.form.act_order and torch.equal(matrix.read(), packed.weight)


FUSED = {
    "phi3": ("awq", {}),  # qkv_proj and gate_up_proj are one matrix each.
    "phi3 act-order": ("gptq", {"desc_act": True}),
    "gpt-neox": ("gptq", {"desc_act": True}),  # The rows of query_key_value interleave by head.
    "gpt2": ("gptq", {"bits": 8}),  # Plain checkpoints have the transposed matrices, and quantised ones have not.
    "bloom": ("gptq", {}),
    "deepseek-v3": ("awq", {}),
    "mixtral": ("awq", {"modules_to_not_convert": ["gate"]}),
    "qwen3-moe": ("gptq", {"desc_act": True, "sym": False}),
    "granite-moe": ("gptq", {}),
    "gemma3": ("awq", {}),
    "bamba": ("gptq", {}),
    "qwen3-next": ("gptq", {}),
}


@pytest.mark.parametrize("case", FUSED)
def test_matrices_of_other_families(tmp_path: Path, case: str) -> None:
    family, (method, fields) = case.split(maxsplit=1)[0], FUSED[case]
    overrides = {"intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    overrides |= {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    pack = lambda name, weight: awq(weight) if method == "awq" else gptq(weight, **fields, seed=len(name))  # noqa: E731
    assert_same(*write(tmp_path, family, pack, settings(method, **fields), **overrides))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_modules_of_transformers_take_quantised_matrices_too(tmp_path: Path, method: str) -> None:
    pack = (lambda name, weight: awq(weight)) if method == "awq" else (lambda name, weight: gptq(weight, desc_act=True))
    assert_same(*write(tmp_path, "qwen2", pack, settings(method), **WIDE), model_impl="transformers")


def test_parts_of_a_fused_layer_may_differ_and_the_head_may_be_quantised(tmp_path: Path) -> None:
    dynamic = {
        "-:.*k_proj": {},
        r"+:model\.layers\.1\..*(q|down)_proj": {"bits": 8, "desc_act": True},
        r".*\.(q|up)_proj": {"bits": 3, "group_size": 64, "sym": False},  # Layer 1's q_proj has matched already.
        r"self_attn": {"bits": 2},  # Matches no name from its start.
    }

    def quantise(name: str, weight: Tensor) -> Packed | None:
        if "k_proj" in name:
            return None
        if name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            return gptq(weight, bits=8, desc_act=True)
        other = {"bits": 3, "group_size": 64, "sym": False} if name.endswith(("q_proj", "up_proj")) else {}
        return gptq(weight, **other)

    plain = tiny_checkpoint(tmp_path / "model", "llama", **WIDE)
    config = settings("gptq", dynamic=dynamic, lm_head=True)
    quantised, same = quantise_folder(plain, tmp_path, quantise, config, head=True)
    assert_same(quantised, same)
    model = load(quantised)
    assert {name for name, _ in model.layers[1].attention.qkv.named_children()} == {"query", "key", "value"}
    assert isinstance(model.layers[0].mlp.gate_up, SplitLinear) and isinstance(model.lm_head, GroupLinear)
    assert isinstance(model.layers[1].mlp.down, GroupLinear)
    assert isinstance(model.layers[0].attention.qkv.query, GroupLinear)  # 3 bits are a part of 4.


def test_biases_of_zeros_that_a_model_has_not_are_skipped_and_other_biases_are_refused(tmp_path: Path) -> None:
    quantised, same = write(tmp_path, "llama", lambda name, weight: gptq(weight), settings("gptq"))
    tensors = load_file(quantised / "model.safetensors")
    bias = torch.zeros(64)
    save_file({**tensors, "model.layers.1.self_attn.q_proj.bias": bias}, quantised / "model.safetensors")
    assert_same(quantised, same)
    bias[3] = 1e-3
    save_file({**tensors, "model.layers.1.self_attn.q_proj.bias": bias}, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.1\.self_attn\.q_proj\.bias"):
        load(quantised)


@dataclass
class Watched:
    """A stored tensor that notes how many numbers are read of it."""

    numbers: Tensor
    read_counts: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    def narrow(self, dim: int, start: int, length: int) -> Watched:
        return Watched(self.numbers.narrow(dim, start, length), self.read_counts)

    def read(self) -> Tensor:
        self.read_counts.append(self.numbers.numel())
        return self.numbers


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_rank_reads_its_half_of_the_words(method: str, dim: int) -> None:
    packed = awq(WEIGHT) if method == "awq" else gptq(WEIGHT.repeat(2, 1))
    counts: list[int] = []
    watched = {leaf: Watched(tensor, counts) for leaf, tensor in packed.tensors.items()}
    matrix = joined(method, Packed(watched, packed.weight))
    half = matrix.shape[dim] // 2
    assert not counts and torch.equal(matrix.narrow(dim, half, half).read(), packed.weight.narrow(dim, half, half))
    in_rows = {"g_idx": 0 if dim else packed.weight.shape[1] // 2}  # All rows have the same groups.
    assert sum(counts) == sum(tensor.numel() // 2 + in_rows.get(leaf, 0) for leaf, tensor in packed.tensors.items())


@pytest.mark.parametrize("desc_act", [False, True])
def test_matrices_of_files_that_are_not_mapped_are_read_alike(tmp_path: Path, desc_act: bool) -> None:
    packed = gptq(WEIGHT, bits=3, desc_act=desc_act)
    save_file({leaf: tensor.contiguous() for leaf, tensor in packed.tensors.items()}, tmp_path / "x.safetensors")
    tensors = dict(iter_remote_tensors([Location.at(tmp_path / "x.safetensors")]))
    matrix = joined("gptq", Packed(tensors, WEIGHT), bits=3, desc_act=desc_act)
    assert matrix.form.act_order == desc_act
    assert torch.equal(matrix.narrow(0, 5, 20).narrow(1, 9, 30).read(), packed.weight[5:25, 9:39])
    if desc_act:
        with pytest.raises(CheckpointError, match=r"g_idx has columns out of order, .* desc_act=false"):
            joined("gptq", Packed(tensors, WEIGHT), bits=3).read()


PROMPTS = [[5 + i, 30, 31, 32, *range(40, 44 + 3 * i)] for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_two_ranks_give_what_transformers_gives_with_the_dequantised_model(tmp_path: Path, method: str) -> None:
    # A rank has half a group of AWQ's columns, and columns of all groups of GPTQ's, in layers that are divided by them.
    fields = {"group_size": 64} if method == "awq" else {"desc_act": True, "sym": False}
    pack = lambda name, weight: awq(weight, 64) if method == "awq" else gptq(weight, **fields, seed=len(name))  # noqa: E731
    quantised, plain = write(tmp_path, "qwen2", pack, settings(method, **fields), **WIDE)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    with LLM(str(quantised), dtype="float32", tensor_parallel_size=2, max_model_len=64, quantization=method) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for (ours,), theirs in zip((output.outputs for output in outputs), greedy(plain, PROMPTS, 8), strict=True):
        assert list(ours.token_ids) == theirs.token_ids
        found = torch.tensor([entry[token].logprob for entry, token in zip(ours.logprobs, ours.token_ids, strict=True)])
        wanted = theirs.logprobs[range(8), theirs.token_ids]
        torch.testing.assert_close(found, wanted, atol=BOUND, rtol=0)

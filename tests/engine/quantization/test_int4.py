"""`quantization="int4"`: which numbers it stores, and that the model computes with exactly these."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint, tiny_config
from millrace import LLM, SamplingParams
from millrace.engine.models import Decoder, ModelOptions, build_model, load_hf_config, load_model
from millrace.engine.parallel.shard import Shard
from millrace.engine.quantization.group_embedding import GroupEmbedding, TiedGroupHead
from millrace.engine.quantization.group_linear import GroupLinear
from millrace.engine.quantization.rounding import round_to_groups
from millrace.engine.quantization.scheme import LinearSpec
from millrace.engine.weights.codes import QuantForm
from paged import SCHEDULES, PagedSequences, random_sequences

INT4 = ModelOptions(quantization="int4")
TABLES = ("embed_tokens.weight", "lm_head.weight")
PLAIN_ENDS = ("norm.weight", "bias")


def load(folder: Path, options: ModelOptions, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(folder, load_hf_config(folder), dtype, "cpu", options)


@torch.inference_mode()
def log_probabilities(model: Decoder) -> torch.Tensor:
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, torch.float32).run(whole)).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_are_rounded_to_the_nearest_multiple_of_the_scale_and_all_integers_are_used(bits, dtype) -> None:
    weight, end = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)), 1 << (bits - 1)
    weight[3, 64:] = 0
    codes = round_to_groups(weight, bits, 64, dtype)
    assert torch.equal(codes.scales, codes.scales.to(dtype).float())
    assert codes.values.min() == -end and codes.values.max() == end - 1
    error = (codes.dequantise() - weight).view(50, 2, 64).abs()
    groups, step = codes.values.view(50, 2, 64), codes.scales.abs().unsqueeze(-1)
    inside = (groups > -end) & (groups < end - 1)
    assert (error[inside] <= (step / 2).expand_as(error)[inside] + 1e-6).all()
    assert (error <= step + 1e-6).all()
    assert not error[3, 1].any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_the_model_computes_with_the_numbers_that_are_stored(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    ours = log_probabilities(load(folder, INT4))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "positions" not in name:
            bits = 8 if name.endswith(TABLES) else 4
            size = 64 if tensor.shape[1] % 64 == 0 else 32
            tensors[name] = round_to_groups(tensor, bits, size).dequantise()
    full = log_probabilities(load(folder, ModelOptions()))
    save_file(tensors, folder / "model.safetensors")
    expected = log_probabilities(load(folder, ModelOptions()))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (full - expected).abs().max() > 0.05


def test_a_tied_table_is_stored_once_in_8_bits_and_the_model_takes_a_third_of_bfloat16() -> None:
    config = tiny_config("qwen3", hidden_size=256, intermediate_size=512, vocab_size=2000)
    sizes = []
    for options in (ModelOptions(), INT4):
        model = build_model(config, torch.bfloat16, "cpu", options)
        sizes.append(sum(parameter.nbytes for parameter in model.parameters()))
    assert isinstance(model.embed_tokens, GroupEmbedding) and isinstance(model.lm_head, TiedGroupHead)
    assert model.embed_tokens.table is model.lm_head.table
    assert model.embed_tokens.table.codes.nbytes == 2000 * 256
    assert sizes[1] < 0.4 * sizes[0]


def test_a_tied_head_may_also_be_in_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3")
    before, tensors = log_probabilities(load(folder, INT4)), load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(log_probabilities(load(folder, INT4)), before)


def test_ranks_look_up_their_own_tokens() -> None:
    torch.manual_seed(0)
    table, ids = torch.randn(10, 64), torch.tensor([0, 9, 4, 5, 9])

    def embedding(rows: Shard, reduce=None) -> GroupEmbedding:
        layer = LinearSpec(
            name="embed_tokens",
            in_features=Shard(64),
            blocks={"": rows},
            bias=False,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        made = GroupEmbedding(
            GroupLinear(layer, QuantForm("test", "int", 8, 32)), rows, reduce, scale=1.5, dtype=torch.float32
        )
        ((_, slot),) = made.slots()
        slot.fill(slot.cut(table))
        return made

    whole = embedding(Shard(10))
    found = whole(ids)
    torch.testing.assert_close(found, 1.5 * round_to_groups(table, 8, 32).dequantise()[ids])
    parts = [embedding(Shard(10, rank, 2), reduce=lambda rows: rows)(ids) for rank in range(2)]
    assert torch.equal(sum(parts), found)
    whole.table.pack()
    assert torch.equal(whole(ids), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_int4_and_deterministic_go_together_on_a_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(tiny_checkpoint(tmp_path, "qwen3"), ModelOptions("int4", deterministic=True), dtype)
    sequences = random_sequences()
    expected = [PagedSequences(model, [tokens], dtype).step({0: len(tokens)})[0] for tokens in sequences]
    for schedule in SCHEDULES.values():
        for ours, wanted in zip(PagedSequences(model, sequences, dtype).run(schedule()), expected, strict=True):
            assert torch.equal(ours, wanted)


def test_packing_changes_no_result() -> None:
    torch.manual_seed(0)
    layer = LinearSpec(
        name="out",
        in_features=Shard(96),
        blocks={"a": Shard(16), "b": Shard(33)},
        bias=True,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    linear = GroupLinear(layer, QuantForm("test", "int", 4, 32, has_zeros=True))
    for _, slot in linear.slots():
        slot.fill(torch.randn(slot.shape))
    before = linear(x := torch.randn(5, 96, dtype=torch.bfloat16))
    linear.pack()
    assert linear.codes is None
    torch.testing.assert_close(linear(x), before)
    assert before.shape == (5, 49) and before.dtype == torch.bfloat16
    assert torch.equal(linear.forward_float32(x).bfloat16(), linear(x))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_the_bundled_model_still_answers_98_percent_of_its_lines_exactly(root: Path, quantization: str) -> None:
    folder, count = root / "examples" / "invoices", 100
    lines = pyarrow.parquet.read_table(folder / "invoices.parquet").to_pylist()[:count]
    answers = {row.pop("id"): row for row in pyarrow.parquet.read_table(folder / "expected.parquet").to_pylist()}
    with LLM(str(folder / "model"), quantization=quantization, dtype="float32") as llm:
        chats = [[{"role": "user", "content": row["line"]}] for row in lines]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    found = [json.loads(output.outputs[0].text) for output in outputs]
    assert sum(answer == answers[row["id"]] for answer, row in zip(found, lines, strict=True)) >= 0.98 * count

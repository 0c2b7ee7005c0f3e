"""8-bit weights, floats and integers, and an 8-bit cache: what they take, and how far they move a model's outputs."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from checkpoints import tiny_checkpoint, tiny_config
from millrace.engine.errors import CheckpointError, ConfigError
from millrace.engine.kv_cache.layout import CacheShape, allocate_kv_cache, kv_block_bytes
from millrace.engine.layers import GATES, InvariantLinear, Linear, Quantized
from millrace.engine.layers import PLAIN as PLAIN_ROWS
from millrace.engine.llm import LLM
from millrace.engine.models import Decoder, ModelOptions, build_model, load_hf_config, load_model
from millrace.engine.quantization.schemes import fp8
from millrace.engine.quantization.schemes.fp8 import Fp8Linear
from millrace.engine.quantization.schemes.int8 import Int8Linear
from millrace.engine.sampling_params import SamplingParams
from millrace.kernels import quantize_fp8
from paged import SCHEDULES, PagedSequences, random_sequences, schedule_mixed

QUANTISED = [
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "opt-350m", "gpt2", "phi3", "falcon", "cohere", "olmo2"),
    *("granite", "stablelm", "mixtral", "qwen2-moe", "gpt-oss", "deepseek-v3", "bamba", "qwen3-next"),
]
"""Families whose blocks, networks or checkpoints differ in kind."""

FP8 = ModelOptions(quantization="fp8")
INT8 = ModelOptions(quantization="int8")
INT4 = ModelOptions(quantization="int4")
PLAIN = ModelOptions()
E4M3 = torch.float8_e4m3fn


def load(folder: Path, options: ModelOptions, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(folder, load_hf_config(folder), dtype, "cpu", options)


@torch.inference_mode()
def logits(model: Decoder, sequences: list[list[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the logits of all tokens, `[num_tokens, vocab_size]`."""
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, dtype).run(whole))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the error of the median token: rounding may send a few tokens to other experts."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())


@pytest.mark.parametrize("family", QUANTISED)
def test_outputs_stay_near_full_precision(tmp_path: Path, family: str) -> None:
    # Rounding to 3 bits of mantissa moves a number by 2.6 % (root mean square), so a product by 3.7 %. Two layers of
    # four products, and a softmax of random, steep scores, make about 15 % of that, and independent errors of more
    # layers add up as squares; an error of scale makes more.
    folder = tiny_checkpoint(tmp_path, family)
    plain = load(folder, PLAIN)
    full, quantised = (logits(model, random_sequences()) for model in (plain, load(folder, FP8)))
    pairs_of_layers = plain.spec.num_layers / 2
    assert 0.01 < relative_error(quantised, full) < 0.2 * pairs_of_layers**0.5
    assert 1 - F.cosine_similarity(quantised, full, dim=-1).median() < 0.025 * pairs_of_layers


@pytest.mark.parametrize("family", QUANTISED)
def test_integers_stay_nearer(tmp_path: Path, family: str) -> None:
    # With max|row| = 3 standard deviations the steps are 3 / 127 wide: rounding moves a number by 0.7 % of the typical
    # one, so a product by 1 %.
    folder = tiny_checkpoint(tmp_path, family)
    models = [load(folder, options) for options in (PLAIN, INT8)]
    full, quantised = (logits(model, random_sequences()) for model in models)
    most = 0.07 if models[0].spec.state is None else 0.09  # The rate of decay of a state is an exponent.
    assert 0.001 < relative_error(quantised, full) < most
    assert (quantised.log_softmax(-1) - full.log_softmax(-1)).abs().mean() < 0.2  # of a spread of 5


@pytest.mark.parametrize(
    ("options", "max_divergence", "min_cosine", "min_same"),
    [(FP8, 0.02, 0.995, 0.94), (INT8, 0.005, 0.995, 0.95), (INT4, 0.05, 0.98, 0.9)],
    ids=["fp8", "int8", "int4"],
)
def test_a_trained_model_gives_the_same_tokens(
    root: Path, options: ModelOptions, max_divergence: float, min_cosine: float, min_same: float
) -> None:
    folder = root / "examples" / "invoices" / "model"
    lines = pyarrow.parquet.read_table(root / "examples" / "invoices" / "invoices.parquet")["line"][:12].to_pylist()
    sequences = AutoTokenizer.from_pretrained(folder)(lines)["input_ids"]
    full, quantised = (logits(load(folder, each), sequences) for each in (PLAIN, options))
    assert len(full) > 300
    assert F.cosine_similarity(quantised, full, dim=-1).min() > min_cosine
    divergence = F.kl_div(quantised.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="batchmean")
    assert 0 < divergence < max_divergence
    assert (quantised.argmax(-1) == full.argmax(-1)).float().mean() > min_same


@pytest.mark.parametrize("options", [FP8, INT8], ids=["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_may_be_of_16_bits(tmp_path: Path, dtype: torch.dtype, options: ModelOptions) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2")
    single = logits(load(folder, options), random_sequences())
    half = logits(load(folder, options, dtype), random_sequences(), dtype)
    assert 0 < relative_error(half, single) < 0.15


@pytest.mark.parametrize(("options", "dtype"), [(FP8, E4M3), (INT8, torch.int8)], ids=["fp8", "int8"])
def test_matrices_of_the_layers_take_half_the_memory_from_the_start(options: ModelOptions, dtype: torch.dtype) -> None:
    config = tiny_config("llama", hidden_size=256, intermediate_size=512)
    full, quantised = (build_model(config, torch.bfloat16, "cpu", each) for each in (PLAIN, options))

    def num_bytes(model: Decoder) -> int:
        linears = [module for module in model.layers.modules() if isinstance(module, Linear)]
        return sum(tensor.nbytes for module in linears for tensor in (*module.parameters(), *module.buffers()))

    assert num_bytes(quantised) < 0.51 * num_bytes(full)  # a scale per row
    matrices = [parameter for parameter in quantised.layers.parameters() if parameter.dim() == 2]
    assert matrices and all(parameter.dtype == dtype for parameter in matrices)
    assert quantised.lm_head.weight.dtype == quantised.embed_tokens.weight.dtype == torch.bfloat16


def test_each_row_has_its_own_scale_and_fused_parts_their_order(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    mlp, tensors = load(folder, FP8).layers[0].mlp, load_file(folder / "model.safetensors")
    rows = torch.cat([tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    torch.testing.assert_close(mlp.gate_up.weight_scale, rows.abs().amax(1, keepdim=True) / 448)
    error = (mlp.gate_up.weight.float() * mlp.gate_up.weight_scale - rows).abs()
    smallest = mlp.gate_up.weight_scale * 2.0**-9  # the spacing of the smallest numbers
    assert (error <= torch.maximum(rows.abs() / 16, smallest / 2) * 1.001).all()
    assert not mlp.gate_up.weight.float().isnan().any()


def test_integers_have_a_scale_for_each_row_and_keep_the_order_of_fused_parts() -> None:
    config = tiny_config("llama")
    model = build_model(config, torch.bfloat16, "cpu", INT8)
    slots, linear = dict(model.layers[0].mlp.gate_up.slots()), model.layers[0].mlp.gate_up
    gate, up = (torch.randn(slots[f"{name}.weight"].shape) for name in ("gate", "up"))
    slots["up.weight"].fill(up)
    slots["gate.weight"].fill(gate)
    rows = torch.cat([gate, up])
    torch.testing.assert_close(linear.weight_scale, rows.abs().amax(1) / 127)
    scale = linear.weight_scale[:, None]
    assert ((linear.weight * scale - rows).abs() <= scale * 0.5001).all()
    assert slots["up.weight"].holds(up) and not slots["up.weight"].holds(gate)


def test_packed_integers_take_half_the_memory_of_bfloat16() -> None:
    linear = Int8Linear(512, 128, bias=False, dtype=torch.bfloat16, device=torch.device("cpu"))
    for _, slot in linear.slots():
        slot.fill(torch.randn(slot.shape))
    linear.pack()
    assert linear.weight is None
    assert linear._packed.packed.nbytes + linear.weight_scale.nbytes < 0.52 * 512 * 128 * 2


def test_a_tensor_that_is_there_twice_must_be_the_same(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[f"model.{name}"].clone()}, folder / "model.safetensors")
    load(folder, FP8)
    save_file({**tensors, name: tensors[f"model.{name}"] * 2}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight differs"):
        load(folder, FP8)


def test_sizes_that_a_gpu_cannot_multiply_stay_in_full_precision(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(tiny_config("llama", intermediate_size=100), torch.float32, "cpu", FP8)
    layer = model.layers[0]
    assert type(layer.mlp.down) is Linear and type(layer.mlp.gate_up) is Linear
    assert type(layer.attention.qkv) is Fp8Linear
    assert "layers.0.mlp.down and 3 more stay in full precision" in caplog.text
    caplog.clear()
    build_model(tiny_config("llama"), torch.float32, "cpu", FP8)
    assert not caplog.text


def test_integers_take_inputs_in_units_of_4(caplog: pytest.LogCaptureFixture) -> None:
    odd = tiny_config("llama", intermediate_size=102)
    layer = build_model(odd, torch.float32, "cpu", ModelOptions("int8", deterministic=True)).layers[0]
    assert type(layer.mlp.down) is InvariantLinear and type(layer.mlp.gate_up) is Int8Linear
    message = "layers.0.mlp.down and 1 more stay in full precision: quantization='int8' takes inputs in multiples of 4"
    assert message in caplog.text


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_packing_changes_no_result_of_8_bits(kind: type[Linear]) -> None:
    linear = kind(32, {"a": 16, "b": 32}, bias=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    for _, slot in linear.slots():
        slot.fill(torch.randn(slot.shape))
    before = linear(x := torch.randn(5, 32, dtype=torch.bfloat16))
    linear.pack()
    assert torch.equal(linear(x), before)
    assert before.shape == (5, 48) and before.dtype == torch.bfloat16
    assert torch.equal(linear.forward_float32(x).bfloat16(), before)


@pytest.mark.parametrize("family", QUANTISED)
def test_rows_that_norms_and_gates_quantise_give_the_bits_of_rows_that_the_layers_quantise(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sequences = tiny_checkpoint(tmp_path, family), random_sequences()
    fused = logits(load(folder, FP8, torch.bfloat16), sequences, torch.bfloat16)
    monkeypatch.setattr(Fp8Linear, "input_format", PLAIN_ROWS)
    assert torch.equal(fused, logits(load(folder, FP8, torch.bfloat16), sequences, torch.bfloat16))


@pytest.mark.parametrize(("family", "num_separate"), [("llama", 1), ("qwen3", 1), ("gemma2", 1), ("opt", 4)])
def test_only_rows_without_a_kernel_that_quantises_them_take_a_kernel_of_their_own(
    tmp_path: Path, family: str, num_separate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The output of attention is always one of them. OPT has LayerNorms and no gates, so all of its rows are.
    model = load(tiny_checkpoint(tmp_path, family), FP8)
    calls: list[Tensor] = []
    monkeypatch.setattr(fp8, "quantize_fp8", lambda x, scale=None: calls.append(x) or quantize_fp8(x, scale))
    logits(model, [[5, 6, 7]])
    assert len(calls) == num_separate * model.spec.num_layers


def test_rows_for_a_layer_in_full_precision_stay_plain() -> None:
    model = build_model(tiny_config("llama", intermediate_size=100), torch.bfloat16, "cpu", FP8)
    layer, x = model.layers[0], torch.randn(3, model.spec.hidden_size, dtype=torch.bfloat16)
    assert isinstance(layer.attention_norm(x)[0], Quantized)
    for norm in (layer.mlp_norm, model.norm):
        assert norm(x)[0].dtype == torch.bfloat16
    assert layer.mlp.gate(x).dtype == torch.bfloat16


def test_every_gate_has_a_kernel_to_8_bits() -> None:
    assert fp8.FP8_ROWS.gates.keys() == GATES.keys()
    x = torch.randn(3, 64)
    for name, gate in fp8.FP8_ROWS.gates.items():
        for ours, theirs in zip(gate(x), quantize_fp8(GATES[name](x)), strict=True):
            assert torch.equal(ours.float(), theirs.float())


def test_fp8_and_deterministic_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"quantization='fp8' and deterministic=True"):
        ModelOptions(quantization="fp8", deterministic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_int8_and_deterministic_go_together(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(tiny_checkpoint(tmp_path, "llama"), ModelOptions("int8", deterministic=True), dtype)
    sequences = random_sequences()
    expected = [PagedSequences(model, [tokens], dtype).step({0: len(tokens)})[0] for tokens in sequences]
    for schedule in SCHEDULES.values():
        for ours, wanted in zip(PagedSequences(model, sequences, dtype).run(schedule()), expected, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_an_engine_of_integers_scores_as_one_of_full_precision(tmp_path: Path, enforce_eager: bool) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3")
    prompts = [list(range(5, 30)), [7, 8, 9], list(range(100, 140))]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    scores = []
    for quantization in (None, "int8"):
        with LLM(
            str(folder), quantization=quantization, dtype="bfloat16", enforce_eager=enforce_eager, max_num_seqs=4
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        first = [output.outputs[0].logprobs[0] for output in outputs]
        scores.append(torch.tensor([max(entry.logprob for entry in position.values()) for position in first]))
        assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
    torch.testing.assert_close(scores[0], scores[1], atol=0.25, rtol=0)


def test_an_8_bit_cache_takes_half_the_bytes_and_starts_as_zeros() -> None:
    shape = CacheShape(num_pairs=2, num_heads=4, head_dim=64)
    half, whole = (kv_block_bytes(shape, 16, dtype) for dtype in (E4M3, torch.bfloat16))
    assert 2 * half == whole
    cache = allocate_kv_cache(shape, 3, 16, dtype=E4M3, device=torch.device("cpu"))
    assert len(cache) == 2
    for side in (side for layer in cache for side in layer):
        assert side.shape == (3, 4, 16, 64) and side.dtype == E4M3
        assert not side.view(torch.uint8).any()


@torch.inference_mode()
def test_an_8_bit_cache_keeps_the_model_near(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    model = load(folder, PLAIN)
    full, quantised = (
        torch.cat(PagedSequences(model, random_sequences(), dtype).run(schedule_mixed()))
        for dtype in (torch.float32, E4M3)
    )
    # Keys and values are off by 2.6 %, and nothing else is.
    assert 0.001 < relative_error(quantised, full) < 0.15

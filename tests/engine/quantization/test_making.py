"""`quantize_model`: what it writes has compressed-tensors' format, is rounded well, and is whole or not there.

Some tests read the folders back with transformers and the package compressed-tensors, which are the reference.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import CORPUS, tiny_checkpoint
from millrace.engine import quantize_model
from millrace.engine.device import Device
from millrace.engine.errors import ConfigError
from millrace.engine.loading.stored_forms import read_stored_forms
from millrace.engine.models import ModelOptions, load_hf_config, load_model
from millrace.engine.models.registry import weight_map
from millrace.engine.quantization.making import output
from millrace.engine.quantization.making.gptq import relative_product_error, round_for_inputs
from millrace.engine.quantization.making.grid import Grid, round_to_grid
from millrace.engine.quantization.making.layout import pack_words
from millrace.engine.storage import Location
from millrace.engine.weights.packed_bits import unpack_bits
from paged import PagedSequences, random_sequences

E4M3 = torch.float8_e4m3fn


def quantize(folder: Path, **options):
    """Quantises a folder into one beside it, and returns that one with the report."""
    out = folder.parent / "quantised"
    return out, quantize_model(str(folder), out, shows_progress=False, **options)


def dequantised(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a folder by the published layout; quantised matrices become plain ones, in float32."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {name: tensor for name, tensor in tensors.items() if ".weight_" not in name}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module, scales = name.removesuffix(".weight_scale"), tensors[name].float()
        if f"{module}.weight_packed" in tensors:
            rows, columns = tensors[f"{module}.weight_shape"].tolist()
            words = tensors[f"{module}.weight_packed"]
            bits = 32 * words.shape[1] // columns
            codes = unpack_bits(words, bits)[:, :columns].float()
            zeros = torch.full_like(scales, 1 << (bits - 1))
            if f"{module}.weight_zero_point" in tensors:
                zeros = unpack_bits(tensors[f"{module}.weight_zero_point"].t(), bits).t()[:rows].float()
        else:
            codes, zeros = tensors[f"{module}.weight"].float(), torch.zeros_like(scales)
        groups = codes.unflatten(1, (scales.shape[1], -1))
        found[f"{module}.weight"] = ((groups - zeros[..., None]) * scales[..., None]).flatten(1)
    return found


def unquantised(folder: Path) -> Path:
    """Returns a folder with the numbers of a quantised one, as a plain checkpoint in float32."""
    plain = Path(shutil.copytree(folder, folder.parent / f"{folder.name}-plain"))
    save_file(dequantised(folder), plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    return plain


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Returns the logits of transformers, in which inputs of layers stay plain."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    model(ids)  # compressed-tensors unpacks in the first pass.
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    return model(ids).logits


WRITTEN = pytest.mark.parametrize(
    ("family", "scheme", "options"),
    [
        ("llama", "w4a16", {}),
        ("llama", "w8a16", {"head_bits": 8}),
        ("qwen2", "w8a8", {}),  # has biases
        ("qwen3", "fp8", {}),  # has a tied head
        ("gemma2", "w4a16", {"head_bits": 4}),  # gets a head of its own
        ("phi3", "w4a16", {}),  # has fused matrices
        ("mixtral", "fp8", {}),
        ("qwen2-moe", "w8a16", {"head_bits": 4}),  # has experts of other bits than the head
    ],
)


@WRITTEN
def test_transformers_reads_back_what_was_written(tmp_path: Path, family: str, scheme: str, options: dict) -> None:
    pytest.importorskip("compressed_tensors")
    folder = tiny_checkpoint(tmp_path / "model", family)
    out, report = quantize(folder, scheme=scheme, **options)
    assert report.num_layers > 7 and not report.declined
    plain = unquantised(out)
    found, expected = logits(out), logits(plain)
    assert torch.equal(found, expected) or (found - expected).abs().max() < 1e-5
    assert not torch.equal(expected, logits(folder))


@torch.inference_mode()
def log_probs(folder: Path) -> Tensor:
    """Returns the log-probabilities of this engine's model, `[num_tokens, vocab_size]`."""
    config, place = load_hf_config(folder), Location.at(str(folder))
    stored = read_stored_forms(place, weight_map(place, config, torch.float32), config, None, Device.choose("cpu"))
    model = load_model(place, config, torch.float32, "cpu", ModelOptions(stored=stored))
    sequences = random_sequences()
    whole = iter([{index: len(tokens) for index, tokens in enumerate(sequences)}])
    return torch.cat(PagedSequences(model, sequences, torch.float32).run(whole)).log_softmax(-1)


@WRITTEN
def test_this_engine_reads_back_what_was_written(tmp_path: Path, family: str, scheme: str, options: dict) -> None:
    out, _ = quantize(tiny_checkpoint(tmp_path / "model", family), scheme=scheme, **options)
    found, expected = log_probs(out), log_probs(unquantised(out))
    if scheme == "w8a8":  # The inputs of layers may be rounded too, by about 1 % of a typical number.
        assert (found - expected).abs().mean() < 0.2
    else:  # Floats of 8 bits are dequantised on a CPU.
        assert (found - expected).abs().max() < 1e-3


def test_the_library_unpacks_zero_points_as_they_were_meant(tmp_path: Path) -> None:
    # transformers 5.23 cannot load such a folder: the library makes parameters of the unpacked shape for it.
    library = pytest.importorskip("compressed_tensors")
    out, _ = quantize(tiny_checkpoint(tmp_path / "model", "llama"), scheme="w4a16", symmetric=False)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    scheme = library.quantization.QuantizationScheme(**config["quantization_config"]["config_groups"]["group_0"])
    module = "model.layers.0.mlp.down_proj."
    stored = {name.removeprefix(module): tensor for name, tensor in tensors.items() if name.startswith(module)}
    compressor = library.compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(theirs, dequantised(out)[f"{module}weight"])


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"scheme": "w4a16"}, 0.12),
        ({"scheme": "w4a16", "symmetric": False}, 0.10),
        ({"scheme": "w8a16"}, 0.01),
        ({"scheme": "w8a8"}, 0.01),
        ({"scheme": "fp8"}, 0.03),
    ],
)
def test_weights_stay_near_those_of_the_model(tiny_model, tmp_path: Path, options: dict, most: float) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))
    out, report = quantize(folder, **options)
    before, after = load_file(folder / "model.safetensors"), dequantised(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("_proj.weight"):
            error = float((after[name] - tensor).norm() / tensor.norm())
            assert 0 < error < most
            assert report.errors[name.removesuffix(".weight")] == pytest.approx(error, rel=1e-4)
        else:
            assert torch.equal(after[name], tensor)


def test_the_search_of_scales_beats_scales_by_the_largest_weight() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rounded = round_to_grid(weight, Grid(4, 128)).dequantise()
    groups = weight.unflatten(1, (-1, 128))
    scales = groups.abs().amax(2, keepdim=True) / 7
    largest = ((groups / scales).round().clamp(-8, 7) * scales).flatten(1)
    assert (rounded - weight).norm() < 0.95 * (largest - weight).norm()


def test_zeros_and_huge_weights_stay_finite() -> None:
    weight = torch.zeros(2, 64, dtype=torch.float16)
    weight[1, 0] = 60000.0
    for grid in (Grid(4, 32), Grid(4, 32, symmetric=False), Grid(8), Grid(8, is_float=True)):
        found = round_to_grid(weight, grid).dequantise()
        assert found.isfinite().all()
        assert not found[0].any()
        assert found[1, 0] == pytest.approx(60000, rel=0.05)


@pytest.mark.parametrize(("bits", "columns"), [(4, 64), (4, 35), (8, 33)])
def test_packed_codes_are_read_back(bits: int, columns: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (3, columns), dtype=torch.int8)
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-columns * bits // 32))
    assert torch.equal(unpack_bits(words, bits)[:, :columns].int() - half, codes.int())


def test_groups_are_the_largest_that_divide_all_layers_and_odd_layers_are_named(tmp_path: Path, caplog) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama", intermediate_size=80)
    out, report = quantize(folder, scheme="w4a16")
    assert report.group_size == 64
    ((reason, names),) = report.declined.items()
    assert reason == "have widths that 64 does not divide"
    assert names == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert names[0] in caplog.text
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {*names, "lm_head", "model.embed_tokens"} == set(config["ignore"])


def test_routers_stay_plain_and_experts_do_not(tiny_model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen2-moe"), tmp_path / "model"))
    out, _ = quantize(folder, scheme="fp8")
    tensors = load_file(out / "model.safetensors")
    assert {name for name, tensor in tensors.items() if name.endswith("proj.weight") and tensor.dtype != E4M3} == set()
    routers = [name for name in tensors if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]
    assert routers and all(tensors[name].dtype == torch.float32 for name in routers)


def test_stacked_experts_are_named_and_stay_plain(tiny_model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("granite-moe"), tmp_path / "model"))
    out, report = quantize(folder, scheme="w8a8")
    (names,) = (names for reason, names in report.declined.items() if reason == "are experts in one stacked tensor")
    assert names
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in names)


def test_a_large_model_has_several_files_and_an_index(tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(output, "FILE_BYTES", 100_000)
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    out, report = quantize(folder, scheme="w8a16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 1
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == report.bytes_after < 0.6 * report.bytes_before
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "quantization_report.json").read_text())["bytes_after"] == report.bytes_after


def test_a_run_that_fails_leaves_nothing(tiny_model, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    monkeypatch.setattr(output.CheckpointOutput, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(folder, scheme="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_files_is_not_touched(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        quantize_model(str(tiny_model("llama")), tmp_path / "out", scheme="fp8", shows_progress=False)


def test_an_empty_folder_is_replaced_behind_a_link_but_not_where_the_process_is(
    tiny_model, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    quantize_model(str(tiny_model("llama")), tmp_path / "link", scheme="fp8", shows_progress=False)
    assert (tmp_path / "empty" / "model.safetensors").exists() and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is in use and cannot be replaced"):
        quantize_model(str(tiny_model("llama")), ".", scheme="fp8", shows_progress=False)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"scheme": "w3a16"}, "scheme must be one of w4a16, w8a16, w8a8, fp8; got 'w3a16'"),
        ("llama", {"scheme": "w4a16", "group_size": 48}, "must be one of 128, 64, 32; got 48"),
        ("llama", {"scheme": "fp8", "group_size": 128}, "must be left out"),
        ("llama", {"scheme": "w8a8", "symmetric": False}, "has no zero points"),
        ("llama", {"scheme": "w4a16", "head_bits": 3}, "head_bits must be one of 4, 8, or left out; got 3"),
        ("llama", {"scheme": "fp8", "quantization": "int8"}, "quantization is a setting of an engine that generates"),
        ("gpt2", {"scheme": "w4a16"}, "no layer of this model can be quantised: 8 are stored transposed"),
    ],
)
def test_what_cannot_be_done_is_refused(tiny_model, tmp_path: Path, family: str, options: dict, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        quantize_model(str(tiny_model(family)), tmp_path / "out", shows_progress=False, **options)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_not_quantised_again(tiny_model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    out, _ = quantize(folder, scheme="fp8")
    with pytest.raises(ConfigError, match="is quantised already"):
        quantize_model(str(out), tmp_path / "again", scheme="fp8", shows_progress=False)


def perplexity(folder: Path, rows: list[str]) -> float:
    """Returns the perplexity of rows by transformers; quantised matrices are read as plain ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = unquantised(folder)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([tokenizer(row).input_ids])
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


ROWS = [text[i:] + text for i in range(3) for text in CORPUS]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"scheme": "w4a16"}),
        ("gemma2", {"scheme": "w4a16", "symmetric": False, "head_bits": 8}),  # has windows and a tied head
        ("qwen2-moe", {"scheme": "w8a16"}),
        ("bamba", {"scheme": "w4a16"}),  # keeps states
    ],
)
def test_the_perplexities_are_those_of_transformers(tmp_path: Path, family: str, options: dict) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family)
    out, report = quantize(folder, rows=ROWS, **options)
    held_out = ROWS[::5]
    assert report.method == "gptq"
    assert report.perplexity_before == pytest.approx(perplexity(folder, held_out), rel=1e-3)
    assert report.perplexity_after == pytest.approx(perplexity(out, held_out), rel=1e-3)
    assert report.perplexity_after != pytest.approx(report.perplexity_before, rel=1e-4)


def test_weights_are_rounded_for_the_inputs_that_a_layer_gets() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 24, generator=draw) @ torch.randn(24, 256, generator=draw)
    inputs += 0.3 * torch.randn(500, 256, generator=draw)
    inputs[:, 7] = 0.0  # a column that no row uses
    weight, hessian = torch.randn(48, 256, generator=draw), inputs.t() @ inputs
    for grid in (Grid(4, 64), Grid(4, 64, symmetric=False), Grid(8)):
        nearest, fitted = round_to_grid(weight, grid), round_for_inputs(weight, grid, hessian)
        errors = [((each.dequantise() - weight) @ inputs.t()).norm() for each in (nearest, fitted)]
        assert errors[1] < 0.6 * errors[0]
        share = relative_product_error(weight, fitted, hessian)
        assert share == pytest.approx(float(errors[1] / (weight @ inputs.t()).norm()), rel=1e-3)


def test_conversations_are_rows_too(tiny_model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in CORPUS]
    _, report = quantize(folder, scheme="fp8", rows=rows)
    assert report.method == "nearest", "8-bit floats are rounded to the nearest"
    assert report.num_calibration_tokens and report.num_evaluation_tokens and report.perplexity_after


@pytest.mark.parametrize("rows", [["only one row"], ["a", ""]])
def test_too_few_rows_are_refused(tiny_model, tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(ConfigError, match="calibration needs two rows"):
        quantize_model(str(tiny_model("llama")), tmp_path / "out", scheme="fp8", rows=rows, shows_progress=False)

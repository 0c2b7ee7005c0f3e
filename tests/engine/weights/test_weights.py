"""Checkpoints whole and damaged: every format loads the same, and every fault is named."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import FAMILIES, tiny_checkpoint, tiny_config
from filling import load_weights
from millrace.engine.errors import CheckpointError
from millrace.engine.layers import Linear, WeightSlot
from millrace.engine.models import Decoder, ModelOptions, build_model, find_family, load_hf_config, load_model
from millrace.engine.parallel.shard import Shard
from millrace.engine.quantization.schemes.fp8 import Fp8Linear
from millrace.engine.weights import checkpoint
from millrace.engine.weights.checkpoint import (
    WeightMap,
    checkpoint_files,
    iter_tensors,
    load_dummy_weights,
)
from millrace.engine.weights.mapped_pages import MappedPages
from millrace.engine.weights.model_slots import weight_slots
from millrace.engine.weights.tensor_layout import TensorLayout
from millrace.engine.weights.tensor_view import TensorItem

Edit = Callable[[dict[str, torch.Tensor]], Any]


def load(folder: Path, **overrides: Any) -> Decoder:
    """Loads without packing, so that the parameters can be looked at."""
    config = load_hf_config(folder, overrides)
    model = build_model(config, torch.float32, "cpu")
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    load_weights(model, folder, find_family(config).weight_map(model.spec))
    return model


def edit(folder: Path, change: Edit) -> Path:
    """Rewrites `model.safetensors` after a change of its tensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return folder


def assert_same_parameters(first: Decoder, second: Decoder) -> None:
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_filled(tmp_path: Path, family: str) -> None:
    model = load(tiny_checkpoint(tmp_path, family))
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_fused_parameters_hold_their_parts_in_order(folder: Path) -> None:
    model, tensors = load(folder), load_file(folder / "model.safetensors")
    attention, mlp = model.layers[0].attention, model.layers[0].mlp
    parts = [tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(attention.qkv.weight, torch.cat(parts))
    parts = [tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(mlp.gate_up.weight, torch.cat(parts))


def stack_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Joins the matrices of a layer's experts, as transformers has them in memory and some checkpoints on disk."""
    for layer in range(2):
        experts, stacked = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = (torch.stack([tensors.pop(f"{experts}.{i}.w{n}.weight") for i in range(5)]) for n in (1, 2, 3))
        tensors |= {f"{stacked}.gate_up_proj": torch.cat((w1, w3), 1), f"{stacked}.down_proj": w2}


def test_stacked_experts_load_as_single_ones(tmp_path: Path) -> None:
    single = load(tiny_checkpoint(tmp_path / "single", "mixtral"))
    stacked = load(edit(tiny_checkpoint(tmp_path / "stacked", "mixtral"), stack_experts))
    assert_same_parameters(stacked, single)


def test_missing_misshapen_and_further_experts_are_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mixtral")
    single, whole = load_file(folder / "model.safetensors"), "model.layers.1.block_sparse_moe.experts"
    edit(folder, lambda tensors: [tensors.pop(f"{whole}.3.w1.weight"), tensors.update(extra=torch.zeros(1))])
    with pytest.raises(
        CheckpointError, match=r"missing layers\.1\.block_sparse_moe\.experts\.3\.w1\.weight; unexpected ex"
    ):
        load(folder)
    save_file({**single, f"{whole}.3.w2.weight": torch.zeros(64, 41)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2\.weight has shape \[64, 41\].* asks for \[64, 40\]"):
        load(folder)


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ({"num_local_experts": 4}, r"\[4, 64, 40\]"),
        ({"num_local_experts": 6}, r"\[6, 64, 40\]"),
        ({"intermediate_size": 39}, r"\[5, 64, 39\]"),
    ],
)
def test_stacked_experts_that_do_not_fit_are_named_with_both_shapes(
    tmp_path: Path, overrides: dict[str, Any], asked: str
) -> None:
    folder = edit(tiny_checkpoint(tmp_path, "mixtral"), stack_experts)
    message = r"experts\.down_proj has shape \[5, 64, 40\].* asks for "
    with pytest.raises(CheckpointError, match=message + asked):
        load(folder, **overrides)


@pytest.mark.parametrize(
    ("family", "name", "other"),
    [
        ("glm4-moe", "layers.2.eh_proj", "layers.3.eh_proj"),
        ("deepseek-v3", "layers.2.eh_proj", "layers.3.eh_proj"),
        ("ernie4_5-moe", "mtp_block.0.norm", "block.0.norm"),
    ],
)
def test_layers_that_predict_further_tokens_are_not_loaded(
    tmp_path: Path, family: str, name: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    edit(folder, lambda tensors: tensors.update({f"model.{name}.weight": torch.zeros(64, 128)}))
    with caplog.at_level("INFO", "millrace"):
        load(folder)
    assert "1 tensors of layers that predict further tokens are not loaded" in caplog.text
    edit(folder, lambda tensors: tensors.update({f"model.{other}.weight": torch.zeros(64, 128)}))
    with pytest.raises(CheckpointError, match=rf"unexpected model\.{other}\.weight"):
        load(folder)


def test_a_layer_too_many_is_no_layer_that_predicts_further_tokens(tmp_path: Path) -> None:
    extra = {"model.layers.2.input_layernorm.weight": torch.ones(64)}
    folder = edit(tiny_checkpoint(tmp_path, "deepseek-v3"), lambda tensors: tensors.update(extra))
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.2\.input_layernorm\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("falcon", "transformer.h.1.ln_attn.weight"),
        ("vaultgemma", "model.layers.1.pre_feedforward_layernorm.weight"),
        ("deepseek-v2", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_a_missing_tensor_is_named_as_its_checkpoint_names_such_tensors(tmp_path: Path, family: str, name: str) -> None:
    folder = edit(tiny_checkpoint(tmp_path, family), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"missing {name.partition('.')[2]}; unexpected none"):
        load(folder)


def test_an_item_of_a_tensor_behind_a_url_reads_no_other_item() -> None:
    reads = []

    class Unread(SimpleNamespace):
        def narrow(self, dim: int, start: int, length: int) -> Any:
            return Unread(whole=self.whole.narrow(dim, start, length), shape=None, dtype=None)

        def read(self) -> torch.Tensor:
            reads.append(tuple(self.whole.shape))
            return self.whole.clone()

    tensor = torch.arange(4 * 6 * 10).view(4, 6, 10)
    item = TensorItem(Unread(whole=tensor, shape=tensor.shape, dtype=tensor.dtype), 2)
    assert item.shape == (6, 10)
    assert torch.equal(item.narrow(0, 1, 3).narrow(1, 2, 5).read(), tensor[2, 1:4, 2:7])
    assert reads == [(1, 3, 5)]


@pytest.mark.parametrize("family", ["qwen3", "opt-350m", "gpt2"])
@pytest.mark.parametrize(("weights", "shards"), [("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_formats_load_the_same(tmp_path: Path, family: str, weights: str, shards: int) -> None:
    plain = load(tiny_checkpoint(tmp_path / "plain", family))
    folder = tiny_checkpoint(tmp_path / "other", family, weights=weights, shards=shards)
    assert len(checkpoint_files(folder)) == shards
    assert_same_parameters(plain, load(folder))


def test_a_pickle_from_before_zip_archives_loads(folder: Path) -> None:
    plain = load(folder)
    tensors = dict(iter_tensors(folder))
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert_same_parameters(plain, load(folder))


def test_safetensors_are_preferred_to_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert [path.name for path in checkpoint_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "prefix", "other"),
    [
        ("llama", "model.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("opt", "model.decoder.", ""),
        ("gpt2", "transformer.", ""),
        ("gpt-neox", "lm_head.", "embed_out."),
    ],
)
def test_prefixes_may_differ(tmp_path: Path, family: str, prefix: str, other: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    plain = load(folder)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[other + name.removeprefix(prefix)] = tensors.pop(name)

    assert_same_parameters(plain, load(edit(folder, rename)))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt2", "h.0.attn.masked_bias"),
        ("gpt-neox", "gpt_neox.layers.0.attention.bias"),
    ],
)
def test_computed_buffers_of_old_checkpoints_are_ignored(tmp_path: Path, family: str, name: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    plain = load(folder)
    assert_same_parameters(plain, load(edit(folder, lambda tensors: tensors.update({name: torch.ones(8)}))))


def test_weights_are_cast_to_the_models_dtype(folder: Path) -> None:
    model = load_model(folder, load_hf_config(folder), torch.bfloat16, "cpu")
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(model.embed_tokens.weight, expected)


def test_missing_weights_are_listed(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing layers\.0\.self_attn\.k_proj\.weight; unexpected none"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.9.mlp.up_proj.weight", "router"]
)
def test_unexpected_weights_are_listed(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=f"missing none; unexpected {name}"):
        load(folder)


def test_a_long_list_is_cut(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"extra.{i:02d}": torch.ones(1) for i in range(40)}))
    with pytest.raises(CheckpointError, match=r"extra\.11 and 28 more"):
        load(folder)


def test_a_wrong_shape_says_both(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(96, 63)}))
    with pytest.raises(
        CheckpointError, match=r"mlp\.up_proj\.weight has shape \[96, 63\].*asks for \[96, 64\]; check that"
    ):
        load(folder)


def test_integers_are_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is of torch\.int8.* takes floating-point numbers"):
        load(folder)


class Cut(torch.nn.Module):
    """A layer of a class that the loader does not know; `cut` makes its slots of its parameter `weight`, `[6, 4]`."""

    def __init__(self, cut: Callable[[torch.Tensor], dict[str, WeightSlot]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((6, 4), torch.nan), requires_grad=False)
        self.register_buffer("computed", torch.ones(3), persistent=False)
        self._cut = cut

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        yield from self._cut(self.weight).items()


class Packed(torch.nn.Module):
    """A layer whose checkpoint has integers, under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = torch.nn.Parameter(torch.full((6, 4), -1, dtype=torch.int32), requires_grad=False)
        self.register_buffer("scales", torch.full((4,), torch.nan))

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        yield "qweight", WeightSlot((self.qweight,), dtypes=(torch.int32, torch.uint8))
        yield "scales", WeightSlot((self.scales,))


def rows(**blocks: tuple[int, int]) -> Callable[[torch.Tensor], dict[str, WeightSlot]]:
    return lambda weight: {name: WeightSlot((weight[first:last],)) for name, (first, last) in blocks.items()}


def columns(**blocks: tuple[int, int]) -> Callable[[torch.Tensor], dict[str, WeightSlot]]:
    return lambda weight: {name: WeightSlot((weight[:, first:last],)) for name, (first, last) in blocks.items()}


class TestModulesOfAnyClass:
    MAP = WeightMap((), {"theirs": "0"})

    def load(self, folder: Path, module: torch.nn.Module, **tensors: torch.Tensor) -> None:
        save_file({f"theirs.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        load_weights(torch.nn.Sequential(module), folder, self.MAP)

    @pytest.mark.parametrize(("cut", "dim"), [(rows(a=(0, 2), b=(2, 6)), 0), (columns(b=(1, 4), a=(0, 1)), 1)])
    def test_their_slots_are_filled(self, tmp_path: Path, cut: Any, dim: int) -> None:
        whole = torch.randn(6, 4)
        a, b = whole.split([2, 4] if dim == 0 else [1, 3], dim)
        self.load(tmp_path, module := Cut(cut), a=a.contiguous(), b=b.contiguous())
        assert torch.equal(module.weight, whole)

    @pytest.mark.parametrize(
        "cut",
        [
            rows(),
            rows(a=(0, 3)),
            rows(a=(0, 3), b=(0, 3)),
            rows(a=(0, 3), b=(2, 5)),
            columns(a=(0, 2), b=(1, 3)),
            columns(a=(0, 3), b=(1, 4)),
            lambda weight: {"a": WeightSlot((torch.empty(6, 4),))},
        ],
        ids=["none", "a part", "a part twice", "an overlap", "columns", "columns that overlap", "other memory"],
    )
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_memory_that_no_slot_fills_is_refused(self, cut: Any, device: str) -> None:
        model = torch.nn.Sequential(Cut(cut)).to(device)
        with pytest.raises(CheckpointError, match=r"0\.weight, of shape \[6, 4\], would not be filled.* slots of Cut"):
            weight_slots(model)

    def test_padding_needs_no_slot(self, tmp_path: Path) -> None:
        module = Cut(lambda weight: {"a": WeightSlot((weight[:5],), padding=(weight[5:].fill_(0),))})
        self.load(tmp_path, module, a=torch.ones(5, 4))
        assert torch.equal(module.weight.sum(1), torch.tensor([4.0] * 5 + [0]))

    def test_parameters_in_one_memory_are_filled_each_by_its_own_slot(self) -> None:
        both = torch.empty(8, 4)
        module = Cut(lambda weight: {"a": WeightSlot((both[:6],)), "b": WeightSlot((both[6:],))})
        module.weight, module.other = torch.nn.Parameter(both[:6]), torch.nn.Parameter(both[6:])
        assert sorted(weight_slots(torch.nn.Sequential(module))) == ["0.a", "0.b"]

    def test_a_persistent_buffer_needs_a_slot(self) -> None:
        module = Cut(rows(a=(0, 6)))
        module.register_buffer("scale", torch.empty(6))
        with pytest.raises(CheckpointError, match=r"0\.scale, of shape \[6\], would not be filled"):
            weight_slots(torch.nn.Sequential(module))

    def test_a_layer_without_slots_is_filled_whole(self, tmp_path: Path) -> None:
        module = torch.nn.BatchNorm1d(4).requires_grad_(False)
        state = {name: torch.full_like(tensor, 3) for name, tensor in module.state_dict().items()}
        self.load(tmp_path, module, **state)
        assert all(bool((tensor == 3).all()) for tensor in module.state_dict().values())

    def test_integers_are_for_slots_that_take_them(self, tmp_path: Path) -> None:
        numbers = torch.arange(24, dtype=torch.int32).reshape(6, 4)
        self.load(tmp_path, module := Packed(), qweight=numbers, scales=torch.ones(4, dtype=torch.float16))
        assert torch.equal(module.qweight, numbers) and torch.equal(module.scales, torch.ones(4))
        for wrong in (torch.int64, torch.float32):
            with pytest.raises(CheckpointError, match=rf"qweight is of {wrong}.* takes torch.int32 or torch.uint8"):
                self.load(tmp_path, Packed(), qweight=numbers.to(wrong), scales=torch.ones(4))
        with pytest.raises(CheckpointError, match=r"scales is of torch\.int32.* takes floating-point numbers"):
            self.load(tmp_path, Packed(), qweight=numbers, scales=torch.ones(4, dtype=torch.int32))


class TestTiedHead:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tiny_checkpoint(tmp_path / "tied", "qwen3", num_hidden_layers=1)

    def test_it_shares_the_embedding(self, folder: Path) -> None:
        model = load(folder)
        assert model.lm_head.weight is model.embed_tokens.weight

    def test_an_equal_copy_may_be_there(self, folder: Path) -> None:
        plain = load(folder)
        edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
        assert_same_parameters(plain, load(folder))

    def test_the_head_alone_is_enough(self, folder: Path) -> None:
        plain = load(folder)
        edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
        assert_same_parameters(plain, load(folder))

    def test_a_head_of_its_own_is_refused_until_untied(self, folder: Path) -> None:
        edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
        with pytest.raises(CheckpointError, match="tie_word_embeddings"):
            load(folder)
        model = load(folder, tie_word_embeddings=False)
        assert torch.equal(model.lm_head.weight, model.embed_tokens.weight * 2)


def test_a_folder_without_weights_says_what_it_holds(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors.*consolidated\.safetensors"):
        load(folder)


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint_files(tmp_path / "nowhere")


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, index: str) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json (is not an index|cannot be read|must hold)"):
        load(folder)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, weights: str, keep: float) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", weights=weights)
    path = checkpoint_files(folder)[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"{path.name} is truncated"):
        load(folder)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_git_lfs_pointer_is_recognised(tmp_path: Path, weights: str) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", weights=weights)
    checkpoint_files(folder)[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load(folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", weights="bin")
    trace = tmp_path / "trace"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    torch.save({"model.norm.weight": Touch()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not just tensors"):
        load(folder)
    assert not trace.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", weights="bin")
    torch.save({"state_dict": {}, "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a mapping of names to tensors"):
        load(folder)


def test_the_first_fault_is_the_one_reported(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("embed_tokens", "norm", "layers.0.mlp.down_proj"):
            tensors[f"model.{name}.weight"] = torch.ones(3, 3)

    edit(folder, damage)
    for _ in range(5):
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight has shape \[3, 3\]"):
            load(folder)


class TestDummyWeights:
    DUMMY = ModelOptions(load_format="dummy")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder with a config and nothing else."""
        tiny_config("qwen3").save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("options", [DUMMY, ModelOptions(quantization="fp8", load_format="dummy")])
    def test_they_fill_everything_without_a_checkpoint(self, folder: Path, options: ModelOptions) -> None:
        config = load_hf_config(folder)
        model = build_model(config, torch.bfloat16, "cpu", options)
        for tensor in (*model.parameters(), *(m.weight_scale for m in model.modules() if isinstance(m, Fp8Linear))):
            tensor.fill_(torch.nan)
        load_dummy_weights(model)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".kv_scales." not in name:  # optional
                assert tensor.float().isfinite().all() and tensor.float().std() > 0, name
        assert all((layer.attention.kv_scales.table == 1).all() for layer in model.layers)
        assert 0.019 < float(model.embed_tokens.weight.float().std()) < 0.021
        assert model.lm_head.weight is model.embed_tokens.weight

    def test_they_are_the_same_every_time(self, folder: Path) -> None:
        config = load_hf_config(folder)
        first, second = (load_model(folder, config, torch.float32, "cpu", self.DUMMY) for _ in range(2))
        assert_same_parameters(first, second)

    def test_a_folder_without_weights_needs_the_option(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no weights"):
            load_model(folder, load_hf_config(folder), torch.float32, "cpu")


class TestFusedTensors:
    """A checkpoint's tensor of 4 heads with 2 KV heads, cut into our query, key and value."""

    SIZES: ClassVar = {"query": 4 * 3, "key": 2 * 3, "value": 2 * 3}

    def load(
        self, folder: Path, layout: TensorLayout, rank: int, tensors: dict[str, torch.Tensor], weights: str
    ) -> Linear:
        """Returns the layer of a rank of two, or the whole layer for rank -1, from the tensors of a module `theirs`."""
        tensors = {f"theirs.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        if weights == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")
        place = {"index": max(rank, 0), "count": 1 if rank < 0 else 2}
        parts = {name: Shard(size, **place) for name, size in self.SIZES.items()}
        layer = Linear(5, parts, bias=True, dtype=torch.float32, device=torch.device("cpu"))
        names = WeightMap((), {"theirs": "qkv"}, layouts={"theirs": layout})
        load_weights(torch.nn.ModuleDict({"qkv": layer}), folder, names)
        return layer

    def expected(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        parts = whole.split(list(self.SIZES.values()))
        return whole if rank < 0 else torch.cat([part.chunk(2)[rank] for part in parts])

    @pytest.mark.parametrize("weights", ["safetensors", "bin"])
    @pytest.mark.parametrize("rank", [-1, 0, 1])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_parts_that_follow_each_other(self, tmp_path: Path, transposed: bool, rank: int, weights: str) -> None:
        matrix, bias = torch.randn(24, 5), torch.randn(24)
        layout = TensorLayout(("query", "key", "value"), transposed=transposed)
        tensors = {"weight": matrix.T if transposed else matrix, "bias": bias}
        layer = self.load(tmp_path, layout, rank, tensors, weights)
        assert torch.equal(layer.weight, self.expected(matrix, rank))
        assert torch.equal(layer.bias, self.expected(bias, rank))

    @pytest.mark.parametrize("rank", [-1, 0, 1])
    def test_parts_that_follow_each_other_in_every_group(self, tmp_path: Path, rank: int) -> None:
        matrix, bias = torch.randn(24, 5), torch.randn(24)
        order = [*range(6), 12, 13, 14, 18, 19, 20, *range(6, 12), 15, 16, 17, 21, 22, 23]  # by KV head
        tensors = {"weight": matrix[order], "bias": bias[order]}
        layer = self.load(tmp_path, TensorLayout(("query", "key", "value"), num_groups=2), rank, tensors, "safetensors")
        assert torch.equal(layer.weight, self.expected(matrix, rank))
        assert torch.equal(layer.bias, self.expected(bias, rank))

    def test_a_wrong_shape_is_named_as_it_is_stored_and_a_missing_tensor_once(self, tmp_path: Path) -> None:
        layout = TensorLayout(("query", "key", "value"), transposed=True)
        tensors = {"weight": torch.randn(5, 23), "bias": torch.randn(24)}
        with pytest.raises(CheckpointError, match=r"theirs\.weight has shape \[5, 23\].* asks for \[5, 24\]"):
            self.load(tmp_path, layout, -1, tensors, "safetensors")
        with pytest.raises(CheckpointError, match=r"missing theirs\.weight; unexpected none"):
            self.load(tmp_path, layout, -1, {"bias": tensors["bias"]}, "safetensors")

    def test_all_experts_in_one_tensor(self) -> None:
        gate, up = torch.randn(2, 3, 7, 5)
        stored = torch.stack((gate, up), 2).flatten(1, 2).mT  # [experts, in_features, gate and up in turns]
        layout = TensorLayout(("gate", "up"), num_groups=7, transposed=True, dim=1)
        assert layout.names("layers.0.experts.weight") == ["layers.0.experts.gate.weight", "layers.0.experts.up.weight"]
        cut = layout.cut("theirs", stored, [gate.shape, up.shape])
        assert torch.equal(cut[0].read(), gate)
        assert torch.equal(cut[1].narrow(0, 1, 2).narrow(1, 2, 5).narrow(2, 1, 3).read(), up[1:3, 2:7, 1:4])
        biases = layout.cut("theirs", torch.stack((gate, up), 2).flatten(1, 2)[..., 0], [gate.shape[:2], up.shape[:2]])
        assert torch.equal(biases[1].read(), up[..., 0])


def test_a_weight_map_goes_both_ways() -> None:
    weights = WeightMap(("outer.", "out"), {"layers.*.a": "blocks.*.b", "head": "top"}, ignored=("layers.*.mask",))
    assert weights.ours("outer.layers.11.a.weight") == "blocks.11.b.weight"
    assert weights.ours("layers.0.a.bias") == "blocks.0.b.bias"
    assert weights.ours("head.weight") == "top.weight"
    assert weights.ours("outer.layers.3.mask.bias") is None
    assert weights.theirs("blocks.11.b.weight") == "layers.11.a.weight"
    layouts = {"layers.*.a": TensorLayout(("up", "gate"))}
    fused = WeightMap((), weights.modules, ignored=("layers.*.a.mask",), layouts=layouts)
    assert fused.all_ours("layers.2.a.weight") == ["blocks.2.b.up.weight", "blocks.2.b.gate.weight"]
    assert fused.all_ours("layers.2.a.mask") == []
    assert fused.theirs("blocks.2.b.gate.bias") == "layers.2.a.bias"
    with pytest.raises(KeyError):
        weights.ours("layers.0.c.weight")


def test_threads_that_fill_weights_have_the_gpu_of_their_rank(monkeypatch, tmp_path):
    """Triton launches kernels on the current GPU of a thread, which is GPU 0 in a new one."""
    devices = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda index: devices.update({threading.current_thread().name: index})
    )
    filled = []
    monkeypatch.setattr(checkpoint, "_fill", lambda *given: filled.append(threading.current_thread().name))
    slots = {name: SimpleNamespace(key=(index, 0)) for index, name in enumerate("ab")}
    checkpoint.fill_slots(slots, {"a": [], "b": []})
    assert len(filled) == 2 and {devices[name] for name in filled} == {3}


def test_pages_of_a_file_are_released_and_read_again_and_other_memory_is_kept(tmp_path: Path) -> None:
    numbers = torch.arange(1 << 20)
    save_file({"a": numbers}, tmp_path / "model.safetensors")
    ((_, mapped),) = checkpoint.iter_safetensors(tmp_path / "model.safetensors")

    def resident_kib() -> int:
        start, size, is_ours = mapped.data_ptr(), 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            span = line.split()[0]
            if "-" in span:
                first, last = (int(address, 16) for address in span.split("-"))
                is_ours = first <= start < last
            elif is_ours and span == "Rss:":
                size += int(line.split()[1])
        return size

    assert torch.equal(mapped, numbers)
    before = resident_kib()
    MappedPages().release(mapped)
    assert resident_kib() < before / 10
    MappedPages().release(numbers)
    assert torch.equal(mapped, numbers) and int(numbers.sum()) == sum(range(1 << 20))

"""Layers of quantised checkpoints: which layer a stored form gets, and how mixed fused layers fall apart."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from millrace.engine.device import Device
from millrace.engine.errors import ConfigError, UnsupportedModelError
from millrace.engine.layers import Linear
from millrace.engine.parallel.shard import Shard
from millrace.engine.quantization.group_linear import GroupLinear
from millrace.engine.quantization.registry import find_format, format_names
from millrace.engine.quantization.scheme import LinearSpec
from millrace.engine.quantization.split_linear import SplitLinear
from millrace.engine.quantization.stored import StoredForms, StoredScheme
from millrace.engine.weights.codes import Codes, QuantForm

CPU = Device.choose("cpu")
GPU = replace(CPU, torch_device=torch.device("cuda", 0))
GROUPS = QuantForm("awq", "int", 4, 32, has_zeros=True)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def scheme(forms: dict[str, QuantForm], device: Device = CPU, *, deterministic: bool = False) -> StoredScheme:
    checkpoint_format = find_format(AWQ)
    assert checkpoint_format is not None
    return StoredScheme(StoredForms(device, checkpoint_format, forms), deterministic=deterministic)


WHOLE = Shard(64)


def spec(name: str, columns: Shard = WHOLE, **blocks: int) -> LinearSpec:
    rows = {block: Shard(size) for block, size in (blocks or {"": 8}).items()}
    device = torch.device("cpu")
    return LinearSpec(name=name, in_features=columns, blocks=rows, bias=True, dtype=torch.float32, device=device)


def test_parts_that_are_stored_alike_stay_one_layer() -> None:
    layer = scheme({"mlp.gate_up.gate": GROUPS, "mlp.gate_up.up": GROUPS}).make_linear(
        spec("mlp.gate_up", gate=8, up=8)
    )
    assert type(layer) is GroupLinear


@pytest.mark.parametrize("other", [None, replace(GROUPS, bits=8), replace(GROUPS, group_size=64)], ids=str)
def test_parts_that_are_stored_differently_become_layers_of_their_own(other: QuantForm | None) -> None:
    forms = {"mlp.gate_up.gate": GROUPS} | ({"mlp.gate_up.up": other} if other else {})
    layer = scheme(forms).make_linear(spec("mlp.gate_up", gate=8, up=16))
    assert isinstance(layer, SplitLinear)
    assert type(layer.gate) is GroupLinear
    assert type(layer.up) is (GroupLinear if other else Linear)
    for part in (layer.gate, layer.up):
        for _, slot in part.slots():
            slot.fill(torch.randn(slot.shape))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), torch.cat([layer.gate(x), layer.up(x)], dim=1))
    assert layer(x).shape == (3, 24)


def test_a_layer_that_the_checkpoint_leaves_plain_is_not_quantised() -> None:
    assert not scheme({}).applies_to(spec("lm_head"))
    assert scheme({"lm_head": GROUPS}).applies_to(spec("lm_head"))


@pytest.mark.parametrize(
    ("form", "columns", "device", "deterministic", "reason"),
    [
        (replace(GROUPS, bits=3), WHOLE, CPU, False, "there is no kernel for 3 bits"),
        (GROUPS, Shard(96, 1, 2), CPU, False, "the 48 columns of a rank are no multiple of the groups of 32"),
        (replace(GROUPS, act_order=True), Shard(128, 0, 2), CPU, False, "with desc_act the columns of a rank"),
        (GROUPS, WHOLE, GPU, True, "deterministic=True forbids it"),
        (replace(GROUPS, group_size=8), WHOLE, CPU, False, "groups of 8 columns are no multiple of 16"),
        (replace(GROUPS, kind="table"), WHOLE, CPU, False, "the memory of full precision$"),
    ],
    ids=["bits", "groups", "act-order", "deterministic", "small", "table"],
)
def test_a_form_that_no_scheme_takes_is_dequantised_with_a_word(form, columns, device, deterministic, reason) -> None:
    made = scheme({"out": form, "other": form}, device, deterministic=deterministic)
    for name in ("out", "other"):
        assert isinstance(made.make_linear(spec(name, columns)), Linear)
    (note,) = made.notes()
    assert note.startswith("out and 1 more are dequantised at load")
    assert re.search(reason, note), note


@pytest.mark.parametrize("zeros", [None, torch.full((8, 2), 3, dtype=torch.uint8)], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_group_linear_multiplies_by_the_dequantised_matrix(zeros: torch.Tensor | None, ordered: bool) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    groups = None if ordered else torch.randperm(64) // 32
    codes = Codes(values if zeros is not None else values.char() - 8, torch.rand(8, 2), zeros, groups)
    form = QuantForm("test", "int", 4, 32, has_zeros=zeros is not None, act_order=not ordered)
    layer = GroupLinear(spec("out"), form)
    slots = dict(layer.slots())
    slots["weight"].fill(codes)
    slots["bias"].fill(torch.ones(8))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ codes.dequantise().t() + 1)


@pytest.mark.parametrize("method", ["awk", None, 7])
def test_an_unknown_method_is_refused_by_name(method: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'quantization_config.quant_method' is .*implemented are awq"):
        find_format({**AWQ, "quant_method": method})


def test_a_setting_that_repeats_the_checkpoint_is_fine() -> None:
    for name in (None, "awq"):
        assert type(find_format(AWQ, name)) is type(find_format({**AWQ, "quant_method": "awq_marlin"}, name))


def test_a_setting_that_contradicts_the_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization='int8' contradicts the checkpoint.*quant_method='awq'"):
        find_format(AWQ, "int8")


def test_a_format_for_a_plain_checkpoint_is_refused() -> None:
    assert find_format(None, "fp8") is None
    with pytest.raises(ConfigError, match="quantization='awq' is a format of quantised checkpoints"):
        find_format(None, "awq")
    assert "awq" in format_names()

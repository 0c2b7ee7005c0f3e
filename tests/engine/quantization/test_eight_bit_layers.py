"""Layers for stored matrices of 8 bits: which one a device gets, and that it computes what the format says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.engine.layers import LinearBase
from millrace.engine.parallel.shard import Shard
from millrace.engine.quantization.fp8_matrix import Fp8Matrix
from millrace.engine.quantization.group_fp8_linear import GroupFp8Linear
from millrace.engine.quantization.scheme import LinearSpec
from millrace.engine.quantization.schemes.fp8 import Fp8Linear, Fp8Scheme
from millrace.engine.quantization.schemes.int8 import Int8Linear, Int8Scheme
from millrace.engine.weights.codes import Codes, InputQuant, QuantForm

E4M3 = torch.float8_e4m3fn
CPU = SimpleNamespace(is_cpu=True, supports_fp8=True)
AMPERE, HOPPER = (SimpleNamespace(is_cpu=False, supports_fp8=supports) for supports in (False, True))
COLUMNS, ROWS = 300, {"gate": 200, "up": 72}
BLOCK = (128, 128)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def spec(rank: int = 0, num_ranks: int = 1, *, by_row: bool = False, **options: object) -> LinearSpec:
    """Returns a fused layer, of which a rank has some columns, or some rows of each part."""
    row_share, column_share = ((rank, num_ranks), (0, 1)) if by_row else ((0, 1), (rank, num_ranks))
    layer = LinearSpec(
        name="layers.0.mlp.gate_up",
        in_features=Shard(COLUMNS, *column_share),
        blocks={name: Shard(rows, *row_share) for name, rows in ROWS.items()},
        bias=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return replace(layer, **options)  # type: ignore[arg-type]


def fp8_matrices(inputs: InputQuant | None, block: tuple[int, int] | None) -> dict[str, Fp8Matrix]:
    """Returns a stored matrix of each part, with a scale for each block, or one for all numbers."""
    matrices = {}
    for name, rows in ROWS.items():
        grid = (-(-rows // 128), -(-COLUMNS // 128)) if block else (1,)
        stored = torch.randn(rows, COLUMNS).to(E4M3), ("weight_scale", torch.rand(grid) + 0.5)
        options = {"format_name": "fp8", "block": block, "setting": f"weight_block_size={block}", "inputs": inputs}
        matrices[name] = Fp8Matrix.join(name, *stored, **options)
    return matrices


def fill(linear: LinearBase, matrices: dict[str, Fp8Matrix], bias: Tensor) -> None:
    """Fills the weight slots of a layer with a rank's part of matrices and of the biases."""
    biases = dict(zip(ROWS, bias.split(tuple(ROWS.values())), strict=True))
    for name, slot in linear.slots():
        part, _, leaf = name.partition(".")
        slot.fill(slot.cut(matrices[part]).codes() if leaf == "weight" else slot.cut(biases[part]))
    linear.pack()


def in_groups(x: Tensor) -> Tensor:
    """Returns x as groups of 128 columns in 8 bits represent it."""
    groups = []
    for group in x.split(128, dim=1):
        scale = group.abs().amax(1, keepdim=True) / 448
        groups.append((group / scale).to(E4M3).float() * scale)
    return torch.cat(groups, dim=1)


@pytest.mark.parametrize("quantises", [False, True], ids=["plain", "quantised"])
@pytest.mark.parametrize("by_row", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_blocks_give_what_their_numbers_give_also_where_parts_and_ranks_begin_within_one(
    num_ranks: int, by_row: bool, quantises: bool
) -> None:
    matrices = fp8_matrices(InputQuant("fp8", 128) if quantises else None, BLOCK)
    form, x, bias = matrices["gate"].form, torch.randn(5, COLUMNS), torch.randn(sum(ROWS.values()))
    results = []
    for rank in range(num_ranks):
        layer = spec(rank, num_ranks, by_row=by_row)
        assert Fp8Scheme.declines(form, layer, HOPPER, deterministic=False) is None
        linear = Fp8Scheme.make_stored(layer, form)
        assert type(linear) is GroupFp8Linear and linear.weight.dtype == E4M3
        fill(linear, matrices, bias)
        columns = slice(layer.in_features.start, layer.in_features.start + layer.num_columns)
        # A group that begins on another rank is quantised by the columns of each rank alone.
        ours = F.pad(x[:, columns], (columns.start % 128, 0))
        ours = (in_groups(ours) if quantises else ours)[:, columns.start % 128 :]
        rows = [slot.cut(matrices[name.partition(".")[0]]).read() for name, slot in linear.slots() if "weight" in name]
        expected = F.linear(ours, torch.cat(rows), linear.bias)
        torch.testing.assert_close(linear(x[:, columns]), expected, rtol=1e-5, atol=1e-4)
        results.append(expected)
    if num_ranks == 2 and not by_row and not quantises:  # The ranks' sum is the whole product.
        whole = F.linear(x, torch.cat([matrix.read() for matrix in matrices.values()]), 2 * bias)
        torch.testing.assert_close(sum(results), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [288, 300], ids=["a library's product", "odd sizes"])
@pytest.mark.parametrize("scale", [None, 1 / 256], ids=["dynamic", "static"])
def test_parts_keep_their_scales_and_a_static_scale_clamps(scale: float | None, columns: int) -> None:
    inputs = InputQuant("fp8", scale=scale)
    matrices = {name: matrix.narrow(1, 0, columns) for name, matrix in fp8_matrices(inputs, None).items()}
    form, x, bias = matrices["gate"].form, torch.randn(5, columns), torch.randn(sum(ROWS.values()))
    linear = Fp8Scheme.make_stored(spec(in_features=Shard(columns)), form)
    assert type(linear) is (Fp8Linear if columns == 288 else GroupFp8Linear)
    fill(linear, matrices, bias)
    step = x.abs().amax(1, keepdim=True) / 448 if scale is None else torch.tensor(scale)
    rounded = (x / step).clamp(-448, 448).to(E4M3).float() * step
    assert scale is None or rounded.abs().max() == 448 / 256
    expected = F.linear(rounded, torch.cat([matrix.read() for matrix in matrices.values()]), bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("scale", "zero"), [(None, 0), (0.02, 0), (0.02, -128), (0.02, 7)])
def test_integers_give_what_their_numbers_give(scale: float | None, zero: int) -> None:
    form = QuantForm("compressed-tensors", "int", 8, inputs=InputQuant("int", scale=scale, zero=zero))
    layer = spec()
    assert Int8Scheme.declines(form, layer, HOPPER, deterministic=True) is None
    linear = Int8Scheme.make_stored(layer, form)
    assert type(linear) is Int8Linear
    codes = {
        name: Codes(torch.randint(-128, 128, (rows, COLUMNS), dtype=torch.int8), torch.rand(rows, 1) / 99)
        for name, rows in ROWS.items()
    }
    bias, x = torch.randn(sum(ROWS.values())), torch.randn(5, COLUMNS) * 2
    biases = dict(zip(ROWS, bias.split(tuple(ROWS.values())), strict=True))
    for name, slot in linear.slots():
        part, _, leaf = name.partition(".")
        slot.fill(codes[part] if leaf == "weight" else biases[part])
    step = x.abs().amax(1, keepdim=True) / 127 if scale is None else torch.tensor(scale)
    rounded = ((x / step + zero).round().clamp(-128, 127) - zero) * step
    expected = F.linear(rounded, torch.cat([part.dequantise() for part in codes.values()]), bias)
    before = linear(x)
    linear.pack()
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)


def test_a_device_gets_the_products_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = spec(), QuantForm("fp8", "fp8", 8)
    blocks = replace(plain, group_size=128, row_block=128, inputs=InputQuant("fp8", 128))
    for form, device, taken in (
        (blocks, HOPPER, True),
        (blocks, AMPERE, False),
        (replace(blocks, inputs=None), AMPERE, True),
        (replace(blocks, inputs=None), CPU, False),
        (replace(blocks, inputs=InputQuant("fp8")), HOPPER, False),
        (replace(plain, inputs=InputQuant("fp8", scale=0.5)), HOPPER, True),
        (replace(plain, inputs=InputQuant("int")), HOPPER, False),
    ):
        declined = Fp8Scheme.declines(form, layer, device, deterministic=False)  # type: ignore[arg-type]
        assert declined is None if taken else declined == ""
    reason = Fp8Scheme.declines(replace(plain, group_size=64), layer, HOPPER, deterministic=False)  # type: ignore[arg-type]
    assert reason == ": there is no kernel for groups of 64 columns"
    assert "deterministic" in str(Fp8Scheme.declines(plain, layer, HOPPER, deterministic=True))  # type: ignore[arg-type]

    integers = QuantForm("compressed-tensors", "int", 8, inputs=InputQuant("int"))
    static = replace(integers, inputs=InputQuant("int", scale=0.5))
    for has_vnni in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has=has_vnni: has)
        for form, device, taken in (
            (integers, CPU, has_vnni),
            (static, CPU, False),
            (static, AMPERE, True),
            (replace(integers, inputs=None), AMPERE, False),
            (replace(integers, group_size=32), AMPERE, False),
        ):
            declined = Int8Scheme.declines(form, layer, device, deterministic=True)  # type: ignore[arg-type]
            assert declined is None if taken else declined == ""

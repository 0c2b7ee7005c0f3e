"""The guarantees of the linear ops beyond agreement with their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.kernels import (
    fp8_linear,
    group_linear,
    invariant_linear,
    packed_group_embedding,
    packed_group_linear,
    quantize_fp8,
    quantize_int8,
    rms_norm_fp8,
    scaled_int8_linear,
    scaled_linear,
)
from millrace.kernels._op import Draw
from millrace.kernels.group_linear import pack_codes, unpack_codes
from millrace.kernels.packed_group_linear import can_pack_groups, pack_groups
from millrace.kernels.scaled_linear.cuda import scaled_linear_cuda

SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 33, 64, 100, 123, 192, 333, 512, 1000])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(
    num_rows: int, sizes: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    in_features, out_features = sizes
    draw = Draw.seeded(dtype, device, seed=num_rows)
    weight = draw.normal(out_features, in_features) * in_features**-0.5
    return draw.normal(num_rows, in_features), weight, draw.normal(out_features)


def test_the_definitions_are_torchs_linear_layer():
    x, weight, bias = operands(5, (32, 16), torch.float32)
    torch.testing.assert_close(invariant_linear.plain(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(invariant_linear.plain(x, weight, None), F.linear(x, weight))
    small_x, small_weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    x_scale, weight_scale = torch.rand(5, 1), torch.rand(16, 1)
    expected = F.linear(small_x.float() * x_scale, small_weight.float() * weight_scale, bias)
    actual = scaled_linear.plain(small_x, x_scale, small_weight, weight_scale, bias, torch.float32)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_lie_where_the_layout_says_and_decode_to_what_the_formula_says(bits):
    num_places, width = 16 // bits, 200
    codes = torch.randint(1 << bits, (3, width), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, -(-width // (32 * num_places)) * 16)
    assert torch.equal(unpack_codes(packed, bits, width), codes)
    for k in range(width):
        block, place, m = k // (32 * num_places), k // 32 % num_places, k % 32
        word, half = packed[:, block * 16 + m // 2], m % 2
        assert torch.equal(word >> 16 * half + bits * place & (1 << bits) - 1, codes[:, k].int())
    scales, zeros = torch.rand(3, 2), torch.randint(1 << bits, (3, 2), dtype=torch.uint8)
    matrix = torch.empty(3, width)
    for n in range(3):
        for k in range(width):
            matrix[n, k] = (float(codes[n, k]) - float(zeros[n, k // 100])) * scales[n, k // 100]
    x = torch.eye(width)
    torch.testing.assert_close(group_linear.plain(x, packed, scales, zeros, None, bits=bits), matrix.t())
    zeros.fill_(2 ** (bits - 1))
    actual = group_linear.plain(x, packed, scales, None, None, bits=bits)
    assert torch.equal(actual, group_linear.plain(x, packed, scales, zeros, None, bits=bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_rows=st.integers(1, 70), sizes=st.tuples(SIZES, SIZES))
def test_a_row_is_the_same_to_the_bit_in_any_company(dtype, data, num_rows, sizes):
    x, weight, bias = operands(num_rows, sizes, dtype)
    packs = dtype == torch.float32 and torch.backends.mkldnn.is_available()
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight) if packs else weight
    whole = invariant_linear(x, weight, bias)
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=40))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    try:
        some = invariant_linear(x[rows], data.draw(st.sampled_from([weight, packed])), bias)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(some, whole[rows])


def test_a_row_is_not_touched_by_nan_in_others():
    x, weight, bias = operands(40, (64, 48), torch.float32)
    expected = invariant_linear(x, weight, bias)[::3]
    x[1::3] = x[2::3] = torch.nan
    assert torch.equal(invariant_linear(x, weight, bias)[::3], expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 64, 96, 128, 384])
def test_packed_groups_are_those_of_the_unpacked_weight(bits, group_size):
    draw, num_rows, size = Draw.seeded(torch.float64), 37, 384
    x, scales = draw.normal(3, size), draw.normal(num_rows, size // group_size)
    weight = pack_codes(draw.integers(0, 2**bits, num_rows, size, dtype=torch.uint8), bits)
    for zeros in (draw.integers(0, 2**bits, *scales.shape, dtype=torch.uint8), None):
        packed = pack_groups(weight.clone(), scales, zeros, size, bits)
        expected = group_linear.plain(x, weight, scales, zeros, None, bits=bits)
        torch.testing.assert_close(packed_group_linear.plain(x, *packed, None, num_rows), expected)
        index = torch.tensor([36, 0, 31, 8, 36])
        rows = packed_group_embedding.plain(index, *packed, torch.float32)
        torch.testing.assert_close(x.float() @ rows.t(), expected[:, index].float(), atol=1e-3, rtol=1e-4)
    assert can_pack_groups(size, group_size)
    assert not can_pack_groups(size, 8) and not can_pack_groups(size + 32, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_a_product_with_packed_groups_is_the_same_to_the_bit_in_any_company(dtype, bits):
    draw = Draw.seeded(dtype)
    weight = pack_codes(draw.integers(0, 2**bits, 200, 256, dtype=torch.uint8), bits)
    zeros = draw.integers(0, 2**bits, 200, 4, dtype=torch.uint8)
    packed = pack_groups(weight, draw.normal(200, 4), zeros, 256, bits)
    x = draw.normal(141, 256)
    whole = packed_group_linear(x, *packed, None, 200)
    for num_rows in (1, 2, 3, 4, 5, 64, 65, 130):
        assert torch.equal(packed_group_linear(x[9 : 9 + num_rows], *packed, None, 200), whole[9 : 9 + num_rows])
    x[::2] = torch.nan
    assert torch.equal(packed_group_linear(x, *packed, None, 200)[1::2], whole[1::2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1024, 3072), (4096, 4096), (1000, 333)], ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_company_on_a_gpu(dtype, sizes):
    x, weight, bias = operands(700, sizes, dtype, "cuda")
    whole = invariant_linear(x, weight, bias)
    for rows in (slice(0, 1), slice(5, 6), slice(0, 16), slice(3, 131), slice(100, 356), slice(699, 700)):
        assert torch.equal(invariant_linear(x[rows], weight, bias), whole[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1024, 3072), (4096, 256), (1000, 333)], ids=str)
def test_integers_give_a_row_the_same_bits_in_any_company_on_a_gpu(sizes):
    x, weight, _ = operands(700, sizes, torch.float32, "cuda")
    (x, x_scale), (weight, weight_scale) = quantize_int8(x), quantize_int8(weight)
    whole = scaled_int8_linear(x, x_scale, weight, weight_scale, None, torch.bfloat16)
    for rows in (slice(0, 1), slice(5, 6), slice(0, 16), slice(3, 131), slice(100, 356), slice(699, 700)):
        some = scaled_int8_linear(x[rows], x_scale[rows], weight, weight_scale, None, torch.bfloat16)
        assert torch.equal(some, whole[rows])


def test_products_by_8_bit_weights_are_those_of_the_numbers_that_they_stand_for():
    x, weight, bias = operands(5, (300, 260), torch.float32)
    (small_x, x_scale), (small, scale) = quantize_int8(x), quantize_int8(weight)
    expected = F.linear(small_x * x_scale[:, None], small * scale[:, None], bias)
    torch.testing.assert_close(scaled_int8_linear(small_x, x_scale, small, scale, bias, torch.float32), expected)

    # Blocks of 128 x 128, of which the last ones are smaller.
    blocks, values = torch.rand(3, 3) + 0.5, weight.to(torch.float8_e4m3fn)
    block_of = [torch.arange(size) // 128 for size in weight.shape]
    wide = values.float() * blocks[block_of[0]][:, block_of[1]]
    scales = blocks[block_of[0]].t().contiguous()
    torch.testing.assert_close(fp8_linear(x, None, values, scales, bias, x.dtype), F.linear(x, wide, bias))
    small_x, x_scale = quantize_fp8(x, group_size=128)
    narrow_x = small_x.float() * x_scale[:, block_of[1]]
    product = fp8_linear(small_x, x_scale, values, scales, None, x.dtype)
    torch.testing.assert_close(product, F.linear(narrow_x, wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpus_8_bit_launcher_runs_on_cpu_tensors_too(agrees, dtype):
    # torch has the operator for both: what is checked here is how it is called.
    for index in range(len(list(scaled_linear.samples(Draw.seeded(dtype))))):
        agrees(scaled_linear, scaled_linear_cuda, index, dtype)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_gpus_8_bit_product_takes_rows_and_scales_as_a_norm_writes_them(num_rows):
    x, weight, bias = operands(num_rows, (64, 48), torch.bfloat16)
    values, scales, _ = rms_norm_fp8(x, torch.ones(64, dtype=torch.bfloat16), 1e-6)
    quantised = quantize_fp8(weight)
    with Operators() as operators:
        scaled_linear_cuda(values, scales, *quantised, bias, torch.bfloat16)
    assert operators.names == ["aten.t", "aten.t", "aten._scaled_mm"]  # two views and a product: nothing is copied


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_the_gpus_8_bit_launcher_refuses_odd_sizes():
    x, scale = quantize_fp8(torch.randn(3, 24))
    weight, weight_scale = quantize_fp8(torch.randn(32, 24))
    with pytest.raises(ValueError, match=r"\[32, 24\].*multiples of 16"):
        scaled_linear_cuda(x, scale, weight, weight_scale, None, torch.float32)


def test_quantised_products_are_near_the_full_ones():
    x, weight, bias = operands(64, (512, 256), torch.float32)
    full = F.linear(x, weight, bias)
    product = scaled_linear(*quantize_fp8(x), *quantize_fp8(weight), bias, torch.float32)
    # Two roundings to 3 bits of mantissa, each off by 2.6 % (root mean square).
    error = (product - full).norm() / (full - bias).norm()
    assert 0.03 < error < 0.045

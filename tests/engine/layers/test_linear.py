"""Linear layers whose result is float32, of which on a GPU nothing is rounded to 16 bits, or that are activated."""

from __future__ import annotations

import pytest
import torch

from millrace.engine.layers import ACTIVATIONS, InvariantLinear, Linear
from millrace.engine.layers import linear as linear_module


def make_layer(kind: type[Linear], dtype: torch.dtype, device: str, *, bias: bool) -> tuple[Linear, torch.Tensor]:
    """Returns a layer with random weights, and inputs for it."""
    generator = torch.Generator().manual_seed(0)
    layer = kind(96, 40, bias=bias, dtype=dtype, device=torch.device(device))
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return layer, torch.randn(5, 96, generator=generator).to(device, dtype)


def in_float32(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """Computes the layer in float32."""
    assert layer.weight is not None
    product = x.float() @ layer.weight.float().t()
    return product if layer.bias is None else product + layer.bias.float()


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_on_a_gpu_is_asked_for_in_float32(bias, monkeypatch):
    layer, x = make_layer(Linear, torch.bfloat16, "cpu", bias=bias)
    assert not linear_module.can_widen(x), "a CPU has no such product"
    monkeypatch.setattr(linear_module, "can_widen", lambda x: True)
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    assert torch.equal(layer.forward_float32(x), in_float32(layer, x))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Linear, InvariantLinear])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_no_sum_is_rounded_to_16_bits_on_a_gpu(kind, dtype, bias):
    layer, x = make_layer(kind, dtype, "cuda", bias=bias)
    torch.testing.assert_close(layer.forward_float32(x), in_float32(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_packed_layer_activates_its_product_and_a_deterministic_one_keeps_its_bits(name, dtype):
    for kind in (Linear, InvariantLinear):
        layer, x = make_layer(kind, dtype, "cpu", bias=True)
        expected = ACTIVATIONS[name](in_float32(layer, x))
        layer.pack()
        activated = layer.forward_activated(x, ACTIVATIONS[name])
        assert activated.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(activated.float(), expected, rtol=tolerance, atol=tolerance)
        if kind is InvariantLinear:
            assert torch.equal(activated, ACTIVATIONS[name](layer(x)))

"""The experts of gpt-oss in MXFP4 are read as transformers reads them; damaged ones are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from millrace.engine.errors import CheckpointError, UnsupportedModelError
from millrace.engine.quantization.formats.mxfp4 import Mxfp4Tensor
from millrace.engine.quantization.registry import find_format
from millrace.engine.weights.tensor_view import TensorItem

NAME = "model.layers.0.mlp.experts.down_proj"


def written(num_experts: int = 3, num_rows: int = 5, num_blocks: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_experts, num_rows, num_blocks)
    return {
        "blocks": torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
        "scales": torch.randint(90, 160, shape, generator=generator, dtype=torch.uint8),
    }


def joined(tensors: Mapping[str, Tensor], **fields: Any) -> Mxfp4Tensor:
    """Returns the tensor that the format makes of two, between which stands a bias."""
    checkpoint_format = find_format({"quant_method": "mxfp4", **fields})
    assert checkpoint_format is not None
    first, *others = ((f"{NAME}_{leaf}", tensor) for leaf, tensor in tensors.items())
    found = dict(checkpoint_format.join([first, (f"{NAME}_bias", torch.ones(3, 5)), *others]))
    assert found.keys() == {f"{NAME}_bias", f"{NAME}.weight"}
    tensor = found[f"{NAME}.weight"]
    assert isinstance(tensor, Mxfp4Tensor)
    return tensor


def test_numbers_are_those_of_transformers() -> None:
    tensors = written()
    expected = convert_moe_packed_tensors(tensors["blocks"], tensors["scales"], dtype=torch.float32).mT
    tensor = joined(tensors, modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    assert tensor.shape == expected.shape
    assert torch.equal(tensor.read().float(), expected)


def test_parts_of_an_expert_are_parts_of_the_whole() -> None:
    tensor = joined(written())
    whole = tensor.read().float()
    assert torch.equal(TensorItem(tensor, 2).narrow(0, 1, 3).narrow(1, 7, 40).read().float(), whole[2, 1:4, 7:47])
    part = TensorItem(tensor, 1).narrow(1, 32, 64)
    assert torch.equal(part.codes().dequantise(), whole[1, :, 32:96])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, rf"{NAME} has blocks and lacks scales; fetch all files"),
        ({"blocks": None}, rf"{NAME} has scales and lacks blocks"),
        (
            {"scales": torch.ones(3, 5, 1, dtype=torch.uint8)},
            r"down_proj_blocks has shape \[3, 5, 4, 16\] and .*down_proj_scales has shape \[3, 5, 1\]",
        ),
        ({"scales": torch.ones(3, 5, 4)}, r"scales is of torch.float32, and its format has torch.uint8"),
    ],
)
def test_damaged_experts_are_refused_by_name(changes: Mapping[str, Tensor | None], message: str) -> None:
    tensors = {leaf: tensor for leaf, tensor in {**written(), **changes}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        joined(tensors)


def test_settings_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.rotation' is 'hadamard'"):
        joined(written(), rotation="hadamard")

"""A convolution over the tokens of each text does not see the texts beside it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.layers import TextConv


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (3, 1), (7, 4)])
def test_each_text_is_convolved_alone(width: int, groups: int) -> None:
    conv = TextConv(8, width, groups, torch.tanh, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in conv.parameters():
        parameter.normal_()
    lengths = [0, 5, 1, 0, 12, 2, 0]
    texts = torch.randn(sum(lengths), 8).split(lengths)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    alone = functools.partial(F.conv1d, weight=conv.weight, bias=conv.bias, padding=width // 2, groups=groups)
    wanted = torch.cat([torch.tanh(alone(text.T)).T for text in texts if len(text)])
    torch.testing.assert_close(conv(torch.cat(texts), starts), wanted, rtol=1e-5, atol=1e-5)

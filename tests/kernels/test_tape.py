"""Recordings of compiled kernels: results for any number of rows, and refusal of other operations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from millrace.kernels import embedding, packed_group_linear, rms_norm, silu_and_mul
from millrace.kernels._library import find_library
from millrace.kernels._op import Draw
from millrace.kernels.group_linear import pack_codes
from millrace.kernels.packed_group_linear import PackedGroups, pack_groups
from millrace.kernels.tape import NotRecordableError, record

needs_library = pytest.mark.skipif(find_library() is None, reason="no compiled kernels here")


def weight(draw: Draw, out_features: int, in_features: int) -> PackedGroups:
    codes = pack_codes(draw.integers(0, 16, out_features, in_features, dtype=torch.uint8), 4)
    return pack_groups(codes, draw.full(1 / 32, out_features, in_features // 16), None, in_features, 4)


class Network:
    """An embedding and some feed-forward layers, at 37 rows."""

    def __init__(self, num_layers: int = 3) -> None:
        self.num_layers = num_layers
        draw = Draw.seeded(torch.bfloat16)
        self.ids = draw.integers(0, 50, 37)
        self.table, self.norm = draw.normal(50, 64), draw.normal(64)
        self.up, self.down = weight(draw, 160, 64), weight(draw, 64, 80)

    def __call__(self) -> torch.Tensor:
        hidden = embedding(self.ids, self.table)
        for _ in range(self.num_layers):
            normed, residual = rms_norm(hidden, self.norm, 1e-6, hidden)
            gated = silu_and_mul(packed_group_linear(normed, *self.up, None, 160))
            hidden, _ = rms_norm(packed_group_linear(gated, *self.down, None, 64), self.norm, 1e-6, residual)
        return hidden


@needs_library
def test_a_tape_gives_what_the_calls_give_for_any_number_of_rows():
    network = Network()
    tape, result = record(network)
    for num_rows in (37, 1, 12, 36, 37):
        network.ids.copy_(torch.randint(0, 50, (37,)))
        result.fill_(torch.nan)
        tape.run(num_rows)
        assert torch.equal(result[:num_rows], network()[:num_rows])
        assert result[num_rows:].isnan().all()


@needs_library
def test_nothing_is_computed_while_it_is_recorded():
    network = Network()
    network.ids.fill_(2**40)  # looking these up would be the end of the process
    record(network)


@needs_library
def test_memory_is_used_again_within_a_tape():
    few, many = (record(Network(num_layers))[0] for num_layers in (3, 30))
    assert len(few._memory) == len(many._memory)


@needs_library
@pytest.mark.parametrize("intruder", [torch.relu, torch.clone, lambda x: x.add_(1)])
def test_another_operation_ends_the_recording(intruder):
    network = Network()
    with pytest.raises(NotRecordableError, match="is not a compiled kernel"):
        record(lambda: intruder(network()))
    record(network)  # and leaves nothing behind


@needs_library
def test_a_numba_kernel_ends_the_recording():
    network = Network()
    network.table, network.norm = network.table.half(), network.norm.half()
    with pytest.raises(NotRecordableError):
        record(network)


@needs_library
def test_a_recording_within_a_recording_is_refused():
    network = Network()
    with pytest.raises(RuntimeError, match="cannot be part of another"):
        record(lambda: record(network)[1])


WITHOUT_LIBRARY = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import ctypes
import torch
def refuse(path, *rest):
    raise OSError(f"{path}: no such file")
ctypes.CDLL = refuse
from millrace.kernels import rms_norm, silu_and_mul, gather_batch, embedding
x, weight = torch.ones(2, 4), torch.full((4,), 2.0)
for _ in range(2):
    print(rms_norm(x, weight, 0.0)[0].sum().item(), embedding(torch.tensor([1]), x).sum().item())
print(silu_and_mul(x).shape)
"""


@needs_library
def test_without_the_library_there_is_one_warning_and_the_same_result():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=True)
    assert done.stdout.count("16.0 4.0\n") == 2
    assert done.stderr.count("WARNING") == 1
    assert "the compiled CPU kernels are missing" in done.stderr
    assert "install millrace again where there is a C++ compiler" in done.stderr

"""Every op in every dtype on every sample gives what its plain body gives in float64."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import millrace.kernels
from millrace.kernels._op import Draw, all_ops

OPS = all_ops()
SAMPLES = {name: [sample.name for sample in op.samples(Draw.seeded(torch.float32))] for name, op in OPS.items()}


def with_dtypes() -> Iterator[Any]:
    """Yields (op name, dtype) with a readable id."""
    for name, op in OPS.items():
        for dtype in op.tolerance:
            yield pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")


def with_samples(file: str = "op") -> Iterator[Any]:
    """Yields (op name, dtype, index of the sample) of the ops that have a file in their folder, with an id.

    The file is not imported, because an error of its import is to fail the tests of that op and no others.
    """
    for case in with_dtypes():
        name, dtype = case.values
        if importlib.util.find_spec(f"millrace.kernels.{name}.{file}") is not None:
            for index, sample in enumerate(SAMPLES[name]):
                yield pytest.param(name, dtype, index, id=f"{case.id}-{sample}".replace(" ", "_"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("name", "dtype", "index"), list(with_samples("cpu")))
def test_agrees_with_the_definition(agrees, name, dtype, index):
    agrees(OPS[name], OPS[name], index, dtype)


@pytest.mark.parametrize(("name", "dtype"), list(with_dtypes()))
def test_the_definition_agrees_with_itself_in_float64(agrees, name, dtype):
    for index in range(len(SAMPLES[name])):
        agrees(OPS[name], OPS[name].plain, index, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("name", "dtype", "index"), list(with_samples()))
def test_agrees_with_the_definition_on_the_gpu(agrees, name, dtype, index):
    for implementation in (OPS[name].plain, OPS[name]):
        agrees(OPS[name], implementation, index, dtype, "cuda")


def test_the_face_exports_every_op():
    assert sorted(OPS) == sorted(millrace.kernels.__all__) == millrace.kernels.__all__
    for name, op in OPS.items():
        assert getattr(millrace.kernels, name) is op


def test_every_op_covers_float32_and_several_samples_which_are_the_same_for_every_dtype():
    for name, op in OPS.items():
        assert torch.float32 in op.tolerance
        assert len(SAMPLES[name]) == len(set(SAMPLES[name])) >= 5
        for dtype in op.tolerance:
            assert SAMPLES[name] == [sample.name for sample in op.samples(Draw.seeded(dtype))]


def test_an_op_is_pickled_by_name():
    for op in OPS.values():
        assert pickle.loads(pickle.dumps(op)) is op

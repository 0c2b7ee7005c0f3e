"""Every op, every implementation, every dtype, every sample input: the same result as the plain body in float64."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import millrace.kernels
from millrace.kernels._op import Draw, Op, all_ops

OPS = all_ops()


def cases(device: str) -> Iterator[Any]:
    """Yields (op name, implementation name, dtype, index of the sample) with an id that reads."""
    for name, op in OPS.items():
        implementations = ["plain", device] if device in op.implementations() else ["plain"]
        for dtype in op.tolerance:
            for index, sample in enumerate(op.samples(Draw.seeded(dtype))):
                for implementation in implementations:
                    dtype_name = str(dtype).removeprefix("torch.")
                    case_id = f"{name}-{implementation}-{dtype_name}-{sample.name}".replace(" ", "_")
                    yield pytest.param(name, implementation, dtype, index, id=case_id)


def pick(op: Op[..., Any], implementation: str) -> Any:
    return op.plain if implementation == "plain" else op.implementations()[implementation]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("name", "implementation", "dtype", "index"), list(cases("cpu")))
def test_agrees_with_the_definition(agrees, name, implementation, dtype, index):
    agrees(OPS[name], pick(OPS[name], implementation), index, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", OPS)
def test_agrees_with_the_definition_on_the_gpu(agrees, name):
    for _, implementation, dtype, index in (case.values for case in cases("cuda") if case.values[0] == name):
        agrees(OPS[name], pick(OPS[name], implementation), index, dtype, "cuda")


def test_the_face_exports_every_op():
    assert sorted(OPS) == sorted(millrace.kernels.__all__) == millrace.kernels.__all__
    for name, op in OPS.items():
        assert getattr(millrace.kernels, name) is op


def test_every_op_covers_the_dtypes_and_odd_sizes():
    for op in OPS.values():
        assert torch.float32 in op.tolerance
        names = [sample.name for sample in op.samples(Draw.seeded(torch.float32))]
        assert len(names) == len(set(names)) >= 5


def test_an_op_is_pickled_by_name():
    for op in OPS.values():
        assert pickle.loads(pickle.dumps(op)) is op

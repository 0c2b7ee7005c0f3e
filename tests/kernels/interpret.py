"""Runs the Triton kernels of one op in Triton's interpreter, on CPU tensors, over all its samples.

A script of its own, for test_triton.py: TRITON_INTERPRET=1 counts only before triton is first imported. bfloat16 is
left out: the interpreter's is not that of the hardware. Every launch is also held against the op's specialisations, so
that what is compiled ahead of time is what would be launched.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from conftest import assert_agrees, poison, samples
from millrace.kernels._op import all_ops
from millrace.kernels._triton import TARGETS, TORCH_TO_TRITON, Specialisation

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def record_launches(launches: list[tuple[Any, dict[str, Any]]]) -> None:
    """Makes every launch of a kernel also leave (kernel, arguments by name) in a list."""
    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = recorded


def is_listed(arguments: dict[str, Any], forms: list[Specialisation]) -> bool:
    """Says whether a launch is one of the listed forms.

    Sizes that are compiled in (integers) only have to lie between the smallest and the largest that are listed.
    """
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    same = [form for form in forms if _same_kind(arguments, form)]
    if not any({name: form.options[name] for name in OPTIONS if name in form.options} == options for form in same):
        return False
    sizes = [name for name, value in same[0].constants.items() if type(value) is int]
    return all(
        min(form.constants[name] for form in same) <= arguments[name] <= max(form.constants[name] for form in same)
        for name in sizes
    )


def _same_kind(arguments: dict[str, Any], form: Specialisation) -> bool:
    for name, value in form.constants.items():
        if type(value) is not int and arguments.get(name) != value:
            return False
    for name, kind in form.types.items():
        value = arguments[name]
        if isinstance(value, torch.Tensor) != kind.startswith("*"):
            return False
        if isinstance(value, torch.Tensor) and "*" + TORCH_TO_TRITON[value.dtype] != kind:
            return False
    return True


def _short(value: Any) -> Any:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else value


def main(name: str) -> None:
    """Compares with the definition, then the launches with the list; prints how many samples there were."""
    op = all_ops()[name]
    implementation = op.implementations()["cuda"]
    launches: list[tuple[Any, dict[str, Any]]] = []
    record_launches(launches)
    poison(setattr)
    num_samples = len(samples(op, torch.float32))
    for dtype in (torch.float32, torch.float16):
        for index in range(num_samples if dtype in op.tolerance else 0):
            assert_agrees(op, implementation, index, dtype)
    module = importlib.import_module(f"millrace.kernels.{name}.triton")
    forms = list(module.specialisations(TARGETS["sm_90"]))
    for kernel, arguments in launches:
        own = [form for form in forms if form.kernel is kernel]
        form = {name: _short(value) for name, value in arguments.items()}
        assert is_listed(arguments, own), f"{kernel.__name__} was launched in a form that is not listed: {form}"
    print(num_samples)


if __name__ == "__main__":
    main(sys.argv[1])

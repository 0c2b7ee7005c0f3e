"""Runs the Triton kernels of some ops in Triton's interpreter, on CPU tensors, over all samples.

python interpret.py one|all OP ...

"one" runs a sample in one dtype (in 16 bits, where the op has them), and "all" in float32 and float16.

A script of its own, for test_triton.py, because TRITON_INTERPRET=1 has an effect only before triton is first imported.
bfloat16 is left out, because the interpreter rounds it differently than the hardware. Every launch is also looked up in
the specialisations of the op, so that the forms which are compiled ahead of time are those that would be launched.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from conftest import assert_agrees, poison, samples
from millrace.kernels._op import Op, Sample, all_ops
from millrace.kernels._triton import TARGETS, TORCH_TO_TRITON, Specialisation

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def patch_language_once() -> None:
    """Makes device functions patch triton.language at the first call from a module, not at every call.

    The interpreter spends a third of its time on it otherwise. A launch still patches what it restores at its end.
    """
    call, patched = InterpretedFunction.__call__, set[str]()

    def call_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_patched


def record_launches(launches: list[tuple[Any, dict[str, Any]]]) -> None:
    """Makes every launch of a kernel also append (kernel, arguments by name) to a list."""
    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = recorded


def is_listed(arguments: dict[str, Any], forms: list[Specialisation]) -> bool:
    """Returns whether a launch is one of the listed forms.

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


def dtypes_of(op: Op[..., Any], sample: Sample) -> Iterator[torch.dtype]:
    """Yields the dtypes for a sample. The tiles of float32 are small, so a long sample would take seconds in it."""
    for dtype in (torch.float32, torch.float16):
        is_slow = dtype == torch.float32 and sample.name.startswith("long") and torch.float16 in op.tolerance
        if dtype in op.tolerance and not is_slow:
            yield dtype


def _short(value: Any) -> Any:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else value


def check(name: str, launches: list[tuple[Any, dict[str, Any]]], num_dtypes: int) -> None:
    """Compares the results of an op with its definition, and its launches with its list of forms.

    Each sample is run in the last `num_dtypes` of its dtypes.
    """
    op = all_ops()[name]
    implementation = op.implementations()["cuda"]
    module = importlib.import_module(f"millrace.kernels.{name}.triton")
    small = replace(TARGETS["sm_90"], num_processors=8)  # on a large GPU a row is shared out over dozens of programs
    module.current_target = lambda: small
    for index, sample in enumerate(samples(op, torch.float32)):
        for dtype in list(dtypes_of(op, sample))[-num_dtypes:]:
            assert_agrees(op, implementation, index, dtype)
    assert launches
    forms = list(module.specialisations(small))
    for kernel, arguments in launches:
        own = [form for form in forms if form.kernel is kernel]
        form = {name: _short(value) for name, value in arguments.items()}
        assert is_listed(arguments, own), f"{kernel.__name__} was launched in a form that is not listed: {form}"
    launches.clear()


def main(how_many: str, *names: str) -> None:
    """Checks some ops, and prints the name of each one that passed."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    record_launches(launches)
    patch_language_once()
    poison(setattr)
    for name in names:
        check(name, launches, {"one": 1, "all": 2}[how_many])
        print(name)


if __name__ == "__main__":
    main(*sys.argv[1:])

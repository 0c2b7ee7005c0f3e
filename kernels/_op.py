"""The seam between the definition of a kernel and its implementations.

An op is a function whose body is plain torch, and that body defines the result. A file beside it may register a faster
implementation for a device type: `cpu.py` for "cpu", and for "cuda" either `triton.py`, or `cuda.py` if a library that
comes with torch is as fast. (torch reports ROCm devices as "cuda" too.) Such a file is imported when the op is first
called with a tensor on its device, so importing `millrace.kernels` loads neither numba nor triton. Tensors on the meta
device go to the implementation for "cuda", which then only compiles its kernels (`ahead.py`).

This is not a plugin system: all implementations are in the folder of the op, and there is one per device type.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_logger = logging.getLogger(__name__)

_MODULES_OF_DEVICE = MappingProxyType({"cpu": ("cpu",), "cuda": ("triton", "cuda")})
_OPTIONAL_PACKAGES = frozenset({"numba", "llvmlite", "triton"})


@dataclass(frozen=True, slots=True)
class Sample:
    """One set of inputs on which every implementation must agree with the plain body.

    Args:
        name: A few words for the property that the sample tests.
        args: The positional arguments. An op that works in place changes the tensors among them.
        kwargs: The keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draw:
    """Makes the random tensors of sample inputs. Two draws with the same seed make the same tensors.

    Args:
        dtype: The dtype of the floating point inputs.
        device: The device of the tensors.
        generator: The source of the numbers. It is on the CPU, so that every device gets the same numbers.
    """

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Draw:
        """Returns a draw with a new generator that is seeded with `seed`."""
        return cls(dtype, torch.device(device), torch.Generator().manual_seed(seed))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns standard normal numbers in `dtype` (that of the draw if None)."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Returns integers in `[low, high)`."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def permutation(self, n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Returns `0 .. n - 1` in random order."""
        return torch.randperm(n, generator=self.generator).to(self.device, dtype)

    def full(self, value: float, *shape: int) -> torch.Tensor:
        """Returns a tensor that holds `value` everywhere."""
        return torch.full(shape, value, dtype=self.dtype, device=self.device)

    def scales(self, num_kv_heads: int) -> torch.Tensor:
        """Returns scales of keys and values, `[2, num_kv_heads]` float32 between 1 and 8, for an 8-bit KV cache."""
        return torch.rand(2, num_kv_heads, generator=self.generator).mul(3).exp2().to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor of the given (nested) list of numbers on the device of the sample."""
        return torch.tensor(values, dtype=dtype, device=self.device)


Samples = Callable[[Draw], Iterable[Sample]]
Tolerance = Mapping[torch.dtype, tuple[float, float]]


class Op(Generic[P, R]):
    """A kernel: a plain torch definition, and at most one implementation per device type.

    A call runs the implementation for the device of the first tensor argument, or else the plain body.

    Attributes:
        name: The name of the function.
        plain: The plain torch body, which defines the result on every device.
        samples: Yields the inputs on which every implementation is tested.
        tolerance: For each dtype that the op takes, the `(rtol, atol)` by which a result may differ from that of the
            plain body in float64.
    """

    def __init__(self, plain: Callable[P, R], samples: Samples, tolerance: Tolerance) -> None:
        functools.update_wrapper(self, plain)
        self.name = plain.__name__
        self.plain = plain
        self.samples = samples
        self.tolerance = tolerance
        self._package = plain.__module__.rpartition(".")[0]
        self._registered: dict[str, Callable[P, R]] = {}
        self._resolved: dict[str, Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        device: str = args[0].device.type if args else _device_type(kwargs)  # type: ignore[attr-defined]
        implementation = self._resolved.get(device)
        if implementation is None:
            implementation = self._resolve(device)
        return implementation(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Op {self.name}{inspect.signature(self.plain)}>"

    def __reduce__(self) -> str:
        return self.name

    def register(self, device: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Makes the decorated function the implementation for a device type.

        Args:
            device: "cpu" or "cuda".

        Returns:
            The decorator. It returns the function unchanged.

        Raises:
            ValueError: The device type is unknown, or already has an implementation.
        """
        if device not in _MODULES_OF_DEVICE:
            raise ValueError(f"{self.name}: no device type {device!r}; use one of {sorted(_MODULES_OF_DEVICE)}")
        if device in self._registered:
            raise ValueError(
                f"{self.name} already has an implementation for {device!r} "
                f"({self._registered[device].__module__}); an op has one per device type: change that one"
            )

        def decorate(implementation: Callable[P, R]) -> Callable[P, R]:
            self._registered[device] = implementation
            return implementation

        return decorate

    def implementations(self) -> Mapping[str, Callable[P, R]]:
        """Imports all implementations and returns them by device type."""
        for device in _MODULES_OF_DEVICE:
            self._resolve(device)
        return MappingProxyType(self._registered)

    def fallback(self, name: str, device: str = "cpu") -> Callable[P, R]:
        """Returns a function of `_cpu_numba.py` for calls that the registered implementation does not support.

        If numba is not installed, the plain body is returned.

        Args:
            name: The name of a function in `_cpu_numba.py` of the op's folder, which is imported on first use.
            device: The device type that the warning names if numba is not installed.
        """
        key = f"{device}: {name}"
        if key not in self._resolved:
            module = self._import(f"{self._package}._cpu_numba", device)
            self._resolved[key] = self.plain if module is None else getattr(module, name)
        return self._resolved[key]

    def _resolve(self, device: str) -> Callable[P, R]:
        """Returns the function to run on a device type, and caches it."""
        if device in self._resolved:
            return self._resolved[device]
        if device == "meta":
            return self._resolved.setdefault(device, self._resolve("cuda"))
        for module in _MODULES_OF_DEVICE.get(device, ()):
            if device not in self._registered:
                self._import(f"{self._package}.{module}", device)
        return self._resolved.setdefault(device, self._registered.get(device, self.plain))

    def _import(self, module: str, device: str) -> ModuleType | None:
        """Imports and returns a module of implementations; None if it, or an optional package it needs, is missing."""
        if importlib.util.find_spec(module) is None:
            return None
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            # Only a missing optional package is tolerated. Any other missing module is a bug of this package.
            if (error.name or "").partition(".")[0] not in _OPTIONAL_PACKAGES:
                raise
            _logger.warning(
                "%s runs its plain torch body on %s, which is slower: package %s is not installed",
                self.name,
                device,
                error.name,
            )
            return None


def op(*, samples: Samples, tolerance: Tolerance) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Turns a function with a plain torch body into an `Op`.

    Args:
        samples: Yields the sample inputs, whose tensors it makes with the given `Draw`.
        tolerance: `(rtol, atol)` for each dtype that the op takes.

    Returns:
        The decorator.
    """
    return lambda plain: Op(plain, samples, tolerance)


def all_ops() -> dict[str, Op[..., Any]]:
    """Returns every op of the package by name. Each subfolder holds one op, of the same name."""
    package = importlib.import_module(__package__ or "")
    folders = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)
    return {name: getattr(importlib.import_module(f"{package.__name__}.{name}.op"), name) for name in folders}


def _device_type(kwargs: Mapping[str, object]) -> str:
    for value in kwargs.values():
        if isinstance(value, torch.Tensor):
            return value.device.type
    raise TypeError("a kernel was called without a tensor: its first argument must be one")

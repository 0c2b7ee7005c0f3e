"""`Fp8Format` (`quant_method: fp8`, `fbgemm_fp8`): 8-bit floats with scales of matrices, rows, or blocks of 128 x 128.

    weight [N, K] e4m3,   weight_scale or weight_scale_inv float32 or e8m0,   input_scale or activation_scale float32

Both names of the scales are of factors: `weight_scale_inv` is multiplied too (DeepSeek-V3, 2024, arXiv:2412.19437). It
has one number, or one for each block. `fbgemm_fp8` has one for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from ...weights.codes import InputQuant, QuantForm
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..fp8_matrix import Fp8Matrix, read_scale
from ..settings import check_fields, check_kv_cache, module_names, one_of, unsupported

__all__ = ["FORMAT", "Fp8Format"]

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")

FIELDS = (
    *("activation_scheme", "weight_block_size", "fmt", "scale_fmt", "expert_dtype", "activation_scale_ub"),
    "kv_cache_scheme",
    *("ignored_layers", "modules_to_not_convert", "modules_to_convert", "dequantize"),
)
"""The fields of the config. The last four change no number: the tensors say which layers are quantised."""


class Fp8Format(CheckpointFormat):
    """The formats of 8-bit floats without a library of their own."""

    leaves = ("weight", *WEIGHT_SCALES, *INPUT_SCALES)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        check_fields(config, FIELDS)
        self._name = str(config["quant_method"])
        scheme = one_of(config, "activation_scheme", ("dynamic", "static"), default="dynamic")
        self._is_static = scheme == "static"
        self._block = _block(config)
        one_of(config, "fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
        self._has_exponents = one_of(config, "scale_fmt", ("float", "ue8m0", None)) == "ue8m0"
        one_of(config, "expert_dtype", ("fp8",), default="fp8")
        check_kv_cache(config)
        bound = config.get("activation_scale_ub")
        if bound is not None and (not isinstance(bound, int | float) or isinstance(bound, bool) or not bound > 0):
            raise unsupported("activation_scale_ub", bound, "a positive number")
        module_names(config, "ignored_layers", "modules_to_not_convert", "modules_to_convert")

    @property
    def planned_form(self) -> QuantForm:
        """The form of all matrices, with an input scale of 1 where there is one."""
        row_block, group_size = self._block or (1, 0)
        inputs = InputQuant("fp8", group_size, 1.0 if self._is_static else None)
        return QuantForm(self._name, "fp8", 8, group_size, row_block=row_block, inputs=inputs)

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields the matrix of a module."""
        scales = [leaf for leaf in WEIGHT_SCALES if leaf in tensors]
        if len(scales) != 1 or "weight" not in tensors:
            wanted = "weight and one of " + " and ".join(WEIGHT_SCALES)
            raise CheckpointError(f"{module} has {', '.join(tensors)}; it must have {wanted}; fetch all files")
        self._check_exponents(module, scales[0], tensors[scales[0]].dtype)
        yield (
            "weight",
            Fp8Matrix.join(
                module,
                tensors["weight"],
                (scales[0], tensors[scales[0]]),
                format_name=self._name,
                setting=f"weight_block_size={[*self._block] if self._block else 'null'}",
                block=self._block,
                inputs=self._inputs(module, tensors),
            ),
        )

    def _check_exponents(self, module: str, leaf: str, dtype: torch.dtype) -> None:
        """Raises if the scales are integers, unless the config says that bytes are exponents."""
        if not dtype.is_floating_point and not (dtype == torch.uint8 and self._has_exponents):
            raise CheckpointError(
                f"{module}.{leaf} is of {dtype}; scales are floats, or with scale_fmt 'ue8m0' in the config bytes"
            )

    def _inputs(self, module: str, tensors: Mapping[str, StoredTensor]) -> InputQuant:
        """Returns how the input of a layer is quantised."""
        leaf = next((leaf for leaf in INPUT_SCALES if leaf in tensors), None)
        if self._is_static:
            return InputQuant("fp8", scale=read_scale(module, leaf or INPUT_SCALES[0], tensors))
        if leaf is not None:
            raise CheckpointError(
                f"{module} has {leaf}, and config field 'quantization_config.activation_scheme' is 'dynamic'; one of "
                "them is wrong: pass hf_overrides with the right quantization_config"
            )
        return InputQuant("fp8", self._block[1] if self._block else 0)


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    given = config.get("weight_block_size")
    if given is None:
        return None
    sizes = list(given) if isinstance(given, list | tuple) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise unsupported("weight_block_size", given, "null or two positive integers, such as [128, 128]")
    if config.get("activation_scheme") == "static":
        raise unsupported("activation_scheme", "static", "dynamic, with weight_block_size")
    return sizes[0], sizes[1]


FORMAT = Fp8Format

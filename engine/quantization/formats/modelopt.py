"""`ModelOptFormat` (`quant_method: modelopt`): checkpoints of NVIDIA's Model Optimizer in 8-bit or 4-bit floats.

    FP8                         weight e4m3, weight_scale and input_scale float32: one of each
    FP8_PER_CHANNEL_PER_TOKEN   weight e4m3, weight_scale [N] float32
    FP8_PB_WO                   weight e4m3, weight_scale [N / 128, 1, K / 128, 1] float32; inputs are not quantised
    NVFP4                       weight [N, K / 2] uint8, weight_scale [N, K / 16] e4m3, weight_scale_2 float32: one

`weight_scale_2` is multiplied. NVFP4 also has an `input_scale`, which is not used: inputs are not rounded to 4 bits.
The settings are in config.json, or in hf_quant_config.json below `quantization`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CheckpointError
from ...weights.codes import InputQuant, QuantForm
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..fp4_matrix import BLOCK, Fp4Matrix
from ..fp8_matrix import Fp8Matrix, read_scale
from ..settings import check_fields, check_kv_cache, module_names, one_of, unsupported

__all__ = ["FORMAT", "ModelOptFormat"]

FP8_BLOCK = (128, 128)

FIELDS = (
    *("quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "group_size"),
    *("exclude_modules", "ignore", "config_groups", "targets", "producer"),
)
"""The fields of the config. The last five change no number: the tensors say which layers are quantised, and how."""

PLANNED = {
    "FP8": QuantForm("modelopt", "fp8", 8, inputs=InputQuant("fp8", scale=1.0)),
    "FP8_PER_CHANNEL_PER_TOKEN": QuantForm("modelopt", "fp8", 8, inputs=InputQuant("fp8")),
    "FP8_PB_WO": QuantForm("modelopt", "fp8", 8, FP8_BLOCK[1], row_block=FP8_BLOCK[0]),
    "NVFP4": QuantForm("modelopt", "table", 4, BLOCK),
}
"""The algorithms, and the form of their matrices."""


class ModelOptFormat(CheckpointFormat):
    """The format of Model Optimizer, with one algorithm for all layers."""

    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        fields = config.get("quantization", config)
        if not isinstance(fields, Mapping):
            raise unsupported("quantization", fields, "an object")
        check_fields({key: config[key] for key in config if key != "quantization"}, FIELDS)
        check_fields(fields, FIELDS)
        self._algorithm = str(one_of(fields, "quant_algo", tuple(map(str.lower, PLANNED)))).upper()
        one_of(fields, "kv_cache_quant_algo", ("fp8", None))
        check_kv_cache(fields)
        if self._algorithm == "NVFP4":
            one_of(fields, "group_size", (BLOCK,), default=BLOCK)
        module_names(fields, "exclude_modules", "ignore")

    @property
    def planned_form(self) -> QuantForm:
        """The form of all matrices, with an input scale of 1 where there is one."""
        return PLANNED[self._algorithm]

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields the matrix of a module."""
        asked = ("weight", "weight_scale", *(("weight_scale_2",) if self._algorithm == "NVFP4" else ()))
        missing = [leaf for leaf in asked if leaf not in tensors]
        if missing:
            raise CheckpointError(
                f"{module} has no {', '.join(missing)}, and config field 'quantization_config.quant_algo' is "
                f"{self._algorithm!r}, which stores {', '.join(asked)}; fetch all files"
            )
        weight, scale = tensors["weight"], ("weight_scale", tensors["weight_scale"])
        name = PLANNED[self._algorithm].format
        if self._algorithm == "NVFP4":
            factor = read_scale(module, "weight_scale_2", tensors)
            yield "weight", Fp4Matrix.join(module, ("weight", weight), scale, format_name=name, whole_scale=factor)
            return
        block = FP8_BLOCK if self._algorithm == "FP8_PB_WO" else None
        inputs = PLANNED[self._algorithm].inputs
        if self._algorithm == "FP8":
            inputs = InputQuant("fp8", scale=read_scale(module, "input_scale", tensors))
        setting = f"quant_algo={self._algorithm}"
        yield (
            "weight",
            Fp8Matrix.join(module, weight, scale, format_name=name, setting=setting, block=block, inputs=inputs),
        )


FORMAT = ModelOptFormat

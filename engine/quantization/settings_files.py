"""`read_settings_file`: reads the settings of a quantised checkpoint from a file of their own.

Most folders have them in config.json. Those of 2023 do not, nor do those of NVIDIA's Model Optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage import Location, read_json_object

__all__ = ["read_settings_file"]

FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""The files in which settings are looked for -> the method of a file that names none."""

AWQ_FIELDS = {"w_bit", "zero_point"}
"""Fields that AWQ has and GPTQ has not: early AWQ folders have their settings in GPTQ's file."""


def read_settings_file(folder: Path) -> Mapping[str, Any] | None:
    """Returns the settings in one of `FILES` as `quantization_config` has them; None if there is no such file.

    Args:
        folder: A model folder whose config.json has no `quantization_config`.

    Raises:
        CheckpointError: The file holds no JSON object.
    """
    name = next((name for name in FILES if (folder / name).exists()), None)
    if name is None:
        return None
    settings = read_json_object(Location.at(folder / name))
    method = "awq" if settings.keys() & AWQ_FIELDS else FILES[name]
    return {"quant_method": method, **settings}

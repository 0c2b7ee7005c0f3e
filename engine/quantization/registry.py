"""`find_scheme` and `find_format`: find a quantization scheme or a format of quantised checkpoints by its name.

The name is that of its module in `schemes/` or `formats/`, with hyphens for underscores. The modules import torch, so
they are imported only when they are needed. Checking a name imports no module.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedModelError, quote
from . import formats, schemes

if TYPE_CHECKING:
    from .checkpoint_format import CheckpointFormat
    from .scheme import QuantizationScheme

__all__ = ["find_format", "find_scheme", "format_names", "quantization_names", "scheme_names"]

SYNONYMS: Mapping[str, str] = {
    "auto_awq": "awq",
    "awq_marlin": "awq",
    "auto_gptq": "gptq",
    "gptq_marlin": "gptq",
    "gpt_oss_mxfp4": "mxfp4",
    "fbgemm_fp8": "fp8",
    "modelopt_fp4": "modelopt",
}
"""Other names of formats, in configs and in vLLM -> our name."""


def scheme_names() -> list[str]:
    """Returns the names of the schemes, which quantise plain weights while they are loaded."""
    return _names(schemes)


def format_names() -> list[str]:
    """Returns the names of the formats of quantised checkpoints."""
    return _names(formats)


def quantization_names() -> dict[str, str]:
    """Returns the allowed values of the setting `quantization` -> the name that each means."""
    return {**{name: name for name in (*scheme_names(), *format_names())}, **SYNONYMS}


def find_scheme(name: str | None) -> type[QuantizationScheme]:
    """Returns the class of a scheme, which is the constant `SCHEME` of its module.

    Args:
        name: One of `scheme_names()`; None for full precision.
    """
    if name is None:
        from .full_precision import FullPrecision

        return FullPrecision
    scheme: type[QuantizationScheme] = _module(schemes, name).SCHEME
    return scheme


def find_format(settings: Mapping[str, Any] | None, quantization: str | None = None) -> CheckpointFormat | None:
    """Returns the format of a checkpoint; None for an unquantised checkpoint.

    Args:
        settings: The `quantization_config` of the checkpoint; None if it has none.
        quantization: The setting of this name, which may repeat the format of the checkpoint.

    Raises:
        ConfigError: The setting names another format than that of the checkpoint.
        UnsupportedModelError: The format, or a value of a field, is not implemented.
    """
    if settings is None:
        if quantization is not None and quantization not in scheme_names():
            raise ConfigError(
                f"quantization={quantization!r} is a format of quantised checkpoints, and the config of this model has "
                f"no quantization_config; drop it, or use one of {', '.join(scheme_names())}, which quantise the "
                "weights while they are loaded"
            )
        return None
    method = settings.get("quant_method")
    name = SYNONYMS.get(method, method) if isinstance(method, str) else None
    if name not in format_names():
        raise UnsupportedModelError(_unknown(method))
    if quantization not in (None, name):
        raise ConfigError(
            f"quantization={quantization!r} contradicts the checkpoint, whose quantization_config has "
            f"quant_method={method!r}; drop the setting, the format is found without it"
        )
    found: CheckpointFormat = _module(formats, name).FORMAT(settings)
    return found


def _unknown(method: Any) -> str:
    near = difflib.get_close_matches(str(method)[:80], (*format_names(), *SYNONYMS), n=1)
    hint = f" (the nearest is {near[0]})" if near else ""
    return (
        f"config field 'quantization_config.quant_method' is {quote(method)}; implemented are "
        f"{', '.join(format_names())}{hint}; use another checkpoint of the model, or the unquantised one with "
        f"quantization={scheme_names()[0]!r}"
    )


def _names(package: ModuleType) -> list[str]:
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(package.__path__))


def _module(package: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{package.__name__}.{name.replace('-', '_')}")

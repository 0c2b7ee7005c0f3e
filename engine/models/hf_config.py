"""`load_hf_config` reads the config of a model folder; the other functions read one field each and check its value.

Nothing here depends on a model family. Rotary parameters are read in `rope.py`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, quote
from ..pooling.token_classes import TOKEN_CLASS_FIELDS, read_token_classes
from ..quantization.settings_files import read_settings_file
from ..storage import Location, read_json_object
from .model_code import ModelCode

logger = logging.getLogger(__name__)

__all__ = [
    "FLOAT32_MAX",
    "attention_windows",
    "flag",
    "head_counts",
    "is_positive_number",
    "load_hf_config",
    "one_of",
    "positive_float",
    "positive_int",
    "quantization_settings",
    "whole_heads",
]

FLOAT32_MAX = 3.4028234663852886e38
"""The largest float32. A larger number in a config would be infinite in the model."""

MAX_INT = 2**31 - 1
"""Largest integer of a config: sizes and ids are 32-bit numbers in kernels."""

OLD_ROPE_FIELDS = ("rope_scaling", "rope_theta")
"""Fields of older configs whose contents newer ones have in `rope_parameters`."""

SAME_FIELDS = {"kimi_k2": "deepseek_v3", "llama_bidirec": "llama", "new": "gte"}
"""Model types that transformers does not know -> the model type whose config has the same fields."""

KEPT_FIELDS = {"llama_bidirec": ("temperature",)}
"""Model types -> fields that transformers drops, because it takes them for settings of generation."""

QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
"""Fields that may have the settings of a quantised checkpoint."""

READ_BESIDE = frozenset(
    {
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"),
        *("is_causal", "use_bidirectional_attention", "sliding_window", "layer_types", "head_dim", "auto_map"),
        *(*QUANTIZATION_FIELDS, *TOKEN_CLASS_FIELDS),
    }
)
"""Fields that are read of every config, also where the class of the config does not have them."""

MAX_REASON_CHARS = 500
"""Most characters of an error message of transformers that are shown; it may quote a whole value."""

MAX_COUNTS = {"num_hidden_layers": 1000, "num_labels": 1_000_000}
"""Fields for each unit of which objects are made when a config is read or a model is built -> the largest value."""


Overrides: TypeAlias = Mapping[str, Any] | Callable[[Any], Any]
"""Fields that replace fields of config.json, or a function that changes the config object and returns it."""


def load_hf_config(
    folder: str | Path,
    overrides: Overrides | None = None,
    *,
    model_impl: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Reads `config.json` of a model folder, and the settings of quantisation from a file of their own.

    Args:
        folder: The model folder.
        overrides: The setting `hf_overrides`. A mapping replaces the whole field, except for the config of a part of
            the model, such as `text_config`, which is merged, and for `rope_parameters`: they are merged, and a new
            rope type keeps only `rope_theta` of the file. Rotary parameters by layer type replace the whole field too.
            A function gets the config object of the file.
        model_impl: A value of `EngineConfig.model_impl`.
        trust_remote_code: Whether code of the folder may run.

    Returns:
        The transformers config object of the file's `model_type`. `model_code` returns the last two arguments from it.

    Raises:
        CheckpointError: The config cannot be read, or lacks `model_type` or `architectures`.
        UnsupportedModelError: transformers does not know the `model_type`, or refuses a field's value.
        ConfigError: The function of the overrides fails, or returns no config.
    """
    path = Path(folder) / "config.json"
    code = ModelCode(model_impl, trust_remote_code=trust_remote_code, folder=folder)
    function, given = (overrides, {}) if callable(overrides) else (None, dict(overrides or {}))
    fields = _read_fields(path)
    model_type = given.get("model_type", fields.get("model_type"))
    if not model_type or not isinstance(model_type, str):
        raise _unnamed(path, model_type, given.get("architectures", fields.get("architectures")))
    _warn_of_unread(given.keys() - fields.keys(), _known_type(model_type))
    fields = _merge(fields, given, _parts(model_type)) | {"model_type": _known_type(model_type)}
    if function is None and not _is_list_of_text(fields.get("architectures")):
        raise _unnamed(path, model_type, fields.get("architectures"))
    _check_counts(fields)
    config = _make_config(fields, code)
    for name in KEPT_FIELDS.get(model_type, ()):
        setattr(config, name, fields.get(name))
    if function is not None:
        config = _changed(function, config)
        if not _is_list_of_text(config.architectures):
            raise _unnamed(path, config.model_type, config.architectures)
    _check_dtype(config)
    if (classes := read_token_classes(config)) is not None:
        config.num_labels = classes.num_labels
    code.attach(config)
    return config


def _warn_of_unread(names: Iterable[str], model_type: str) -> None:
    """Logs a warning about overrides of fields that no config of this type has, which are likely misspelt."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return  # The code of the folder knows the fields.
    known: Any = CONFIG_MAPPING[model_type]
    for name in sorted(names):
        has = {*getattr(known, "__dataclass_fields__", ()), *known.attribute_map, *READ_BESIDE}
        if name not in has and not hasattr(known, name):
            near = difflib.get_close_matches(name, has, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            logger.warning("hf_overrides sets %s, which no %s has%s", quote(name), known.__name__, hint)


def _parts(model_type: str) -> Container[str]:
    """Returns the names of fields that are configs themselves, of models that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return getattr(CONFIG_MAPPING[model_type], "sub_configs", {}) if model_type in CONFIG_MAPPING else ()


def _known_type(model_type: str) -> str:
    """Returns the `model_type` by which transformers knows the fields of a config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type if model_type in CONFIG_MAPPING else SAME_FIELDS.get(model_type, model_type)


def _make_config(fields: Mapping[str, Any], code: ModelCode) -> Any:
    """Returns the config object of fields, which transformers makes, or the code of the folder."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    make = AutoConfig.for_model if fields["model_type"] in CONFIG_MAPPING else _folder_config(fields, code)
    try:
        return make(**fields)
    except Exception as error:  # Config classes raise errors of many types.
        raise UnsupportedModelError(
            f"config.json of {code.folder} was refused by transformers: {str(error)[:MAX_REASON_CHARS]}"
        ) from error


def _unnamed(path: Path, model_type: Any, architectures: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} does not say which model it is for: model_type={quote(model_type)}, "
        f"architectures={quote(architectures)}; a text and a list of texts are needed (set them with hf_overrides)"
    )


def _changed(function: Callable[[Any], Any], config: Any) -> Any:
    """Returns the config that the function of `hf_overrides` makes of a config."""
    from transformers import PretrainedConfig

    try:
        changed = function(config)
    except Exception as error:  # It is the user's function.
        raise ConfigError(f"the function hf_overrides failed: {error!r:.300}") from error
    if not isinstance(changed, PretrainedConfig):
        raise ConfigError(f"the function hf_overrides must return the config; it returned {quote(changed)}")
    return changed


def _folder_config(fields: Mapping[str, Any], code: ModelCode) -> Any:
    """Returns the config class of the folder's own code, for a `model_type` that transformers does not know."""
    from .fallback.module_class import folder_class

    auto_map = fields.get("auto_map")
    reference = auto_map.get("AutoConfig") if isinstance(auto_map, Mapping) else None
    if reference is None or code.folder is None:
        raise UnsupportedModelError(
            f"model_type {quote(fields['model_type'])} of {code.folder} is unknown to the installed transformers; "
            "upgrade transformers, or set another model_type with hf_overrides"
        )
    return folder_class(reference, code.folder, trust_remote_code=code.trust_remote_code)


def _check_dtype(config: Any) -> None:
    """Raises if a config names a dtype with which no model computes."""
    import torch

    stored = config.dtype
    if stored not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedModelError(
            f"config field 'dtype' is {quote(stored)}; it can be float32, float16, bfloat16 or float64"
        )


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _check_counts(fields: Mapping[str, Any]) -> None:
    """Raises if a count is so large that transformers would fill the memory with the objects that it makes."""
    for name, most in MAX_COUNTS.items():
        value = fields.get(name)
        if isinstance(value, int | float) and not value <= most:
            raise UnsupportedModelError(f"config field {name!r} is {quote(value)}; it can be at most {most}")


def _read_fields(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a folder that holds a Hugging Face model")
    fields = {name: _decode(value) for name, value in read_json_object(Location.at(path)).items()}
    owners = [owner for owner in (fields, fields.get("text_config")) if isinstance(owner, Mapping)]
    if all(owner.get(name) is None for owner in owners for name in QUANTIZATION_FIELDS):
        settings = read_settings_file(path.parent)
        return fields if settings is None else {**fields, QUANTIZATION_FIELDS[0]: settings}
    return fields


def _decode(value: Any) -> Any:
    """Returns a value of config.json with the numbers that JSON has not, which transformers writes as objects."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: _decode(item) for name, item in value.items()}


def _merge(fields: dict[str, Any], overrides: dict[str, Any], parts: Container[str] = ()) -> dict[str, Any]:
    """Returns fields with overrides applied; a new rope type drops all old rope parameters except `rope_theta`.

    Args:
        fields: The fields of a config.
        overrides: The fields that replace them.
        parts: Names of fields that are configs themselves, which are merged.
    """
    _check_rope(fields)
    _check_rope(overrides)
    for name, new in overrides.items():
        if name in parts and isinstance(fields.get(name), Mapping) and isinstance(new, Mapping):
            overrides = {**overrides, name: _merge(dict(fields[name]), dict(new))}
    if not overrides.keys() & {"rope_parameters", *OLD_ROPE_FIELDS}:
        return {**fields, **overrides}  # A config class reads both forms.
    if any(isinstance(value, Mapping) for value in (overrides.get("rope_parameters") or {}).values()):
        rest = {name: value for name, value in fields.items() if name not in OLD_ROPE_FIELDS}
        return {**rest, **overrides}  # These are by layer type, and replace the whole field.
    fields, overrides = _fold_rope(fields), _fold_rope(overrides)
    rope, new_rope = fields.get("rope_parameters"), overrides.get("rope_parameters")
    if rope and new_rope:
        names_type = "rope_type" in new_rope or "type" in new_rope
        kept = {name: value for name, value in rope.items() if name == "rope_theta" or not names_type}
        overrides = {**overrides, "rope_parameters": {**kept, **new_rope}}
    return {**fields, **overrides}


def _check_rope(fields: Mapping[str, Any]) -> None:
    """Raises if one of the objects with rotary parameters is something else."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name), Mapping | None):
            raise UnsupportedModelError(f"config field {name!r} is {quote(fields[name])}; it must be an object or null")


def _fold_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields with `rope_scaling` and `rope_theta` (the old form) moved into `rope_parameters`."""
    rest = dict(fields)
    old = {name: rest.pop(name) for name in OLD_ROPE_FIELDS if name in rest}
    if not old:
        return rest
    rope = {**(rest.get("rope_parameters") or {})}
    if "rope_scaling" in old:
        rope |= old["rope_scaling"] or {"rope_type": "default"}
    if old.get("rope_theta") is not None:
        rope["rope_theta"] = old["rope_theta"]
    return {**rest, "rope_parameters": rope}


def quantization_settings(config: Any) -> Mapping[str, Any] | None:
    """Returns the settings of a quantised checkpoint; None if it is not quantised.

    Args:
        config: A transformers config.

    Raises:
        UnsupportedModelError: The field is no object.
    """
    for owner in (config, config.get_text_config()):
        for field in QUANTIZATION_FIELDS:
            given: Any = getattr(owner, field, None)
            settings = given.to_dict() if hasattr(given, "to_dict") else given
            if isinstance(settings, Mapping):
                # The older field is of one method only, which it need not name.
                return {"quant_method": "compressed-tensors", **settings} if field == "compression_config" else settings
            if settings is not None:
                raise UnsupportedModelError(f"config field {field!r} is {quote(given)}; it must be an object")
    return None


def positive_int(config: Any, field: str) -> int:
    """Returns a field that must be a positive integer.

    Args:
        config: A transformers config.
        field: The field's name.

    Raises:
        UnsupportedModelError: The field is missing or not a positive integer.
    """
    value = getattr(config, field, None)
    if not isinstance(value, int) or not is_positive_number(value, MAX_INT):
        raise UnsupportedModelError(
            f"config field {field!r} is {quote(value)}; it must be a positive integer of at most {MAX_INT}"
        )
    return value


def is_positive_number(value: Any, most: float = FLOAT32_MAX) -> bool:
    """Returns whether a value of a config is a number above 0 of at most `most`; true, NaN and infinity are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


def positive_float(config: Any, field: str, most: float = FLOAT32_MAX) -> float:
    """Returns a field that must be a positive number.

    Args:
        config: A transformers config.
        field: The field's name.
        most: Largest number that makes sense.

    Raises:
        UnsupportedModelError: The field is missing or not a positive number.
    """
    value: Any = getattr(config, field, None)
    if not is_positive_number(value, most):
        raise UnsupportedModelError(
            f"config field {field!r} is {quote(value)}; it must be a positive number of at most {most:g}"
        )
    return float(value)


def flag(config: Any, field: str, default: bool) -> bool:
    """Returns a field that must be true or false.

    Args:
        config: A transformers config.
        field: The field's name.
        default: Value of a missing field.

    Raises:
        UnsupportedModelError: The value is not a bool.
    """
    value = getattr(config, field, default)
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"config field {field!r} is {quote(value)}; it must be true or false")
    return value


def one_of(config: Any, field: str, allowed: tuple[str, ...]) -> str:
    """Returns a field that must have one of the implemented values.

    Args:
        config: A transformers config.
        field: The field's name.
        allowed: The implemented values.

    Raises:
        UnsupportedModelError: The field is missing or has another value.
    """
    value = getattr(config, field, None)
    if not isinstance(value, str) or value not in allowed:
        raise UnsupportedModelError(
            f"config field {field!r} is {quote(value)}; implemented for this architecture: {', '.join(allowed)}"
        )
    return str(value)


def head_counts(config: Any) -> dict[str, Any]:
    """Returns `num_heads`, `num_kv_heads` and `head_dim` of a config with grouped-query attention.

    Args:
        config: A transformers config.

    Raises:
        UnsupportedModelError: A field is missing, or the counts do not divide each other.
    """
    num_heads = positive_int(config, "num_attention_heads")
    num_kv_heads = positive_int(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"config field 'num_key_value_heads' is {num_kv_heads}; it must divide num_attention_heads={num_heads}"
        )
    if getattr(config, "head_dim", None) is not None:
        return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": positive_int(config, "head_dim")}
    hidden_size = positive_int(config, "hidden_size")
    if hidden_size % num_heads:
        raise UnsupportedModelError(
            f"config field 'hidden_size' is {hidden_size}; without head_dim it must be a multiple of "
            f"num_attention_heads={num_heads}"
        )
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": hidden_size // num_heads}


def whole_heads(config: Any) -> dict[str, Any]:
    """Returns `hidden_size`, `num_heads` and `head_dim` of a config whose query heads share out the hidden size.

    Args:
        config: A transformers config.

    Raises:
        UnsupportedModelError: A field is missing, or the number of heads does not divide the hidden size.
    """
    hidden_size, num_heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    if hidden_size % num_heads:
        raise UnsupportedModelError(
            f"config field 'num_attention_heads' is {num_heads}; it must divide hidden_size={hidden_size}"
        )
    return {"hidden_size": hidden_size, "num_heads": num_heads, "head_dim": hidden_size // num_heads}


def attention_windows(config: Any) -> tuple[int, ...]:
    """Returns the attention window of each layer; 0 for a layer that attends to all tokens.

    `layer_types` says which layers have a window. Without that field, all layers have the `sliding_window` of the
    config if it is set.

    Args:
        config: A transformers config.

    Raises:
        UnsupportedModelError: A layer type is neither full nor sliding attention, or their number is wrong.
    """
    num_layers = positive_int(config, "num_hidden_layers")
    has_window = getattr(config, "sliding_window", None) is not None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = ["sliding_attention" if has_window else "full_attention"] * num_layers
    kinds = ("full_attention", "sliding_attention")
    is_list = isinstance(layer_types, list | tuple)
    if not is_list or len(layer_types) != num_layers or not all(kind in kinds for kind in layer_types):
        raise UnsupportedModelError(
            f"config field 'layer_types' is {quote(layer_types)}; it must say full_attention or sliding_attention "
            f"for each of the {num_layers} layers"
        )
    if "sliding_attention" not in layer_types:
        return (0,) * num_layers
    window = positive_int(config, "sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)

"""`AdapterConfig`: the fields of an adapter's `adapter_config.json` that say how its matrices change the model.

Each field of PEFT's `LoraConfig` (version 0.21) is read, or is harmless, or must be off.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError, quote
from .patterns import compile_pattern

__all__ = ["AdapterConfig"]

logger = logging.getLogger(__name__)

READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "init_lora_weights",
}
"""Fields that `AdapterConfig.of` reads."""

HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    # What Megatron-Bridge leaves in a config: the last two are about experts, whose matrices are refused by name.
    "dropout_position",
    "lora_A_init_method",
    "lora_B_init_method",
    "lora_dtype",
    "a2a_experimental",
    "normalize_moe_lora",
    "share_expert_adapters",
}
"""Fields about the training, about how the first numbers were drawn, or about the base model's storage."""

MERGE = "merge the adapter into the model with merge_and_unload() of PEFT"

REFUSED = {
    "use_dora": f"DoRA also scales the rows of the model's matrices; {MERGE}",
    "use_qalora": "QALoRA adds up the columns of the inputs in groups; train the adapter without it",
    "use_bdlora": "BD-LoRA stores matrices with blocks on their diagonals; train the adapter without it",
    "kasa_config": "KaSA changes the model's own matrices; train the adapter without it",
    "velora_config": "VeLoRA's adapters hold further tensors; train the adapter without it",
    "monteclora_config": "MonteCLoRA draws matrices at random; train the adapter without it",
    "arrow_config": "Arrow chooses among several adapters for each token; name one of them",
    "alora_invocation_tokens": "aLoRA works from a certain token of the prompt on; train a plain LoRA adapter",
    "lora_bias": f"the biases of an adapter are not added; {MERGE}",
    "layer_replication": f"it repeats layers of the model; {MERGE}",
    "target_parameters": f"it changes the matrices of experts, which take no adapters yet; {MERGE}",
}
"""Fields that must be off -> what they do to the numbers, and what to do."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` for which the base model keeps its numbers when the training starts."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of an adapter's config that say how its matrices change the model.

    Attributes:
        rank: Rank of matrices that no pattern names (`r`).
        alpha: `lora_alpha` of matrices that no pattern names: their product is scaled by alpha / rank.
        by_root: Whether the product is scaled by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
        ranks: Patterns of names of modules, in order, with the ranks of their matrices.
        alphas: Patterns of names of modules, in order, with their alphas.
        targets: Ends of the names of the modules that have matrices; None if the config gives them otherwise.
        excluded: Ends of the names of modules without matrices; None if the config gives them otherwise.
        layers: Numbers of the layers that have matrices; None for all.
        ties: Whether what is asked for the token embedding is asked for a tied output head too.
        saved: Ends of the names of the modules that are saved whole (`modules_to_save`).
        tokens: End of the name of an embedding or a head -> the tokens whose rows are replaced
            (`trainable_token_indices`). An empty name stands for the token embedding.
    """

    rank: int
    alpha: float
    by_root: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] | None
    layers: tuple[int, ...] | None
    ties: bool
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> AdapterConfig:
        """Returns the config that the fields of `adapter_config.json` describe.

        Raises:
            AdapterError: A field is missing, has a wrong value, or asks for what is not implemented.
        """
        _check_kind(fields)
        _check_off(fields)
        layers = fields.get("layers_to_transform")
        has_pattern = bool(fields.get("layers_pattern"))
        return cls(
            rank=_whole(fields, "r"),
            alpha=_number(fields, "lora_alpha"),
            by_root=_flag(fields, "use_rslora"),
            ranks=tuple(
                (compile_pattern(key), _whole(of, key)) for of in (_map(fields, "rank_pattern"),) for key in of
            ),
            alphas=tuple(
                (compile_pattern(key), _number(of, key)) for of in (_map(fields, "alpha_pattern"),) for key in of
            ),
            targets=_names(fields, "target_modules"),
            excluded=_names(fields, "exclude_modules") if fields.get("exclude_modules") else (),
            layers=None if has_pattern or layers in (None, []) else _layers(layers),
            ties=_flag(fields, "ensure_weight_tying"),
            saved=_names(fields, "modules_to_save") or (),
            tokens=_tokens(fields),
        )

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's matrices."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor of the product of a module's matrices."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.by_root else rank)

    def saves(self, module: str) -> bool:
        """Returns whether the config asks for the whole of a module."""
        return _ends(module, self.saved)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Returns the tokens whose rows of a module are replaced, in the order of the file; None for no tokens."""
        return next((tokens for end, tokens in self.tokens.items() if not end or _ends(module, (end,))), None)

    def names(self, module: str) -> bool | None:
        """Returns whether the config asks for matrices of a module; None if it gives no list of all modules."""
        if self.targets is None or self.excluded is None or self.ties:
            return None
        index = next((int(part) for part in module.split(".") if part.isdecimal()), None)
        in_layers = self.layers is None or index in self.layers
        return in_layers and _ends(module, self.targets) and not _ends(module, self.excluded)


def _check_kind(fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"peft_type of adapter_config.json is {quote(kind)}; only adapters of the type 'LORA' that PEFT wrote are "
            "read"
        )
    if fields.get("bias", "none") != "none":
        raise AdapterError(
            f"bias of adapter_config.json is {quote(fields['bias'])}, and the biases of an adapter do not replace "
            f"those of the model; {MERGE}"
        )
    start = fields.get("init_lora_weights", True)
    if not any(start is plain if isinstance(plain, bool) else start == plain for plain in PLAIN_STARTS):
        raise AdapterError(
            f"init_lora_weights of adapter_config.json is {quote(start)}, so the adapter belongs to a model whose own "
            "numbers were changed; save it with save_pretrained(..., path_initial_model_for_weight_conversion=...) of "
            "PEFT, which makes it fit the unchanged model"
        )


def _check_off(fields: Mapping[str, Any]) -> None:
    """Raises if a field is on that is not implemented, and warns of unknown fields."""
    for name, value in fields.items():
        if name in READ or name in HARMLESS or value in (None, False, [], {}, ""):
            continue
        if name in REFUSED:
            raise AdapterError(f"{name} of adapter_config.json is {quote(value)}: {REFUSED[name]}")
        if name.startswith("use_") or name.endswith("_config") or value is True:
            raise AdapterError(
                f"{quote(name)} of adapter_config.json is {quote(value)}, and this field is not known here; it may "
                f"change the numbers: {MERGE}, or remove the field if it does not matter"
            )
        logger.warning("%s of adapter_config.json is not known here, and is ignored", quote(name))


def _whole(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise AdapterError(
            f"the rank {quote(name)} in adapter_config.json must be an integer of 1 or more; got {quote(value)}"
        )
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise AdapterError(
            f"the alpha {quote(name)} in adapter_config.json must be a finite number; got {quote(value)}"
        )
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, False, True) or type(value) is int:
        raise AdapterError(f"{name} of adapter_config.json must be true or false; got {quote(value)}")
    return bool(value)


def _map(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} of adapter_config.json must be an object; got {quote(value)}")
    return value


def _names(fields: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """Returns the names of a list; None for an expression, which the names of the tensors make unnecessary."""
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise AdapterError(f"{name} of adapter_config.json must be a text or a list of texts; got {quote(value)}")
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise AdapterError(
            f"layers_to_transform of adapter_config.json must be the number of a layer, or a list of them; got "
            f"{quote(value)}"
        )
    return tuple(layers)


def _tokens(fields: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Returns the token ids of `trainable_token_indices` by the ends of the names of modules."""
    value = fields.get("trainable_token_indices") or {}
    tokens = value if isinstance(value, dict) else {"": value}
    for ids in tokens.values():
        is_list = isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids)
        if not is_list or len(set(ids)) < len(ids):
            raise AdapterError(
                "trainable_token_indices of adapter_config.json must be a list of different token ids, or such a list "
                f"for each module; got {quote(value)}"
            )
    return {end: tuple(ids) for end, ids in tokens.items()}


def _ends(module: str, names: tuple[str, ...]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)

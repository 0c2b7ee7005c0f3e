"""Random LoRA adapters in PEFT's layout, for the tiny models of `checkpoints`; they are written without peft."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["adapter_targets", "make_adapter"]

NOT_TARGETS = re.compile(r"embed|^wte$|^wpe$|^lm_head$|^score$|(^|_)gate$|^router$|norm|^kv_b_proj$")
"""Last parts of the names of modules that are no linear layers, or take no adapters here."""

IN_EXPERTS = ("gate_proj", "up_proj", "down_proj")

TRANSPOSED = ("gpt2",)
"""Types of models whose matrices are stored as `[in_features, out_features]`."""


def adapter_targets(model_folder: str | Path) -> dict[str, tuple[int, int]]:
    """Returns the names of the linear layers of a checkpoint, with rows and columns of their matrices.

    The output head and what takes no adapters, such as experts, are not among them.
    """
    matrices = _matrices(model_folder)
    # In a model with experts, PEFT takes these names for those of the experts, and leaves other modules out.
    left_out = IN_EXPERTS if any(".experts." in name for name in matrices) else ()
    return {name: shape for name, shape in matrices.items() if _is_linear(name) and not name.endswith(left_out)}


def make_adapter(
    folder: str | Path,
    model_folder: str | Path,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Writes a random adapter, whose effect is about a third of that of the model's own matrices.

    Args:
        folder: Folder of the adapter; made if absent.
        model_folder: Folder of the model, with safetensors.
        rank: Rank of the matrices (`r`), where `rank_pattern` does not say another one.
        alpha: `lora_alpha`; None for twice the rank.
        targets: Last parts of the names of modules, such as `q_proj` or `lm_head`; None for all linear layers.
        seed: Seed of the numbers.
        dtype: Number type of the file.
        **config: Further fields of `adapter_config.json`, such as `rank_pattern` or `use_rslora`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors, ranks, linear = {}, config.get("rank_pattern") or {}, adapter_targets(model_folder)
    for name, (rows, columns) in sorted(_matrices(model_folder).items()):
        is_target = name in linear if targets is None else any(f".{name}".endswith(f".{end}") for end in targets)
        if not is_target:
            continue
        own = next((ranks[key] for key in ranks if re.fullmatch(rf"(.*\.)?({key})", name)), rank)
        a = torch.randn(own, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, own, generator=generator) * 0.3 * own**-0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    used = sorted({name.split(".")[-3] for name in tensors})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder),
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "target_modules": used,
        "fan_in_fan_out": _is_transposed(model_folder),
        "bias": "none",
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def _matrices(model_folder: str | Path) -> dict[str, tuple[int, int]]:
    """Returns the module of each matrix of a checkpoint, with the rows and columns of the matrix."""
    found, transposed = {}, _is_transposed(model_folder)
    for file in sorted(Path(model_folder).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # The file is not a mapping.
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) == 2:
                    is_turned = transposed and _is_linear(name.removesuffix(".weight"))
                    found[name.removesuffix(".weight")] = tuple(shape[::-1] if is_turned else shape)
    return found


def _is_linear(name: str) -> bool:
    return ".experts." not in name and ".router." not in name and not NOT_TARGETS.search(name.rpartition(".")[2])


def _is_transposed(model_folder: str | Path) -> bool:
    return json.loads(Path(model_folder, "config.json").read_text())["model_type"] in TRANSPOSED

"""Checkpoints in AWQ and GPTQ, written from the published layouts, and the same models with dequantised matrices.

Everything is written bit by bit, so nothing here shares a formula with the code that reads it. In all layouts

    W[n, k] = (q[k, n] - z[g, n]) * s[g, n]        g = group[k], the group of input k

AWQ ("gemm" of autoawq): q in `qweight` [K, N/8], z in `qzeros` [G, N/8], eight neighbouring columns a word.
GPTQ (gptqmodel): q in `qweight` [K * bits/32, N], z in `qzeros` [G, N * bits/32], `g_idx` [K].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "AWQ_ORDER",
    "Packed",
    "awq",
    "gptq",
    "pack_awq",
    "pack_bits",
    "quantise_folder",
    "round_to_codes",
    "settings",
]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each 4 bits of a word, from the lowest bits up."""

GPTQMODEL_ONES = {
    2: [0b01010101010101010101010101010101],
    3: [0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001],
    4: [0b00010001000100010001000100010001],
    8: [0b00000001000000010000000100000001],
}
"""The numbers that gptqmodel subtracts from words of zero points when it saves version "gptq"."""

NOT_QUANTISED = ("embed", "wte", "wpe", "norm", "mlp.gate.weight", "moe.gate.weight", "shared_expert_gate")
"""Parts of names of matrices that quantisers leave alone."""


@dataclass(frozen=True)
class Packed:
    """One quantised matrix: its tensors by the last part of their names, and the numbers that they stand for."""

    tensors: dict[str, Tensor]
    weight: Tensor


Quantise = Callable[[str, Tensor], Packed | None]
"""A function from the name of a module and its matrix [N, K] to the quantised matrix; None leaves it as it is."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs the numbers of each row one after another into 32-bit words, the first one in the lowest bits."""
    each = (codes.numpy().astype(np.int64)[..., None] >> np.arange(bits)) & 1
    stream = np.packbits(each.reshape(len(codes), codes.shape[1] * bits).astype(np.uint8), axis=-1, bitorder="little")
    return torch.tensor(stream.view(np.int32), dtype=torch.int32)


def pack_awq(codes: Tensor) -> Tensor:
    """Packs rows of 4-bit numbers as AWQ does, eight neighbours a word."""
    return pack_bits(codes.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 4)


def round_to_codes(weight: Tensor, group: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q [N, K], z [N, G] and s [N, G] (float16) of a matrix by rounding to the nearest."""
    most, groups = 2**bits - 1, range(int(group.max()) + 1)
    low = torch.stack([weight[:, group == g].amin(1).clamp(max=0) for g in groups], dim=1)
    high = torch.stack([weight[:, group == g].amax(1).clamp(min=0) for g in groups], dim=1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales.float()).round().clamp(0, most)
    codes = (weight / scales.float()[:, group] + zeros[:, group]).round().clamp(0, most)
    return codes.int(), zeros.int(), scales


def dequantise(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    return (codes - zeros[:, group]).float() * scales[:, group].float()


def neighbours(num_columns: int, group_size: int) -> Tensor:
    """Returns the group of each column if groups are neighbouring columns; -1 is one group of all."""
    return torch.arange(num_columns) // (num_columns if group_size == -1 else group_size)


def awq(weight: Tensor, group_size: int = 32) -> Packed:
    """Quantises a matrix [N, K] and packs it as AWQ."""
    group = neighbours(weight.shape[1], group_size)
    codes, zeros, scales = round_to_codes(weight, group, 4, symmetric=False)
    tensors = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zeros.T), "scales": scales.T}
    return Packed(tensors, dequantise(codes, zeros, scales, group))


def gptq(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    version: str = "gptq",
    writer: str = "auto_gptq",
    seed: int = 0,
) -> Packed:
    """Quantises a matrix [N, K] and packs it as GPTQ; with `desc_act` the inputs of a group are scattered."""
    group = neighbours(weight.shape[1], group_size)
    if desc_act:
        group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))]
    codes, zeros, scales = round_to_codes(weight, group, bits, symmetric=sym)
    tensors = {
        "qweight": pack_bits(codes, bits).T,
        "qzeros": pack_zeros(zeros.T, bits, version, writer),
        "scales": scales.T,
        "g_idx": group.int(),
    }
    return Packed(tensors, dequantise(codes, zeros, scales, group))


def pack_zeros(zeros: Tensor, bits: int, version: str, writer: str) -> Tensor:
    """Packs zero points [G, N], which version "gptq" stores less one."""
    if version == "gptq_v2":
        return pack_bits(zeros, bits)
    if writer == "auto_gptq":
        return pack_bits(zeros - 1, bits)
    words = pack_bits(zeros, bits).numpy().view(np.uint32)
    ones = np.array(GPTQMODEL_ONES[bits], dtype=np.uint32)
    return torch.tensor((words - np.resize(ones, words.shape[1])).view(np.int32))


def settings(method: str, **fields: Any) -> dict[str, Any]:
    """Returns the `quantization_config` of a method, as its library writes it, with some fields of other values."""
    if method == "awq":
        common = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    else:
        common = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.1, "lm_head": False}
    return {"quant_method": method, **common, **fields}


def quantise_folder(
    plain: Path,
    out: Path,
    quantise: Quantise,
    config: Mapping[str, Any] | None,
    *,
    file: str = "config.json",
    head: bool = False,
    transposed: bool = False,
) -> tuple[Path, Path]:
    """Writes a quantised copy of a checkpoint, and a copy that has the same numbers in its plain matrices.

    Args:
        plain: A checkpoint of one file.
        out: Folder for both copies.
        quantise: Quantises one matrix. It is asked about all whose sizes are multiples of 32, except embeddings and
            routers.
        config: The settings to write; None for none.
        file: The file of the settings.
        head: Whether the output head is quantised too.
        transposed: Whether the plain checkpoint has its matrices as [K, N].

    Returns:
        The quantised copy and the plain copy.
    """
    quantised, same = out / "quantised", out / "plain"
    for folder in (quantised, same):
        shutil.copytree(plain, folder)
    packed, numbers = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        packed[name] = numbers[name] = tensor
        module = name.removesuffix(".weight")
        left_alone = any(part in name for part in (*NOT_QUANTISED, *(() if head else ("lm_head",))))
        if module == name or tensor.dim() != 2 or any(size % 32 for size in tensor.shape) or left_alone:
            continue
        found = quantise(module, tensor.T if transposed else tensor)
        if found is not None:
            del packed[name]
            packed |= {f"{module}.{leaf}": each for leaf, each in found.tensors.items()}
            numbers[name] = found.weight.T if transposed else found.weight
    for folder, tensors in ((quantised, packed), (same, numbers)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None and file == "config.json":
        fields = json.loads((quantised / file).read_text())
        (quantised / file).write_text(json.dumps({**fields, "quantization_config": config}))
    elif config is not None:
        (quantised / file).write_text(json.dumps(config))
    return quantised, same

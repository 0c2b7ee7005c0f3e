"""`scan_tensors`: reads all tensors of a checkpoint, and finds those that are damaged, unusual, or not as they were."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from ..storage import Location
from ..weights.checkpoint import StoredTensor, iter_tensors

__all__ = ["TensorFacts", "changed_tensors", "damaged_tensors", "scan_tensors", "unusual_tensors"]

MIN_LAYERS = 4
"""Fewest layers of a model of which one can stand out."""

OUTLIER_RATIO = 4.0
"""A matrix is unusual if its root mean square differs by this factor from the median of its layers, and by far more
than those differ among each other."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What the check keeps of one tensor.

    Attributes:
        digest: Hash of the number type, the shape and all numbers.
        is_finite: Whether no number is NaN or infinite.
        is_constant: Whether all numbers are equal and there are at least two dimensions.
        rms: Root mean square of the numbers.
    """

    digest: str
    is_finite: bool
    is_constant: bool
    rms: float


def scan_tensors(place: Location) -> Iterable[tuple[str, TensorFacts]]:
    """Yields the facts of each tensor of a checkpoint as `(name, facts)`, one tensor in memory at a time.

    Args:
        place: The model folder.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    for name, tensor in iter_tensors(place):
        yield name, _facts(_read(tensor))


def damaged_tensors(facts: Mapping[str, TensorFacts]) -> list[str]:
    """Returns a sentence for each tensor with numbers that no trained model has: NaN, infinity, or one number only."""
    sentences = []
    for name, of in facts.items():
        if not of.is_finite:
            sentences.append(f"{name} holds NaN or infinity")
        elif of.is_constant:
            sentences.append(f"{name} holds one number everywhere")
    return sentences


def unusual_tensors(facts: Mapping[str, TensorFacts]) -> list[str]:
    """Returns a sentence for each tensor whose size is far from that of the same tensor in other layers."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name, of in facts.items():
        if re.search(r"\.\d+\.", name) and of.is_finite and of.rms > 0:
            layers[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    return [sentence for names in layers.values() for sentence in _outliers(names, facts)]


def changed_tensors(facts: Mapping[str, TensorFacts], earlier: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each tensor that differs from an earlier reading.

    Args:
        facts: The facts by name.
        earlier: The digests of the earlier reading by name.
    """
    sentences = [
        f"{name} has other numbers" for name in facts if earlier.get(name, facts[name].digest) != facts[name].digest
    ]
    sentences += [f"{name} is new" for name in facts if name not in earlier]
    return sentences + [f"{name} is gone" for name in earlier if name not in facts]


def _read(tensor: StoredTensor) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.read()


def _facts(tensor: Tensor) -> TensorFacts:
    plain = tensor.contiguous()
    digest = blake2b(f"{plain.dtype} {list(plain.shape)}".encode(), digest_size=16)
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    numbers = plain.reshape(-1).float() if plain.is_floating_point() else None
    if numbers is None or not numbers.numel():
        return TensorFacts(digest.hexdigest(), True, False, 0.0)
    low, high = (limit.item() for limit in numbers.aminmax())
    is_finite = math.isfinite(low) and math.isfinite(high)
    rms = numbers.norm().item() * numbers.numel() ** -0.5 if is_finite else math.nan
    return TensorFacts(digest.hexdigest(), is_finite, plain.dim() > 1 and numbers.numel() > 1 and low == high, rms)


def _outliers(names: Sequence[str], facts: Mapping[str, TensorFacts]) -> list[str]:
    if len(names) < MIN_LAYERS:
        return []
    logs = [math.log(facts[name].rms) for name in names]
    middle = statistics.median(logs)
    spread = statistics.median(abs(one - middle) for one in logs)
    limit = max(math.log(OUTLIER_RATIO), 8 * spread)
    return [
        f"{name} has a root mean square of {facts[name].rms:.3g}, and the other layers about {math.exp(middle):.3g}"
        for name, one in zip(names, logs, strict=True)
        if abs(one - middle) > limit
    ]

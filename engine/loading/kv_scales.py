"""`prepare_kv_scales`: chooses the scales of an 8-bit KV cache from a few prompts, and checks those of the checkpoint.

The keys of a model lie in its weights, and their size hardly depends on the text: it comes from biases, from norms, and
from single dimensions that are large for every token. So fixed token ids find it as well as text does, and need no
tokenizer. What does depend on tokens is where the largest numbers are found: at the first position, at special tokens,
and where tokens repeat. The prompts are chosen for these, and `MARGIN` is for the rest.

The model runs as in a step of the engine, layer after layer. Each layer gets its scales just before it stores keys and
values for the first time, so the run needs no cache in 16 bits. All ranks run it together, and each has the scales of
its own heads. The prompts are the same at every start, so the scales are, and the tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import ForwardBatch
from ..device import Device
from ..errors import CheckpointError, ConfigError
from ..kv_cache.layout import allocate_kv_cache
from ..kv_cache.states import allocate_states
from ..layers import Attention, CacheWriter
from ..layers.kv_scales import LARGEST
from ..models.decoder import Decoder
from ..models.pp_stages import cache_groups, cache_shape, state_shape
from ..models.spec import DecoderSpec

__all__ = ["choose_kv_dtype", "prepare_kv_scales"]

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 128
"""Tokens of each prompt."""

KINDS = ("keys", "values")


EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Values of the setting `kv_cache_dtype` -> number types of 8 bits."""


def choose_kv_dtype(kv_cache_dtype: str, dtype: torch.dtype, spec: DecoderSpec, device: Device) -> torch.dtype:
    """Returns the number type of the KV cache.

    Args:
        kv_cache_dtype: The setting: `"fp8"`, `"int8"`, or `"auto"` for the type of the model.
        dtype: Number type of the model.
        spec: Description of the model.
        device: Device of the model.

    Raises:
        ConfigError: The setting asks for 8 bits, and the model keeps latents, for which there are no scales; or for
            integers on a GPU.
    """
    if kv_cache_dtype not in EIGHT_BITS:
        return dtype
    if spec.latent is not None:
        raise ConfigError(
            f"kv_cache_dtype={kv_cache_dtype!r} is not supported for models whose keys and values are made of latents "
            "yet; leave it out: their KV cache is small already"
        )
    if kv_cache_dtype == "int8" and not device.is_cpu:
        raise ConfigError("kv_cache_dtype='int8' is for CPUs, and this engine runs on a GPU; use kv_cache_dtype='fp8'")
    return EIGHT_BITS[kv_cache_dtype]


@torch.inference_mode()
def prepare_kv_scales(
    model: Decoder, hf_config: Any, *, device: torch.device, block_size: int, kv_dtype: torch.dtype
) -> None:
    """Sets the scales of an 8-bit KV cache that the checkpoint has not given, and warns of those that do not fit.

    Nothing is done for another cache, except for a warning if the checkpoint has scales.

    Args:
        model: This rank's part of the model, with its weights loaded. Each rank must call the function.
        hf_config: The transformers config of the model, which names special tokens.
        device: Device of the model.
        block_size: Tokens per KV cache block.
        kv_dtype: Number type of the KV cache.

    Raises:
        CheckpointError: The checkpoint has a scale that is not a positive number.
        ConfigError: The cache is of 8 bits, and the model has no attention layers of ours.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if kv_dtype != torch.float8_e4m3fn:
        _warn_of_unused(layers, kv_dtype)
    if kv_dtype not in LARGEST:
        return
    if kv_dtype == torch.int8:
        for layer in layers.values():
            layer.kv_scales.forget_given()
    if not layers:
        raise ConfigError(
            "a kv_cache_dtype of 8 bits needs a model of a family that Millrace has, and this one runs as a module of "
            "transformers; drop it"
        )
    _check_given(layers)
    batch = _make_batch(model, _prompts(model, hf_config), block_size, device)
    peaks: dict[str, Tensor] = {}
    hooks = [
        layer.rotate_and_store.register_forward_pre_hook(
            functools.partial(_choose_scales, layer, peaks, name, kv_dtype)
        )
        for name, layer in layers.items()
    ]
    num_blocks = sum(tables.numel() for tables in batch.block_tables)
    shape, states = cache_shape(model.spec, model.parallel), state_shape(model.spec, model.parallel)
    kv_cache = allocate_kv_cache(shape, num_blocks, block_size, dtype=kv_dtype, device=device)
    try:
        model(batch, kv_cache + allocate_states(states, len(batch.rows), dtype=model.dtype, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    _warn_of_large(layers, peaks, LARGEST[kv_dtype])


def _choose_scales(
    layer: Attention,
    peaks: dict[str, Tensor],
    name: str,
    kv_dtype: torch.dtype,
    module: CacheWriter,
    arguments: tuple[Tensor, ...],
) -> None:
    """Chooses the scales of a layer from the arguments of its `rotate_and_store`, and keeps the peaks of its heads."""
    _, key, value, *_, positions = arguments
    peaks[name] = module.stored_peaks(key, value, positions)
    layer.kv_scales.choose(peaks[name], kv_dtype)


def _prompts(model: Decoder, hf_config: Any) -> Tensor:
    """Returns prompts `[num_prompts, length]` of fixed token ids, which begin with the model's first special token.

    They are tokens from all over the vocabulary; the special tokens that the config names, with the tokens at both ends
    of the vocabulary, where others are; and one token again and again.
    """
    spec = model.spec
    length = min(PROMPT_TOKENS, spec.max_position_embeddings)
    special = _special_tokens(hf_config, spec.vocab_size)
    spread = torch.arange(length) * spec.vocab_size // length
    half = torch.arange(length) // 2
    ends = torch.where(torch.arange(length) % 2 == 0, half, spec.vocab_size - 1 - half).clamp(0, spec.vocab_size - 1)
    ends[: len(special)] = torch.tensor(special[:length], dtype=torch.int64)
    prompts = torch.stack((spread, ends, spread[length // 2].expand(length)))
    if special:
        prompts[:, 0] = special[0]
    return prompts


def _special_tokens(hf_config: Any, vocab_size: int) -> list[int]:
    """Returns the ids of the special tokens that a config names, the one that begins a text first."""
    ids: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(hf_config, name, None)
        ids += value if isinstance(value, Sequence) else [] if value is None else [value]
    return [token_id for token_id in dict.fromkeys(ids) if 0 <= token_id < vocab_size]


def _make_batch(model: Decoder, prompts: Tensor, block_size: int, device: torch.device) -> ForwardBatch:
    """Makes the batch of whole prompts of equal length; each group of layers has blocks of its own."""
    num_prompts, length = prompts.shape
    num_groups, num_blocks = len(cache_groups(model.spec)), -(-length // block_size)
    tables = torch.arange(num_groups * num_prompts * num_blocks, dtype=torch.int32, device=device)
    tables = tables.view(num_groups, num_prompts, num_blocks)
    positions = torch.arange(length, device=device)
    slots = tables[..., positions // block_size].long() * block_size + positions % block_size
    counts = torch.arange(num_prompts + 1, dtype=torch.int32, device=device)
    return ForwardBatch(
        token_ids=prompts.flatten().to(device),
        positions=positions.repeat(num_prompts),
        slot_mappings=slots.flatten(1).unbind(),
        query_start_loc=counts * length,
        seq_lens=torch.full((num_prompts,), length, dtype=torch.int32, device=device),
        block_tables=tables.unbind(),
        rows=counts[:-1],
    )


def _check_given(layers: dict[str, Attention]) -> None:
    """Raises `CheckpointError` if a scale of the checkpoint is 0, negative, infinite or NaN."""
    for name, layer in layers.items():
        table = layer.kv_scales.table
        if not bool(((table > 0) & table.isfinite()).all()):
            raise CheckpointError(
                f"the checkpoint's k_scale or v_scale of {name} is not a positive number: {table.tolist()}; remove "
                "the scales from the checkpoint, or drop kv_cache_dtype='fp8'"
            )


def _warn_of_unused(layers: dict[str, Attention], kv_dtype: torch.dtype) -> None:
    """Logs a warning if the checkpoint has scales for a cache that has none."""
    given = [name for name, layer in layers.items() if bool(layer.kv_scales.is_given.any())]
    if given:
        logger.warning(
            "the checkpoint's scales of an 8-bit KV cache, of %s and %d more layers, are not used: the cache is in %s; "
            "kv_cache_dtype='fp8' uses them",
            given[0],
            len(given) - 1,
            str(kv_dtype).removeprefix("torch."),
        )


def _warn_of_large(layers: dict[str, Attention], peaks: dict[str, Tensor], largest_stored: float) -> None:
    """Logs a warning if keys or values of the prompts are larger than the scales of a layer allow, or not finite."""
    ratios = torch.stack([peaks[name] / layers[name].kv_scales.table for name in peaks]).amax(-1).cpu()
    for kind, largest in zip(KINDS, ratios.unbind(1), strict=True):
        names = [name for name, ratio in zip(peaks, largest.tolist(), strict=True) if not ratio <= largest_stored]
        if names:
            logger.warning(
                "%s of %s and %d more layers are clamped in the 8-bit KV cache, because their scales are too small, so "
                "outputs may be wrong; give larger scales in the checkpoint, or drop kv_cache_dtype",
                kind,
                names[0],
                len(names) - 1,
            )

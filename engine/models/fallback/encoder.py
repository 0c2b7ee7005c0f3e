"""`encoder_family`: the family of an encoder that runs as a module of transformers, whose texts it computes whole.

Such a module sees each text as transformers would see it: alone, or beside texts of the same length, without padding.
So it may do between tokens whatever it likes: convolve them, hash them, count positions by itself. A module of which a
trial shows that only its attention looks at other tokens runs all texts of a step in one row. Classifiers keep their
own heads: the vectors of such a model are the logits.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import ForwardBatch, KVCache
from ...errors import ConfigError, UnsupportedModelError
from ...parallel.context import ParallelContext
from ..decoder import Decoder
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import positive_int
from ..options import ModelOptions
from ..spec import AttentionSpec, DecoderSpec, HeadSpec
from .build import META, build_module, materialise
from .model import drop_head
from .text_row import TextRow, first_position
from .weights import ModuleWeights, declare_slots

__all__ = ["TransformersEncoder", "encoder_family"]

logger = logging.getLogger(__name__)

POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Fields of configs that hold the number of positions for which a model was made."""

LENGTHS = (1, 5)
"""Numbers of tokens of the texts with which a loaded module is tried."""


def encoder_family(module_class: Any, hf_config: Any) -> Family:
    """Returns the family of one encoder that runs as a module of transformers.

    Args:
        module_class: Class of the module: a body alone, or one with the head of a classifier or of the training.
        hf_config: The transformers config of the model.

    Raises:
        UnsupportedModelError: The module cannot be made, or its config does not say its sizes.
    """
    name, config = module_class.__name__, hf_config.get_text_config()
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} of transformers has an encoder and a decoder, which do not run here")
    module = _make_module(module_class, hf_config, torch.float32, META)
    weights = _weights(module, classifies=_classifies(name))
    spec = _spec(config, module, positive_int(hf_config, "num_labels") if _classifies(name) else None)
    build = functools.partial(TransformersEncoder, module_class=module_class, hf_config=hf_config)
    heads = {CLASSIFIER: HeadSpec("CLS"), TOKEN_CLASSIFIER: HeadSpec()}
    return Family((name,), lambda _: spec, weights, build, heads)


def _classifies(name: str) -> bool:
    return name.endswith((CLASSIFIER, TOKEN_CLASSIFIER))


def _make_module(module_class: Any, hf_config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Makes a module without content; that of a model without a classifier ends with its hidden states."""
    attention = "sdpa" if getattr(module_class, "_supports_sdpa", False) else "eager"
    module: Any = build_module(module_class, hf_config, dtype, attention)
    if not _classifies(module_class.__name__):
        drop_head(module)
        if "add_pooling_layer" in inspect.signature(type(module.base_model).__init__).parameters:
            module.base_model.pooler = None
    materialise(module, dtype, device)
    declare_slots(module)
    return module


def _weights(module: Any, *, classifies: bool) -> ModuleWeights:
    """Returns the names of the weights. Models without a classifier leave the head of the training out."""
    weights, prefix = ModuleWeights.of(module, module.base_model), f"{module.base_model_prefix}."
    unused = [] if classifies else [r"(^|\.)pooler\."]
    if not classifies and module is not module.base_model:
        unused.append(f"^(?!{re.escape(prefix)})")
    patterns = (*weights.ignored_patterns, *map(re.compile, unused))
    return replace(weights, base_prefix=prefix, ignored_patterns=patterns)


def _spec(config: Any, module: Any, num_labels: int | None) -> DecoderSpec:
    """Returns what the engine needs to know of a model; the fields of which only a `Decoder` is made are neutral."""
    hidden_size = positive_int(config, "hidden_size")
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=hidden_size,
        max_position_embeddings=_num_positions(config, module),
        windows=(0,),
        attention=AttentionSpec(causal=False),
        embedding_size=num_labels or hidden_size,
        tie_word_embeddings=False,
        rms_norm=True,
        norm_eps=0.0,
        gated_mlp=True,
        activation="",
    )


def _num_positions(config: Any, module: nn.Module) -> int:
    """Returns the number of positions for which a model was made."""
    name = next((name for name in POSITION_FIELDS if getattr(config, name, None) is not None), POSITION_FIELDS[0])
    num_positions, first = positive_int(config, name), first_position(module)
    if num_positions <= first:
        raise UnsupportedModelError(
            f"config field {name!r} is {num_positions}; it must be more than {first}, the position of the first token"
        )
    return num_positions - first


class TransformersEncoder(Decoder):
    """An encoder that transformers computes, and whose layers keep nothing.

    Args:
        spec: Description of the model, as far as the engine needs it.
        module_class: Class of the module.
        hf_config: The transformers config.
        dtype: Number type of weights and hidden states.
        device: Device of the weights. Their memory is not initialised: `fill_slots` fills it.
        options: The user's options for the model.
        parallel: The place of this rank among all ranks.

    Raises:
        ConfigError: An option needs a model of our own.
        UnsupportedModelError: The module cannot be made.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        module_class: Any,
        hf_config: Any,
        dtype: torch.dtype,
        device: torch.device,
        options: ModelOptions,
        parallel: ParallelContext,
    ) -> None:
        nn.Module.__init__(self)
        _check(module_class.__name__, options, parallel)
        self.spec, self.parallel, self.adapters = spec, parallel, None
        self.columns = parallel.shard(spec.vocab_size)
        self.dtype, self._device = dtype, device
        self._deterministic = options.deterministic
        # Without that id, classifiers of decoders do not know the last token of several texts.
        self._runs_alone = options.deterministic or getattr(hf_config, "pad_token_id", None) is None
        module = _make_module(module_class, hf_config, dtype, device)
        self._row: TextRow | None = None
        for name, part in module.named_children():
            self.add_module(name, part)
        # In a tuple these are no submodules, so that each weight has one name: the one that it has in the module.
        self._transformers = (module, module if _classifies(module_class.__name__) else module.base_model)
        self._takes_types = "token_type_ids" in inspect.signature(self._transformers[1].forward).parameters

    def pack(self) -> None:
        """As `Decoder.pack`; then checks that the module returns a vector for each token.

        Raises:
            UnsupportedModelError: It does not, or its forward pass fails.
        """
        super().pack()
        for length in LENGTHS:
            self._check_text(min(length, self.spec.max_position_embeddings))
        module, runs = self._transformers
        if not self._deterministic and not type(module).__name__.endswith(CLASSIFIER):
            self._row = TextRow.attempt(runs, self.spec.vocab_size, self.dtype, self._device)
        how = "one by one" if self._row is None else "in one row"
        logger.info("the texts of a step run through %s %s", type(module).__name__, how)

    @torch.inference_mode()
    def _check_text(self, length: int) -> None:
        """Raises if a text of this length gives no vector for each token."""
        tokens = (torch.arange(1, length + 1, device=self._device) * 7919) % self.spec.vocab_size
        name, size = type(self._transformers[0]).__name__, self.spec.output_size
        try:
            found = self._run(tokens[None], None)
        except Exception as error:  # A forward pass raises anything.
            raise UnsupportedModelError(
                f"{name} of transformers cannot run here: its forward pass fails on a text of {length} tokens "
                f"({error!r:.200}); check that the fields of config.json fit each other"
            ) from error
        if found.shape != (1, length, size):
            raise UnsupportedModelError(
                f"{name} of transformers cannot run here: of {length} tokens it makes a result of shape "
                f"{list(found.shape)}, not [1, {length}, {size}]"
            )

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """As `Decoder.forward`: returns the last hidden states, `[num_tokens, hidden_size]`.

        Those of a classifier are its logits, `[num_tokens, num_labels]`: those of a text are the same for all tokens.
        """
        if batch.given is not None:
            raise UnsupportedModelError(
                f"{type(self._transformers[0]).__name__} runs as a module of transformers, text by text, and takes no "
                "embeddings in place of tokens; give token ids or text"
            )
        if self._row is not None:
            return self._row.run(batch)
        size = (len(batch.token_ids), self.spec.output_size)
        vectors = torch.zeros(size, dtype=self.dtype, device=self._device)
        for rows in self._iter_equal(batch.query_start_loc.tolist()):
            types = None if batch.token_types is None else batch.token_types[rows]
            vectors[rows] = self._run(batch.token_ids[rows], types)
        return vectors

    def compute_class_logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.compute_class_logits`; the vectors are logits already."""
        return hidden.float()

    def _iter_equal(self, starts: list[int]) -> Iterator[Tensor]:
        """Yields the tokens' indices of texts of the same length, `[num_texts, num_tokens]` int64."""
        by_length: dict[tuple[int, int], list[int]] = {}
        for start, end in pairwise(starts):
            by_length.setdefault((end - start, start if self._runs_alone else 0), []).append(start)
        for (length, _), firsts in by_length.items():
            if length:
                first = torch.tensor(firsts, device=self._device)
                yield first[:, None] + torch.arange(length, device=self._device)

    def _run(self, token_ids: Tensor, token_types: Tensor | None) -> Tensor:
        """Runs texts of the same length, `[num_texts, num_tokens]`; returns the vectors of their tokens."""
        module, runs = self._transformers
        more = {"token_type_ids": token_types} if self._takes_types and token_types is not None else {}
        outputs = runs(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **more)
        if not _classifies(type(module).__name__):
            return outputs[0]
        logits: Tensor = outputs.logits
        return logits if logits.dim() == 3 else logits[:, None].expand(-1, token_ids.shape[1], -1)


def _check(name: str, options: ModelOptions, parallel: ParallelContext) -> None:
    """Raises `ConfigError` if an option needs a model of our own."""
    asked = {
        "quantization": options.quantization is not None or options.stored is not None,
        "adapters": options.adapter_slots is not None,
        "tensor_parallel_size or pipeline_parallel_size above 1": parallel.num_ranks > 1,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{name} runs as a module of transformers, text by text, without {option}; drop it, or use a model "
                "of a family that Millrace has"
            )

"""The families of BERT (Devlin et al., 2018, arXiv:1810.04805) and RoBERTa: `bert_spec`, `roberta_spec`.

What other encoders have in common with BERT is here too: `encoder_fields` of their configs, `encoder_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import flag, one_of, positive_float, positive_int, whole_heads
from ..spec import AttentionSpec, DecoderSpec, HeadSpec

__all__ = [
    "BLOCK",
    "EMBEDDINGS",
    "FAMILIES",
    "HEADS",
    "POOLED",
    "after_padding",
    "bert_spec",
    "encoder_fields",
    "encoder_weights",
    "roberta_spec",
]

BLOCK = {
    "encoder.layer.*.attention.self.query": "layers.*.attention.qkv.query",
    "encoder.layer.*.attention.self.key": "layers.*.attention.qkv.key",
    "encoder.layer.*.attention.self.value": "layers.*.attention.qkv.value",
    "encoder.layer.*.attention.output.dense": "layers.*.attention.out",
    "encoder.layer.*.attention.output.LayerNorm": "layers.*.attention_norm",
    "encoder.layer.*.intermediate.dense": "layers.*.mlp.up",
    "encoder.layer.*.output.dense": "layers.*.mlp.down",
    "encoder.layer.*.output.LayerNorm": "layers.*.mlp_norm",
}
"""Names of the layers of BERT and its kin -> ours."""

EMBEDDINGS = {
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "embedding_norm",
}
"""Names of the embeddings of BERT and its kin -> ours."""


ERNIE_MODULES = {**EMBEDDINGS, **BLOCK, "embeddings.task_type_embeddings": "tasks"}
"""Names of the modules of ERNIE -> ours."""

POOLED = {"pooler.dense": "score.dense", "classifier": "score.out"}
"""Names of the two layers of a head whose first one is the pooler -> ours."""

IN_CLASSIFIER = {"classifier.dense": "score.dense", "classifier.out_proj": "score.out"}
"""Names of the two layers of a head that has both -> ours."""

UNUSED = frozenset({"pooler", "pooler.dense", "embeddings.position_ids", "embeddings.token_type_ids"})
"""Modules and tensors that checkpoints may have without a use for them."""

OLDER_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Ends of the names of tensors in checkpoints from before PyTorch had layer norms -> their ends today."""


def encoder_weights(
    *prefixes: str,
    modules: Mapping[str, str] = MappingProxyType(EMBEDDINGS | BLOCK),
    head: Mapping[str, str] = MappingProxyType(IN_CLASSIFIER),
    training_heads: tuple[str, ...] = ("cls.", "lm_head."),
    numbered_parts: tuple[str, ...] = (),
) -> Callable[[DecoderSpec], WeightMap]:
    """Returns the function that makes the map of the weights of BERT or its kin.

    Args:
        *prefixes: Prefixes of names in checkpoints of models with a head.
        modules: Names of the modules of the encoder -> ours.
        head: Names of the layers of a head with two layers -> ours. A head of one layer is `classifier`.
        training_heads: As `WeightMap.unused_heads`.
        numbered_parts: As in `WeightMap`.
    """

    def weights(spec: DecoderSpec) -> WeightMap:
        used = {**modules, **(head if spec.class_head.activation else {"classifier": "score"})}
        older = {f"{their}.{leaf}": f"{our}.{leaf}" for their, our in used.items() for leaf in ("weight", "bias")}
        return WeightMap(
            prefixes=prefixes,
            modules=used,
            ignored=tuple(UNUSED - used.keys()),
            unused_heads=training_heads,
            numbered_parts=numbered_parts,
            tensors={
                their.replace(new, old): our
                for their, our in older.items()
                for old, new in OLDER_NAMES.items()
                if their.endswith(new)
            },
        )

    return weights


def encoder_fields(
    config: Any,
    *,
    intermediate_size: str = "intermediate_size",
    activation: str = "hidden_act",
    norm_eps: float | None = None,
) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields that are read alike for BERT and its kin: norms after sublayers, biases.

    Args:
        config: A transformers config.
        intermediate_size: Name of the field with the width inside the feed-forward networks.
        activation: Name of the field with the activation.
        norm_eps: Number that norms add to the variance; None for that of the field `layer_norm_eps`.
    """
    heads, num_layers = whole_heads(config), positive_int(config, "num_hidden_layers")
    return {
        **heads,
        "vocab_size": positive_int(config, "vocab_size"),
        "intermediate_size": positive_int(config, intermediate_size),
        "num_layers": num_layers,
        "num_kv_heads": heads["num_heads"],
        "max_position_embeddings": positive_int(config, "max_position_embeddings"),
        "windows": (0,) * num_layers,
        "attention": AttentionSpec(causal=False),
        "embedding_size": heads["hidden_size"],
        "embedding_norm": True,
        "tie_word_embeddings": False,
        "rms_norm": False,
        "norm_eps": norm_eps or positive_float(config, "layer_norm_eps", most=1.0),
        "norm_placement": "after",
        "final_norm": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "activation": one_of(config, activation, tuple(ACTIVATIONS)),
    }


def bert_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `BertConfig`: positions from 0, and two types of tokens."""
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        raise UnsupportedModelError(f"config field 'position_embedding_type' is {quote(kind)}; only 'absolute' is done")
    if flag(config, "is_decoder", False):
        raise UnsupportedModelError("config field 'is_decoder' is true: of BERT and its kin only the encoder is there")
    return DecoderSpec(
        **encoder_fields(config), position_offset=0, num_token_types=positive_int(config, "type_vocab_size")
    )


def ernie_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `ErnieConfig`: as BERT, and in some models with vectors of tasks."""
    has_tasks = flag(config, "use_task_id", False)
    return replace(bert_spec(config), num_tasks=positive_int(config, "task_type_vocab_size") if has_tasks else 0)


def roberta_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `RobertaConfig`: as BERT, with positions that begin after the id of the padding token."""
    pad_token_id = getattr(config, "pad_token_id", None)
    if type(pad_token_id) is not int or pad_token_id < 0:
        raise UnsupportedModelError(
            f"config field 'pad_token_id' is {quote(pad_token_id)}; it must be an integer of at least 0"
        )
    return after_padding(bert_spec(config), pad_token_id)


def after_padding(spec: DecoderSpec, pad_token_id: int) -> DecoderSpec:
    """Returns a spec whose positions begin after the id of the padding token, in a table of as many rows."""
    offset, num_rows = pad_token_id + 1, spec.max_position_embeddings
    if num_rows <= offset:
        raise UnsupportedModelError(
            f"config field 'max_position_embeddings' is {num_rows}; with pad_token_id={pad_token_id} it must be more "
            f"than {offset}"
        )
    return replace(spec, max_position_embeddings=num_rows - offset, position_offset=offset)


HEADS = {CLASSIFIER: HeadSpec("CLS", "tanh", bias=True), TOKEN_CLASSIFIER: HeadSpec(bias=True)}

FAMILIES = (
    Family(("BertModel",), bert_spec, encoder_weights("bert.", head=POOLED), heads=HEADS),
    Family(("ErnieModel",), ernie_spec, encoder_weights("ernie.", modules=ERNIE_MODULES, head=POOLED), heads=HEADS),
    Family(
        ("RobertaModel", "XLMRobertaModel", "CamembertModel", "Data2VecTextModel"),
        roberta_spec,
        encoder_weights("roberta.", "data2vec_text."),
        heads=HEADS,
    ),
)

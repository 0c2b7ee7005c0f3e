"""Families of BERT with rotary positions: NomicBERT, GTE and Jina Embeddings 3, and Jina's BERT with ALiBi.

Their papers are arXiv:2402.01613, 2407.19669, 2409.10173 and 2310.19923. All norm the sum of each sublayer's input and
output. The hub has older configs of NomicBERT, whose fields have other names than those of transformers, and of GTE,
whose model type is `new`; both forms are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from ...errors import UnsupportedModelError, quote
from ...layers import GATES
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..alibi import alibi_slopes
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import flag, is_positive_number, one_of, positive_float, positive_int, whole_heads
from ..rope import plain_rope, rope_max_positions, rope_spec
from ..spec import AttentionSpec, DecoderSpec, HeadSpec, RopeSpec
from .bert import BLOCK, EMBEDDINGS, encoder_fields

__all__ = ["FAMILIES", "gte_spec", "jina_alibi_spec", "jina_spec", "nomic_spec"]

POOLED = {"pooler.dense": "score.dense", "classifier": "score.out"}
"""Names of the layers of a head that reads the pooled first token -> ours."""

ROBERTA_HEAD = {"classifier.dense": "score.dense", "classifier.out_proj": "score.out"}

TRAINING_HEADS = (
    *("cls.predictions", "cls.predictions.decoder", "cls.predictions.transform.dense"),
    *("cls.predictions.transform.layer_norm", "cls.predictions.transform.LayerNorm", "cls.seq_relationship"),
    *("lm_head", "lm_head.decoder", "lm_head.dense", "lm_head.norm", "lm_head.layer_norm"),
)
"""Modules of the heads of the training, which nothing uses."""

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids", "encoder.layers.*.attn.rotary_emb")

FLASH_BLOCK = {
    "emb_ln": "embedding_norm",
    "encoder.layers.*.norm1": "layers.*.attention_norm",
    "encoder.layers.*.norm2": "layers.*.mlp_norm",
    "encoder.layers.*.mlp.fc2": "layers.*.mlp.down",
}
"""Names that NomicBERT and Jina Embeddings 3 share -> ours."""

NOMIC_BLOCK = {
    **FLASH_BLOCK,
    "encoder.layers.*.attn.Wqkv": "layers.*.attention.qkv",
    "encoder.layers.*.attn.out_proj": "layers.*.attention.out",
    "encoder.layers.*.mlp.fc11": "layers.*.mlp.gate_up.up",
    "encoder.layers.*.mlp.fc12": "layers.*.mlp.gate_up.gate",
    "encoder.layers.*.mlp.fc1": "layers.*.mlp.up",
}

JINA_BLOCK = {
    **FLASH_BLOCK,
    "encoder.layers.*.mixer.Wqkv": "layers.*.attention.qkv",
    "encoder.layers.*.mixer.out_proj": "layers.*.attention.out",
    "encoder.layers.*.mlp.fc1": "layers.*.mlp.up",
}

GTE_BLOCK = {
    "encoder.layer.*.attention.qkv_proj": "layers.*.attention.qkv",
    "encoder.layer.*.attention.q_proj": "layers.*.attention.qkv.query",
    "encoder.layer.*.attention.k_proj": "layers.*.attention.qkv.key",
    "encoder.layer.*.attention.v_proj": "layers.*.attention.qkv.value",
    "encoder.layer.*.attention.o_proj": "layers.*.attention.out",
    "encoder.layer.*.attn_ln": "layers.*.attention_norm",
    "encoder.layer.*.mlp.up_gate_proj": "layers.*.mlp.gate_up",
    "encoder.layer.*.mlp.down_proj": "layers.*.mlp.down",
    "encoder.layer.*.mlp_ln": "layers.*.mlp_norm",
}

JINA_ALIBI_BLOCK = {
    **BLOCK,
    "encoder.layer.*.mlp.gated_layers": "layers.*.mlp.gate_up",
    "encoder.layer.*.mlp.wo": "layers.*.mlp.down",
    "encoder.layer.*.mlp.layernorm": "layers.*.mlp_norm",
}

LAYOUTS = {
    "encoder.layers.*.attn.Wqkv": TensorLayout(("query", "key", "value")),
    "encoder.layers.*.mixer.Wqkv": TensorLayout(("query", "key", "value")),
    "encoder.layer.*.attention.qkv_proj": TensorLayout(("query", "key", "value")),
    "encoder.layer.*.mlp.up_gate_proj": TensorLayout(("up", "gate")),
    "encoder.layer.*.mlp.gated_layers": TensorLayout(("gate", "up")),
}

NOMIC_FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""Sizes in the older configs of NomicBERT -> fields of transformers, whose class gives them its own defaults."""

NOMIC_FIXED = {
    "causal": False,
    "moe_every_n_layers": 0,
    "parallel_block": False,
    "prenorm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_rms_norm": False,
}
GTE_FIXED = {"layer_norm_type": "layer_norm", "logn_attention_scale": False, "position_embedding_type": "rope"}
JINA_ALIBI_FIXED = {"is_decoder": False, "position_embedding_type": "alibi"}
"""Fields of older configs -> the only value that is implemented, which null and absence mean too."""

NOMIC_GATES, JINA_GATES = {"swiglu": "silu", "geglu": "gelu"}, {"geglu": "gelu"}
"""Names of networks with a gate in older configs -> keys of `GATES`."""


def nomic_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `NomicBertConfig`: projections without biases, and gated networks.

    The older form has flags for the biases, and its networks may have no gate.
    """
    if getattr(config, "n_embd", None) is not None:
        return _older_nomic_spec(config)
    gated = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False, **_gated_fields(config)}
    return _spec(config, **_rope_fields(config), **gated)


def _older_nomic_spec(config: Any) -> DecoderSpec:
    _check_fixed(config, NOMIC_FIXED)
    sizes = {newer: positive_int(config, older) for older, newer in NOMIC_FIELDS.items()}
    eps = positive_float(config, "layer_norm_epsilon", most=1.0)
    config = SimpleNamespace(**{**vars(config), **sizes, "layer_norm_eps": eps})
    name, bias = one_of(config, "activation_function", ("gelu", *NOMIC_GATES)), flag(config, "qkv_proj_bias", True)
    spec = _spec(
        config,
        gated_mlp=name in NOMIC_GATES,
        activation=NOMIC_GATES.get(name, name),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=flag(config, "mlp_fc1_bias", True),
        mlp_down_bias=flag(config, "mlp_fc2_bias", True),
    )
    positive_float(config, "rotary_emb_fraction")  # Without this field, positions are learned.
    rope = plain_rope(_head_dim(config), positive_float(config, "rotary_emb_base"))
    return replace(spec, rope=rope, max_position_embeddings=_nomic_positions(config))


def _nomic_positions(config: Any) -> int:
    """Returns the number of positions; those behind the trained ones would change the rotation of all of a text."""
    if getattr(config, "rotary_scaling_factor", None) is None:
        return positive_int(config, "max_position_embeddings")
    return min(positive_int(config, "max_trained_positions"), positive_int(config, "max_position_embeddings"))


def gte_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GteConfig`: gated networks, of which only the last projection has a bias."""
    _check_fixed(config, GTE_FIXED)
    fields = {**_gated_fields(config), "mlp_bias": False, "mlp_down_bias": True}
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "ntk":
        return _spec(config, rope=_ntk_rope(config, parameters), **fields)
    return _spec(config, **_rope_fields(config), **fields)


def _ntk_rope(config: Any, parameters: Mapping[str, Any]) -> RopeSpec:
    """Returns the frequencies of a larger base, all divided by `factor ** (2 / head_dim)` (kexue.fm/archives/9706)."""
    theta, factor = parameters.get("rope_theta"), parameters.get("factor")
    if not is_positive_number(theta) or not is_positive_number(factor) or parameters.get("mixed_b") is not None:
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}; with rope type ntk it must have the positive "
            "numbers rope_theta and factor, and no mixed_b"
        )
    assert theta is not None and factor is not None
    head_dim = _head_dim(config)
    inv_freq = torch.tensor(plain_rope(head_dim, theta * factor).inv_freq) / factor ** (2 / head_dim)
    return RopeSpec(tuple(inv_freq.tolist()))


def _rope_fields(config: Any) -> dict[str, Any]:
    whole_heads(config)  # The frequencies are those of heads that share out the hidden size.
    return {"rope": rope_spec(config), "max_position_embeddings": rope_max_positions(config)}


def _head_dim(config: Any) -> int:
    """Returns the size of a head, which must be even, because its numbers are rotated in pairs."""
    head_dim: int = whole_heads(config)["head_dim"]
    if head_dim % 2:
        raise UnsupportedModelError(
            f"config field 'num_attention_heads' makes heads of {head_dim} numbers, which rotate in pairs, so it must "
            "make an even number"
        )
    return head_dim


def jina_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `JinaEmbeddingsV3Config`: BERT with rotary positions in place of learned ones."""
    return _spec(config, **_rope_fields(config))


def jina_alibi_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `JinaBertConfig`: scores fall with the distance, and gated networks end in a bias."""
    _check_fixed(config, JINA_ALIBI_FIXED)
    gate = JINA_GATES[one_of(config, "feed_forward_type", tuple(JINA_GATES))]
    spec = _spec(config, gated_mlp=True, activation=gate, mlp_bias=False, mlp_down_bias=True)
    return replace(spec, attention=AttentionSpec(causal=False, alibi_slopes=alibi_slopes(spec.num_heads)))


def _spec(config: Any, **fields: Any) -> DecoderSpec:
    types = getattr(config, "type_vocab_size", None)
    num_token_types = 0 if type(types) is int and types == 0 else positive_int(config, "type_vocab_size")
    return DecoderSpec(**{**encoder_fields(config), "num_token_types": num_token_types, **fields})


def _gated_fields(config: Any) -> dict[str, Any]:
    return {"gated_mlp": True, "activation": one_of(config, "hidden_act", tuple(GATES))}


def _check_fixed(config: Any, fixed: Mapping[str, Any]) -> None:
    """Raises if a field has another value than the one that is implemented."""
    for name, wanted in fixed.items():
        value = getattr(config, name, None)
        if value is not None and value != wanted:
            raise UnsupportedModelError(
                f"config field {name!r} is {quote(value)}; implemented for this architecture: {quote(wanted)}"
            )


def _weights(
    prefixes: tuple[str, ...], block: Mapping[str, str], head: Mapping[str, str]
) -> Callable[[DecoderSpec], WeightMap]:
    """Returns the function that makes the map of the weights, which depends on whether the model is a classifier."""

    def weights(spec: DecoderSpec) -> WeightMap:
        used = {} if not spec.num_labels else head if spec.class_head.activation else {"classifier": "score"}
        unused = {"pooler.dense", "classifier", *TRAINING_HEADS} - used.keys()
        modules = {**EMBEDDINGS, **block, **used}
        return WeightMap(prefixes, modules, ignored=(*BUFFERS, *sorted(unused)), layouts=LAYOUTS)

    return weights


HEADS = {CLASSIFIER: HeadSpec("CLS", "tanh", bias=True), TOKEN_CLASSIFIER: HeadSpec(bias=True)}

FAMILIES = (
    Family(("NomicBertModel",), nomic_spec, _weights(("nomic_bert.", "bert."), NOMIC_BLOCK, POOLED), heads=HEADS),
    Family(("GteModel", "NewModel"), gte_spec, _weights(("gte.", "new."), GTE_BLOCK, POOLED), heads=HEADS),
    Family(("JinaEmbeddingsV3Model",), jina_spec, _weights(("roberta.",), JINA_BLOCK, ROBERTA_HEAD), heads=HEADS),
    Family(("JinaBertModel",), jina_alibi_spec, _weights(("bert.",), JINA_ALIBI_BLOCK, POOLED), heads=HEADS),
)

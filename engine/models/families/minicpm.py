"""The family of MiniCPM 3 (Hu et al., 2024, arXiv:2404.06395), which has latent attention: `minicpm3_spec`."""

from __future__ import annotations

from typing import Any

from ..family import Family
from ..hf_config import flag, positive_float
from ..spec import DecoderSpec
from .deepseek import WEIGHTS, latent_fields

__all__ = ["FAMILIES", "minicpm3_spec"]


def minicpm3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `MiniCPM3Config`: embeddings, sublayers and logits are scaled by factors of its own."""
    fields = latent_fields(config, interleaved=False)
    return DecoderSpec(
        **fields,
        embedding_scale=positive_float(config, "scale_emb"),
        residual_scale=positive_float(config, "scale_depth") / fields["num_layers"] ** 0.5,
        logit_scale=positive_float(config, "dim_model_base") / fields["hidden_size"],
        mlp_bias=flag(config, "mlp_bias", False),
    )


FAMILIES = (Family(("MiniCPM3ForCausalLM",), minicpm3_spec, WEIGHTS),)

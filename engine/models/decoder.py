"""The decoder: every decoder-only language model we run, put together from the components its spec asks for.

It maps a batch of tokens to hidden states and hidden states to logits. It does not sample, and it owns no KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import ForwardBatch, KVCache
from ..layers import Linear
from .components import Components
from .options import DEFAULT_OPTIONS, ModelOptions
from .spec import DecoderSpec

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """A decoder-only language model whose attention is paged.

    Args:
        spec: What it is.
        dtype: Of weights and hidden states.
        device: Where its weights are. Their memory is not initialised: `load_weights` fills it.
        options: What the user chooses about it.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__()
        make = Components(spec, dtype, device, options)
        self.spec = spec
        self.embed_tokens = make.embed_tokens()
        self.project_in = make.projection(spec.embedding_size, spec.hidden_size)
        self.positions = make.positions()
        self.layers = nn.ModuleList(make.block(layer_idx) for layer_idx in range(spec.num_layers))
        self.norm = make.norm(present=spec.final_norm)
        self.project_out = make.projection(spec.hidden_size, spec.embedding_size)
        self.lm_head = make.head(self.embed_tokens)

    def pack(self) -> None:
        """Lets every linear layer lay out its weight for the device. Called once, after the weights are loaded."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Runs the tokens of one step through all layers.

        Args:
            batch: The tokens and their places in the cache.
            kv_cache: Keys and values of each layer; those of this step's tokens are written to it.

        Returns:
            The last hidden states, `[num_tokens, embedding_size]` (which is `hidden_size` in all models but one).
        """
        hidden = self.positions(self.project_in(self.embed_tokens(batch.token_ids)), batch.positions)
        residual = None
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache, strict=True):
            hidden, residual = layer(hidden, residual, batch, k_cache, v_cache)
        hidden, _ = self.norm(hidden, residual)
        return self.project_out(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Computes the logits of some tokens.

        Args:
            hidden: The rows to be sampled from of what `forward` returned.

        Returns:
            `[num_rows, vocab_size]` float32.
        """
        return self.lm_head.forward_float32(hidden)

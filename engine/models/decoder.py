"""`Decoder`: any language model that is one stack of layers, built from the components that its spec asks for.

A decoder maps a batch of tokens to hidden states, and hidden states to logits. It does not sample, and it owns no KV
cache. An encoder is the same stack with attention to all tokens of a text (`DecoderSpec.is_encoder`), and uses no KV
cache. In an engine of several ranks, the decoder is this rank's part of the model: some of the layers, and some of the
heads and columns of each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import ForwardBatch, KVCache
from ..layers import Packs
from ..parallel.context import SINGLE, ParallelContext
from .components import Components
from .options import DEFAULT_OPTIONS, ModelOptions
from .pp_stages import cache_pairs, stage_layers
from .spec import DecoderSpec

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """A language model: a stack of layers whose attention is paged, or that of an encoder.

    Args:
        spec: Description of the model.
        dtype: Number type of weights and hidden states.
        device: Device of the weights. Their memory is not initialised: `fill_slots` fills it.
        options: The user's options for the model.
        parallel: The place of this rank among all ranks.

    Attributes:
        adapters: The adapter slots of this rank's layers; None for a model without adapters.
        columns: The part of the vocabulary whose logits this rank computes.
        dtype: Number type of weights and hidden states.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        options: ModelOptions = DEFAULT_OPTIONS,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        super().__init__()
        make = Components(spec, dtype, device, options, parallel)
        self.spec = spec
        self.parallel = parallel
        self.adapters = make.linears.adapters
        self.columns = parallel.shard(spec.vocab_size)
        self._is_first, self._is_last = parallel.is_first_stage, parallel.is_last_stage
        self.dtype, self._device = dtype, device
        tied = None
        makes_logits = options.head == "lm_head"
        if self._is_first or (self._is_last and makes_logits and spec.tie_word_embeddings):
            tied = make.embed_tokens()
            self.embed_tokens = make.adapted_embedding(tied) if self._is_first else tied
        if self._is_first:
            self.project_in = make.input_projection()
            self.positions = make.positions()
            self.token_types = make.token_types()
            self.tasks = make.tasks()
            self.embedding_norm = make.embedding_norm()
            self.project_normed = make.normed_projection()
            self.input_scale = make.input_scale()
        own = stage_layers(spec, parallel.pp_size)[parallel.pp_rank]
        used = sorted({spec.weights_of(i) for i in own})
        # Every layer keeps its number, and therefore its name in the checkpoint. Layers of other pp stages are empty.
        self.layers = nn.ModuleList(
            make.block(i, is_first=i == used[0]) if i in used else nn.Identity()
            for i in range(spec.num_layer_weights or spec.num_layers)
        )
        self.relative_bias = make.relative_bias
        self.distance_vectors = make.distance_vectors
        self._own_layers = [(self.layers[spec.weights_of(i)], pair) for i, pair in cache_pairs(spec, own).items()]
        if not self._is_last:
            self.total = make.stage_total()
        else:
            self.norm = make.final_norm()
            self.project_out = make.output_projection()
            if makes_logits:
                self.lm_head = make.head(tied if spec.tie_word_embeddings else None)
                self.adjust_logits = make.logit_adjustment()
            if options.head == "score":
                self.score = make.score()
        make.linears.warn_of_declined()

    def pack(self) -> None:
        """Makes layers change their weights' layout for the device (`Packs`). Called once, after loading."""
        for module in self.modules():  # A gated network comes before its linear layers, whose weights it packs itself.
            if module is not self and isinstance(module, Packs):
                module.pack()

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Runs the tokens of one step through all layers.

        Args:
            batch: The tokens, and the slots of their keys and values.
            kv_cache: Keys and values of the layers of this pp stage, to which this step's keys and values are written.

        Returns:
            The last hidden states, `[num_tokens, embedding_size]` (only OPT-350m has `embedding_size != hidden_size`).
            A pp stage that is not the last sends its hidden states to the next one, and its result must not be used.
        """
        hidden = self.embed(batch) if self._is_first else self._receive(len(batch.token_ids))
        residual = None
        for layer, pair in self._own_layers:
            hidden, residual = layer(hidden, residual, batch, *kv_cache[pair])
        if not self._is_last:
            return self._send(hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return self.project_out(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Computes the logits of some tokens, in the last pp stage.

        Args:
            hidden: Rows of the result of `forward`, `[num_rows, embedding_size]`.

        Returns:
            `[num_rows, vocab_size]` float32; all ranks of the pp stage get the same bits.
        """
        return self.gather_logits(self.compute_own_logits(hidden))

    def compute_own_logits(self, hidden: Tensor) -> Tensor:
        """Computes this rank's columns of the logits of some tokens, in the last pp stage.

        Args:
            hidden: Rows of the result of `forward`, `[num_rows, embedding_size]`.

        Returns:
            `[num_rows, num_columns]` float32: the logits of the tokens of `columns`. All ranks have as many columns, so
            the last ones may be behind the end of the vocabulary; these hold minus infinity.
        """
        logits: Tensor = self.adjust_logits(self.lm_head.forward_float32(hidden))
        if self.columns.length < self.columns.room:
            logits[:, self.columns.length :] = -torch.inf
        return logits

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Joins the columns of all ranks (see `compute_own_logits`) to the result of `compute_logits`."""
        if self.parallel.tp_size == 1:
            return logits
        return self.parallel.all_gather(logits)[:, : self.spec.vocab_size].contiguous()

    def compute_class_logits(self, hidden: Tensor) -> Tensor:
        """Computes the logits of a classifier's classes, in the last pp stage.

        Args:
            hidden: The vectors to classify, `[num_rows, embedding_size]`: rows of the result of `forward`, or their
                means over texts (`HeadSpec.pooling`).

        Returns:
            `[num_rows, num_labels]` float32.
        """
        return self.score.forward_float32(hidden.to(self.dtype)) * self.spec.class_head.scale

    def embed(self, batch: ForwardBatch) -> Tensor:
        """Returns the input of the first layer, `[num_tokens, hidden_size]`.

        The input is the embeddings of the tokens, scaled in some models, plus the embeddings of their positions if
        positions are learned, and those of their types, normed in models with a norm there.
        """
        embeddings = self.embed_tokens(batch.token_ids)
        if batch.given is not None:
            embeddings = batch.given.replace_in(embeddings)
        embeddings = self.input_scale(embeddings)
        placed = self.positions(self.project_in(embeddings), batch.positions)
        typed = self.tasks(self.token_types(placed, batch.token_types), None)
        hidden, _ = self.embedding_norm(typed)
        return self.project_normed(hidden)

    def _send(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Sends the residual stream to the next pp stage; its first norm would have begun with the same sum."""
        stages = self.parallel.stages
        assert stages is not None
        total, _ = self.total(hidden, residual)
        stages.send(total)
        return total

    def _receive(self, num_tokens: int) -> Tensor:
        stages = self.parallel.stages
        assert stages is not None
        return stages.receive((num_tokens, self.spec.hidden_size), self.dtype, self._device)

"""`PromptEmbeds`: checks prompts that are given as embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PromptError, PromptTypeError
from .span import EmbeddedSpan


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Checks embeddings of prompts against the embedding size and the dtype of a model.

    Attributes:
        embedding_size: Length of the vectors that the model's `embed_tokens` returns.
        dtype: Dtype of the model.
    """

    embedding_size: int
    dtype: torch.dtype

    def check(self, embeddings: Any) -> int:
        """Checks the type and the shape of the embeddings of a whole prompt, without a look at the numbers.

        Args:
            embeddings: `[num_tokens, embedding_size]`, of any floating-point dtype, on any device.

        Returns:
            The number of tokens.

        Raises:
            PromptTypeError: The value is no dense tensor of floating-point numbers, or has a wrong shape.
        """
        if not isinstance(embeddings, torch.Tensor):
            raise PromptTypeError(f"prompt_embeds must be a torch.Tensor; got {type(embeddings).__name__}")
        if embeddings.is_nested or embeddings.is_meta or embeddings.layout is not torch.strided:
            raise PromptTypeError(
                "prompt_embeds must be an ordinary dense tensor with numbers; got a sparse, nested or meta tensor"
            )
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise PromptTypeError(
                f"prompt_embeds must have the shape [num_tokens, {self.embedding_size}], one row for each token, as "
                f"the model's embed_tokens returns them; got {list(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise PromptTypeError(
                f"prompt_embeds must hold floating-point numbers; got {embeddings.dtype}. Token ids are given as "
                "prompt_token_ids"
            )
        return len(embeddings)

    def read(self, embeddings: torch.Tensor) -> EmbeddedSpan:
        """Copies the embeddings of a whole prompt, so that the caller may change the tensor.

        Args:
            embeddings: Checked embeddings.

        Returns:
            A span that covers the whole prompt, in the model's dtype and on the CPU.

        Raises:
            PromptError: A number is not finite, or is too large for the model's dtype.
        """
        cast = embeddings.detach().to("cpu", self.dtype, copy=True, memory_format=torch.contiguous_format)
        if not cast.isfinite().all():
            dtype = str(self.dtype).removeprefix("torch.")
            raise PromptError(
                f"prompt_embeds hold NaN or infinity, or numbers too large for the model's dtype {dtype}; give finite "
                "numbers, or construct the engine with dtype='float32'"
            )
        return EmbeddedSpan(0, cast)

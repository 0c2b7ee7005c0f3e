"""Decoder layers such as `PreNormBlock`: an attention and a feed-forward sublayer, with norms and residual additions.

When ranks share a layer, a sublayer returns one addend of its result on each rank, and the norm that follows adds them
up.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from ..batch import ForwardBatch
from .attention import Attention
from .encoders import DisentangledAttention, EncoderAttention, TextConv
from .experts import FeedForward
from .latent_attention import LatentAttention
from .norm import Norm
from .scale import Scale
from .states import StateMixer

__all__ = [
    "ConvBlock",
    "MLPBlock",
    "MixerBlock",
    "ParallelBlock",
    "PostNormBlock",
    "PreNormBlock",
    "SandwichBlock",
    "TokenMixer",
]

TokenMixer: TypeAlias = Attention | LatentAttention | EncoderAttention | DisentangledAttention | StateMixer
"""The sublayer of a decoder layer in which tokens see others: attention, or a recurrence. They get two tensors of the
cache: keys and values, or the states of a convolution and of the recurrence. Those of encoders read neither."""


class PreNormBlock(nn.Module):
    """A decoder layer that norms before each sublayer and carries the residual stream beside the hidden states.

    Args:
        attention: The attention sublayer.
        mlp: The feed-forward sublayer.
        attention_norm: Norm before the attention.
        mlp_norm: Norm before the feed-forward network.
        residual_scale: Scales the result of each sublayer before it is added to the residual stream.
    """

    def __init__(
        self,
        attention: TokenMixer,
        mlp: FeedForward,
        attention_norm: Norm,
        mlp_norm: Norm,
        *,
        residual_scale: Scale | nn.Identity,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.residual_scale = residual_scale

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the layer. The residual stream is the sum of `hidden` and `residual`.

        Args:
            hidden: `[num_tokens, hidden_size]`.
            residual: `[num_tokens, hidden_size]`; None before the first layer.
            batch: The tokens, and the slots of their keys and values.
            k_cache: Cached keys of the layer, to which the keys of this step are written.
            v_cache: Cached values of the layer, to which the values of this step are written.

        Returns:
            (hidden, residual) for the next layer. When ranks share the layer, `hidden` is this rank's addend, and the
            next norm adds the addends up.
        """
        hidden, residual = self.attention_norm(hidden, residual)
        hidden = self.residual_scale(self.attention(hidden, batch, k_cache, v_cache))
        hidden, residual = self.mlp_norm(hidden, residual)
        return self.residual_scale(self.mlp(hidden)), residual


class PostNormBlock(nn.Module):
    """A decoder layer that norms the sum of each sublayer's input and output, and returns no residual.

    Args:
        attention: The attention sublayer.
        mlp: The feed-forward sublayer.
        attention_norm: Norm after the attention.
        mlp_norm: Norm after the feed-forward network.
    """

    def __init__(self, attention: TokenMixer, mlp: FeedForward, attention_norm: Norm, mlp_norm: Norm) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the layer.

        Args:
            hidden: The residual stream, `[num_tokens, hidden_size]`.
            residual: None.
            batch: The tokens, and the slots of their keys and values.
            k_cache: Cached keys of the layer, to which the keys of this step are written.
            v_cache: Cached values of the layer, to which the values of this step are written.

        Returns:
            (hidden, None) for the next layer.
        """
        hidden, _ = self.attention_norm(self.attention(hidden, batch, k_cache, v_cache), hidden)
        hidden, _ = self.mlp_norm(self.mlp(hidden), hidden)
        return hidden, None


class ConvBlock(PostNormBlock):
    """A layer that norms after its sublayers, and adds a convolution of its input to its result.

    Args:
        attention: As in `PostNormBlock`.
        mlp: As in `PostNormBlock`.
        attention_norm: As in `PostNormBlock`.
        mlp_norm: As in `PostNormBlock`.
        conv: The convolution.
        conv_norm: Norm of the sum.
    """

    def __init__(
        self,
        attention: TokenMixer,
        mlp: FeedForward,
        attention_norm: Norm,
        mlp_norm: Norm,
        *,
        conv: TextConv,
        conv_norm: Norm,
    ) -> None:
        super().__init__(attention, mlp, attention_norm, mlp_norm)
        self.conv = conv
        self.conv_norm = conv_norm

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `PostNormBlock.forward`, for a batch of whole texts."""
        result, _ = super().forward(hidden, residual, batch, k_cache, v_cache)
        total, _ = self.conv_norm(self.conv(hidden, batch.query_start_loc), result)
        return total, None


class SandwichBlock(nn.Module):
    """A decoder layer that norms the input and the output of each sublayer; the residual stream itself is not normed.

    Args:
        attention: The attention sublayer.
        mlp: The feed-forward sublayer.
        attention_norm: Norm before the attention.
        attention_out_norm: Norm after the attention.
        mlp_norm: Norm before the feed-forward network.
        mlp_out_norm: Norm after the feed-forward network.
    """

    def __init__(
        self,
        attention: TokenMixer,
        mlp: FeedForward,
        *,
        attention_norm: Norm,
        attention_out_norm: Norm,
        mlp_norm: Norm,
        mlp_out_norm: Norm,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_out_norm = attention_out_norm
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_out_norm = mlp_out_norm

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `PreNormBlock.forward`, but the returned `hidden` is complete on every rank."""
        hidden, residual = self.attention_norm(hidden, residual)
        hidden, _ = self.attention_out_norm(self.attention(hidden, batch, k_cache, v_cache))
        hidden, residual = self.mlp_norm(hidden, residual)
        hidden, _ = self.mlp_out_norm(self.mlp(hidden))
        return hidden, residual


class ParallelBlock(nn.Module):
    """A decoder layer whose sublayers read the same residual stream (Wang and Komatsuzaki, 2021, GPT-J).

    When ranks share the layer, the next norm adds up the results of both sublayers at once.

    Args:
        attention: The attention sublayer.
        mlp: The feed-forward sublayer.
        attention_norm: Norm before the attention.
        mlp_norm: Norm before the feed-forward network; None if the network reads what the attention reads.
    """

    def __init__(self, attention: TokenMixer, mlp: FeedForward, attention_norm: Norm, mlp_norm: Norm | None) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `PreNormBlock.forward`."""
        to_attention, residual = self.attention_norm(hidden, residual)
        to_mlp = to_attention if self.mlp_norm is None else self.mlp_norm(residual)[0]
        return self.attention(to_attention, batch, k_cache, v_cache) + self.mlp(to_mlp), residual


class MixerBlock(nn.Module):
    """A decoder layer of a single sublayer, in which tokens see others, and the norm before it.

    Args:
        attention: Attention, or a recurrence.
        norm: Norm before it.
    """

    def __init__(self, attention: TokenMixer, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `PreNormBlock.forward`."""
        hidden, residual = self.norm(hidden, residual)
        return self.attention(hidden, batch, k_cache, v_cache), residual


class MLPBlock(nn.Module):
    """A decoder layer of a single sublayer, a feed-forward network or experts, and the norm before it.

    Args:
        mlp: The feed-forward sublayer.
        norm: Norm before it.
    """

    def __init__(self, mlp: FeedForward, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `PreNormBlock.forward`, but no cache is read."""
        hidden, residual = self.norm(hidden, residual)
        return self.mlp(hidden), residual

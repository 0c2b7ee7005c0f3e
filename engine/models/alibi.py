"""`alibi_slopes`: by how much the scores of each head fall with the distance of a key, in models without positions."""

from __future__ import annotations

__all__ = ["alibi_slopes"]


def alibi_slopes(num_heads: int, max_bias: int = 8) -> tuple[float, ...]:
    """Returns the slope of each query head (Press, Smith and Lewis, 2022, arXiv:2108.12409, section 3).

    For n heads, n a power of two, they are 2^(-max_bias k / n), k from 1 to n. For other numbers the slopes of the next
    smaller power of two come first, then every other slope of the power of two after it.

    Args:
        num_heads: Number of query heads.
        max_bias: The negative logarithm of the smallest slope.
    """
    smaller = 1 << num_heads.bit_length() - 1
    slopes = [2.0 ** (-max_bias * k / smaller) for k in range(1, smaller + 1)]
    between = [2.0 ** (-max_bias * k / (2 * smaller)) for k in range(1, 2 * smaller, 2)]
    return tuple((slopes + between)[:num_heads])

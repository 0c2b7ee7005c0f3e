"""`Speller`: all the ways in which tokens can spell bad words, as the edges of one graph.

A word of twelve letters has thousands of spellings, but few tokens lie in it: an edge leads from a place in the word to
a later one, over a token whose bytes lie between them. The bytes count, because tokens may hold parts of a character.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache

import numpy as np

__all__ = ["END", "NO_EDGES", "START", "Speller", "chains"]

logger = logging.getLogger(__name__)

MAX_WORD_BYTES = 128
"""Longest bad word that is spelled in all ways; a longer one has its usual spellings only."""

MAX_EDGES = 1 << 14
"""Most edges of a list of words; words for which no edges are left have their usual spellings only."""

MAX_LISTS = 32
"""Most lists of words whose edges are remembered."""

START, END = 0, 1
"""The nodes before the first token and after the last token of every word."""

NO_EDGES = np.empty((0, 4), np.int32)
NO_EDGES.flags.writeable = False


class Graph:
    """The edges of some words."""

    def __init__(self) -> None:
        self.edges: list[tuple[int, int, int, int]] = []
        self._num_nodes = 2

    def add_chain(self, token_ids: Sequence[int]) -> None:
        """Adds a word with one spelling."""
        nodes = [START, *(self._new_node() for _ in token_ids[1:]), END]
        self.edges += [(nodes[i], token_id, nodes[i + 1], i + 1) for i, token_id in enumerate(token_ids)]

    def add_word(self, word: bytes, tokens_of: Callable[[bytes], Iterable[int]], max_bytes: int, *, first: int) -> None:
        """Adds a word with all of its spellings.

        Args:
            word: The word.
            tokens_of: Function from bytes to the tokens that have them.
            max_bytes: Most bytes of a token.
            first: Fewest bytes of the first token of a spelling.
        """
        nodes, depths = {0: START, len(word): END}, {0: 0}
        for start in range(len(word)):
            if start not in depths:
                continue
            for end in range(start + (1 if start else first), min(start + max_bytes, len(word)) + 1):
                if not (token_ids := tokens_of(word[start:end])):
                    continue
                node = nodes[end] if end in nodes else nodes.setdefault(end, self._new_node())
                depths[end] = max(depths.get(end, 0), depths[start] + 1)
                self.edges += [(nodes[start], token_id, node, depths[start] + 1) for token_id in token_ids]

    def _new_node(self) -> int:
        self._num_nodes += 1
        return self._num_nodes - 1

    def array(self) -> np.ndarray:
        """Returns the edges as `Speller.edges` does."""
        return np.array(self.edges, np.int32).reshape(-1, 4)


class Speller:
    """Spells words with the tokens of a tokenizer.

    Args:
        encode: Function that tokenises texts without special tokens.
        token_bytes: Function that returns the bytes that each token adds inside of a text, except special tokens.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[list[int]]],
        token_bytes: Callable[[], Iterable[tuple[int, bytes]]],
    ) -> None:
        self._encode, self._token_bytes = encode, token_bytes
        self.edges: Callable[[tuple[str, ...]], np.ndarray] = lru_cache(MAX_LISTS)(self._spell)

    def _spell(self, words: tuple[str, ...]) -> np.ndarray:
        """Returns the spellings of words: at the start of a text, after a space, inside of a text.

        Returns:
            `[num_edges, 4]` int32: the node before a token, the token id, the node after it, and the largest number of
            tokens from `START` to there. A path from `START` to `END` is a spelling of a word.
        """
        graph = Graph()
        forms = [form for word in words for form in dict.fromkeys((word, " " + word.lstrip()))]
        for ids in {tuple(ids) for ids in self._encode(forms) if ids}:
            graph.add_chain(ids)
        for word in words:
            if len(graph.edges) > MAX_EDGES:
                logger.warning("bad_words: %d words are many; some are known in their usual spellings only", len(words))
                break
            self._add(graph, word)
        return graph.array()

    def _add(self, graph: Graph, word: str) -> None:
        tokens_of, max_bytes = lambda part: self._tokens_of.get(part, ()), self._max_bytes
        for form in dict.fromkeys((word, " " + word.lstrip())):
            if len(part := form.encode()) <= MAX_WORD_BYTES:
                # After a space that is a token of its own, the word is spelled as inside of a text.
                graph.add_word(part, tokens_of, max_bytes, first=1 if form == word else 2)

    @cached_property
    def _tokens_of(self) -> dict[bytes, list[int]]:
        """Bytes inside of a text -> the tokens that have them."""
        found: dict[bytes, list[int]] = {}
        for token_id, part in self._token_bytes():
            if part:
                found.setdefault(part, []).append(token_id)
        return found

    @cached_property
    def _max_bytes(self) -> int:
        return max(map(len, self._tokens_of), default=0)


def chains(words: Iterable[Sequence[int]]) -> np.ndarray:
    """Returns the edges of words that have one spelling each, see `Speller`."""
    graph = Graph()
    for token_ids in words:
        graph.add_chain(token_ids)
    return graph.array()

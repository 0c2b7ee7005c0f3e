"""Embeddings in place of tokens: spans of a prompt that a caller gives as vectors."""

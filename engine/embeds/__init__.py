"""Prompts that callers give as embeddings instead of tokens: their checks, and their way into a step."""

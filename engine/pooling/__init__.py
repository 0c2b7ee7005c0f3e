"""Prompts to vectors: parameters, pooling, scores, outputs."""

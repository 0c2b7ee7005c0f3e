"""Vectors of prompts: pooling parameters, the last operations on a vector, scores and outputs."""

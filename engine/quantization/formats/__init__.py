"""The formats of quantised checkpoints, one file each. docs/recipes/quantization.md explains how to add a format."""

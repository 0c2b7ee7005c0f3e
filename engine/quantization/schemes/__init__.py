"""The quantization schemes, one file each. docs/recipes/quantization.md explains how to add a scheme."""

"""The quantization schemes: one file, one scheme. docs/recipes/quantization.md says how to add one."""

"""Processors: `build_llm_processor` makes one from a config, and `Processor` runs the rows of datasets through it."""

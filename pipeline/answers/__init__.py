"""Parsers of generated text, which find reasoning and tool calls."""

"""Generated text taken apart: reasoning and tool calls."""

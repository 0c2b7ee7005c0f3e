"""From settings to a model that is ready to run: its folder, its memory, its runner."""

"""What an engine is for, one file for each task: to generate, to embed, to classify."""

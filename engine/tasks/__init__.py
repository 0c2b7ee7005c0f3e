"""The tasks of an engine, each in a file: `Generate`, `Embed` and `Classify`."""

"""How an engine starts: finds the model folder, loads the model, sizes the KV cache, and makes the runner."""

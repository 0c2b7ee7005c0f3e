"""How the weights of a model are read from checkpoints, local or behind a URL, and how rank files are written."""

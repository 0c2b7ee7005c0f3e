"""How one device runs a step plan: the tables of running sequences, the forward pass, and the head."""

"""One step on one device: tables, forward pass, head, draw."""

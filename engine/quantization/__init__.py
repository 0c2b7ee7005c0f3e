"""How the matrices of a model are stored and multiplied: what a scheme is, and how one is found by its name."""

"""How the matrices of linear layers are stored and multiplied: the interface of schemes, the schemes, their names."""

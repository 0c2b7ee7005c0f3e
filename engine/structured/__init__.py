"""Outputs under a constraint: parameters, grammars, token masks."""

"""Constraints on outputs (`structured_outputs`): their parameters, grammars and token masks."""

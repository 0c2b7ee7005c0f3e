"""The stages of a row. `base.py` holds the class `Stage`, and `declaration.py` the declaration in the file of a stage.

`declared/` holds the stages around an engine, one file each; `backends/` holds the stages that wait for an answer.
docs/recipes/stage.md says how to add one.
"""

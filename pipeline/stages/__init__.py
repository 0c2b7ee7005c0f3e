"""The stages of a row. `base.py` says what a stage is, and `declaration.py` what the file of a stage declares.

`declared/` holds the stages around an engine, one file each; `backends/` holds the stages that wait for an answer.
docs/recipes/stage.md says how to add one.
"""

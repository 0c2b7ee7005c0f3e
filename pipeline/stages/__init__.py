"""The stages of a row: one file, one stage, with its settings, columns, place and maker.

`base.py` says what a stage is, `declaration.py` what its file declares, and docs/recipes/stage.md how to add one.
"""

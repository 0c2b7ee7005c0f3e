"""Writes docs/models.md: every model family, its architectures and what runs, from the registry.

Run it with `make docs`; a test fails when the file is out of date.
"""

from __future__ import annotations

from pathlib import Path

from millrace.engine import model_catalog

TARGET = Path(__file__).resolve().parent / "models.md"
HEAD = """# Models

The families that run as our own models. `millrace models` prints this table, and `make docs` writes this file.

Each row was checked in the same way: tiny random checkpoints with odd sizes and every flag that changes the maths, in
float32, against transformers. Log-probabilities are equal within 1e-4 (1e-3 with experts, latents or states), for
prompts computed whole, in chunks and token by token. Greedy tokens are equal under preemption, with cached prefixes
and for prompts longer than a window (`tests/engine/models/test_models.py`, `tests/engine/test_oracle.py`).
To compare this installation with transformers on your own folder: `millrace check MODEL`.

The same names with the endings `ForSequenceClassification` and `ForTokenClassification` (classifiers) and `Model`
(embeddings) belong to each family; those of encoders (named without a head) also with `ForMaskedLM` and
`ForPreTraining`, whose heads are not used. Encoders embed and classify, and are checked in
`tests/engine/models/test_encoders.py`; a decoder whose config says `is_causal: false` is one ([decision
0057](decisions/0057-encoders.md)). Causal models of transformers that are not listed run as its own module around our
paged attention ([decision 0038](decisions/0038-fallback.md)). "layers" is what the default config of transformers asks
for.
[To add a family](recipes/model.md).

"""


def index() -> str:
    """Returns the whole file."""
    entries = model_catalog()
    columns = ("family", "architectures", "layers", *entries[0].runs)
    rows = [columns, ("---",) * len(columns)]
    for entry in entries:
        names = ", ".join(f"`{name}`" for name in entry.architectures)
        rows.append((entry.name, names, entry.layers, *entry.runs.values()))
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    TARGET.write_text(index(), encoding="utf-8")

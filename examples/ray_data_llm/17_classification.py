"""Classifies rows with a decoder that has a head for classes.

There is no such checkpoint in the package, so the script makes one: the bundled model, and a head that is fitted by
least squares to the embeddings of a few lines.

python examples/ray_data_llm/17_classification.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from millrace.engine import LLM, PoolingParams, resolve_model
from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LABELS = ["letter", "invoice"]
KNOWN = [
    ("Inv #4821 - due 3 March '24 - total USD 1,204.50", 1),
    ("Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR", 1),
    ("Invoice 77-1032 / 2024-12-01 / ¥12,500", 1),
    ("Thank you for your visit!", 0),
    ("We look forward to seeing you again.", 0),
    ("Please find my new address below.", 0),
]
LINES = ["Inv #4822 - due 4 March '24 - total USD 1,300.00", "Thank you for your letter!"]


def make_classifier(folder: Path) -> None:
    """Writes a checkpoint whose head distinguishes invoices from letters."""
    base = resolve_model("bundled:invoices")
    with LLM(str(base), runner="pooling", dtype="float32") as llm:
        plain = PoolingParams(use_activation=False)
        embedded = llm.embed([text for text, _ in KNOWN], pooling_params=plain, use_tqdm=False)
    states = np.array([one.outputs.embedding for one in embedded if one.outputs is not None], np.float32)
    wanted = np.array([[3.0, -3.0] if label == 0 else [-3.0, 3.0] for _, label in KNOWN], np.float32)
    weight, *_ = np.linalg.lstsq(states, wanted, rcond=None)
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=names, dtype=torch.float32)
    model.score.weight.data = torch.from_numpy(weight.T.copy())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the most likely class; the column `embeddings` has the probabilities of all classes."""
    best = int(np.argmax(row["embeddings"]))
    return {"line": row["prompt"], "label": LABELS[best], "probability": round(float(row["embeddings"][best]), 3)}


def main() -> None:
    """Makes the classifier, and sends rows through it."""
    with tempfile.TemporaryDirectory() as folder:
        make_classifier(Path(folder))
        config = vLLMEngineProcessorConfig(model_source=folder, task_type="classify", chat_template_stage=False)
        with build_processor(config, lambda row: {"prompt": row["item"]}, postprocess) as processor:
            for row in processor(ray.data.from_items(LINES)).take_all():
                print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()

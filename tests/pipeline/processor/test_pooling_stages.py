"""What the stages of pooling engines read from the model's folder, without an engine."""

from __future__ import annotations

import json
from pathlib import Path

from encoders import tiny_encoder
from millrace.engine.pooling.scoring import pair_up
from millrace.pipeline import EngineProcessorConfig
from millrace.pipeline.processor.pooling_stages import make_scoring
from millrace.pipeline.stages.declared.tokenize import TokenizerStageConfig
from millrace.pipeline.stages.tokenizers import tokenizer_of


def test_texts_and_pairs_are_cut_as_the_folder_of_a_cross_encoder_says(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "bert", "classes", num_labels=1)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 12}))
    scores = EngineProcessorConfig(model_source=str(folder), task_type="score")
    (prompt,) = make_scoring(scores).prompts(pair_up("Who pays?", "The buyer pays. " * 9))
    assert len(prompt.token_ids) == 12
    classes = EngineProcessorConfig(model_source=str(folder), task_type="classify")
    assert tokenizer_of(classes, TokenizerStageConfig()).texts.max_tokens == 12

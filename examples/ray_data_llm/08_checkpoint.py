"""A job that continues where it stopped, with Ray Data's own checkpoints: rows need an id column that is kept.

`millrace run` and `millrace resume` need neither an id nor a format that Ray reads by itself.

python examples/ray_data_llm/08_checkpoint.py
"""

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.checkpoint import CheckpointConfig

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the conversation and the sampling parameters of a row."""
    return {
        "messages": [{"role": "user", "content": row["line"]}],
        "sampling_params": {"temperature": 0, "max_tokens": 64},
    }


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer and the id, by which the checkpoint knows finished rows."""
    return {"id": row["id"], "answer": row["generated_text"]}


def run(folder: Path, num_rows: int) -> None:
    """Answers the rows of the input that have no answer yet."""
    lines = [{"id": index, "line": f"Invoice {index:04} / 2024-12-01 / USD {index}.50"} for index in range(num_rows)]
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), folder / "in" / "lines.parquet")
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices")
    with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        processor(ray.data.read_parquet(str(folder / "in"))).write_parquet(str(folder / "out"))
    print(num_rows, "rows in,", sum(pq.read_metadata(path).num_rows for path in folder.glob("out/*")), "answers")


def main() -> None:
    """Answers 20 rows, then the 20 rows that were added."""
    context = ray.data.DataContext.get_current()
    with tempfile.TemporaryDirectory() as folder:
        context.checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=f"{folder}/done", delete_checkpoint_on_success=False
        )
        try:
            for num_rows in (20, 40):
                run(Path(folder), num_rows)
        finally:
            context.checkpoint_config = None


if __name__ == "__main__":
    main()

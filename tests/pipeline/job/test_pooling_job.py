"""Jobs whose answers are vectors, probabilities and scores: the files that they write, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pooled_job import run_here
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from checkpoints import tiny_classifier
from millrace import ConfigError
from millrace.engine import LLM
from millrace.pipeline.job.config import JobConfig
from millrace.pipeline.job.run import prepare_job
from millrace.pipeline.pooling.vectors import VECTOR_FORMS

ENGINE = {"max_num_seqs": 32, "max_model_len": 128, "num_threads": 1, "dtype": "float32"}
TEXTS = [f"row {i} of a table with {i * 7 % 5} entries" for i in range(12)]
SIZE, DIMENSIONS = 64, 16
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> Iterator[LLM]:
    """An engine that embeds."""
    with LLM(str(tiny_model("qwen3")), runner="pooling", dtype="float32", max_num_seqs=32, num_threads=1) as llm:
        yield llm


@pytest.fixture
def make_job(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Callable[..., JobConfig]:
    """Makes a job over a dozen rows, of which the last has no text."""
    table = {"id": range(13), "text": [*TEXTS, None], "query": ["which row?"] * 13, "documents": [TEXTS[:3]] * 13}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")

    def make(**changes: Any) -> JobConfig:
        fields = {"model": str(tiny_model("qwen3")), "input": str(tmp_path / "in.parquet"), "columns": ["id"]}
        own = {"output": str(tmp_path / "out"), "task_type": "embed", "prompt": "{text}", "engine": ENGINE}
        return JobConfig(**{**fields, **own, **changes})

    return make


def decoded(name: str, column: list[Any], scales: list[float] | None) -> np.ndarray:
    """Returns the numbers that a column of vectors stands for; the signs of packed ones."""
    form, codes = VECTOR_FORMS[name], np.array(column)
    if form.is_packed:
        packed = (codes.astype(int) + (128 if name == "binary" else 0)).astype(np.uint8)
        return np.unpackbits(packed, axis=1)[:, :DIMENSIONS]
    if scales is None:
        return codes.astype(np.float32)
    return (codes.astype(np.float32) - (128 if name == "uint8" else 0)) * np.array(scales)[:, None]


@pytest.mark.parametrize("name", VECTOR_FORMS)
def test_vectors_are_lists_of_fixed_size_of_their_dtype(make_job: Any, llm: LLM, tmp_path: Path, name: str) -> None:
    made = [one.outputs.data[:DIMENSIONS] for one in llm.encode(TEXTS, pooling_task="embed", use_tqdm=False)]
    expected = np.array([one / np.linalg.norm(one) for one in made])
    form, job = VECTOR_FORMS[name], make_job(embedding_dtype=name, pooling={"dimensions": DIMENSIONS})
    manifest = run_here(job, llm)
    assert (manifest.num_rows, manifest.num_failed) == (12, 1)
    table = pq.read_table(tmp_path / "out")
    kind = table.schema.field("embeddings").type
    assert pa.types.is_fixed_size_list(kind) and kind.value_type == pa.from_numpy_dtype(form.dtype)
    assert kind.list_size == (2 if form.is_packed else DIMENSIONS)
    assert (
        table.column_names[:2] == ["id", "embeddings"] and ("embeddings_scale" in table.column_names) == form.has_scale
    )
    scales = table["embeddings_scale"].to_pylist() if form.has_scale else None
    found = decoded(name, table["embeddings"].to_pylist(), scales)
    if form.is_packed:
        assert np.array_equal(found > 0, expected > 0)
    else:
        np.testing.assert_allclose(found, expected, atol={np.float32: 1e-5, np.float16: 1e-3}.get(form.dtype, 5e-3))
    (letter,) = pq.read_table(tmp_path / "out" / "_failed").to_pylist()
    assert (letter["id"], letter["__error_kind"]) == (12, "PromptTypeError")


@pytest.mark.parametrize("format", ["jsonl", "delta", "lance", "arrow"])
def test_every_format_has_vectors(make_job: Any, llm: LLM, tmp_path: Path, format: str) -> None:
    if format in ("delta", "lance"):
        pytest.importorskip({"delta": "deltalake"}.get(format, format))
    job = make_job(embedding_dtype="uint8", output_format=format, output_column="v")
    run_here(job, llm)
    out = tmp_path / "out"
    if format == "jsonl":
        rows = [json.loads(line) for line in (out / "part-00000.jsonl").read_text().splitlines()]
    elif format == "delta":
        from deltalake import DeltaTable

        rows = DeltaTable(str(out)).to_pyarrow_table().to_pylist()
    elif format == "lance":
        import lance

        table = lance.dataset(str(out))
        assert table.schema.field("v").type == pa.list_(pa.uint8(), SIZE)
        rows = table.to_table().to_pylist()
    else:
        rows = pa.ipc.open_file(out / "part-00000.arrow").read_all().to_pylist()
    expected = np.array([one.outputs.data for one in llm.encode(TEXTS, pooling_task="embed", use_tqdm=False)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    rows.sort(key=lambda row: row["id"])
    found = decoded("uint8", [row["v"] for row in rows], [row["v_scale"] for row in rows])
    np.testing.assert_allclose(found, expected, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "{txt}"}, "the input has no column 'txt'; did you mean 'text'?"),
        ({"pooling": {"dimensions": 100}}, "dimensions=100, but the model's embeddings have 64; use at most so many"),
        ({"pooling": {"dimension": 8}}, "pooling: PoolingParams has no field 'dimension'; did you mean 'dimensions'?"),
        ({"task_type": "classify"}, "task='classify' needs a checkpoint of an architecture *ForSequenceClass"),
        ({"task_type": "generate", "embedding_dtype": "int8"}, "embedding_dtype has no use with task_type='generate'"),
        ({"sampling": {"n": 2}}, "sampling has no use with task_type='embed'"),
        ({"task_type": "score"}, "prompt has no use with task_type='score'"),
        ({"task_type": "score", "prompt": None, "score_columns": ["query", "doc"]}, "has no column 'doc'"),
        ({"task_type": "score", "prompt": None, "score_columns": ["query"]}, "at least 2 items"),
        ({"embedding_dtype": "int4"}, "embedding_dtype"),
        ({"columns": ["id", "query"], "output_column": "query"}, "column 'query' would be overwritten"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(make_job: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        prepare_job(make_job(**changes))
    assert said in str(raised.value)


def test_a_job_that_embeds_goes_on_only_with_the_same_vectors(make_job: Any) -> None:
    prepared = prepare_job(make_job())
    prepared.folder.write_state(prepared.state)
    assert prepare_job(make_job(replicas=2)).resumes
    for changes in ({"embedding_dtype": "int8"}, {"pooling": {"dimensions": 8}}):
        with pytest.raises(ConfigError, match="holds an unfinished job that is another one"):
            prepare_job(make_job(**changes))
    # What an older version has begun names no task.
    older = {name: value for name, value in prepared.state.job.items() if name not in ("task_type", "pooling")}
    before = {**older, "output_column": "generated_text"}
    changed = type(prepared.state)(before, *(getattr(prepared.state, one) for one in prepared.state.__slots__[1:]))
    assert changed.fingerprint["task_type"] == "generate"
    assert changed.fingerprint["output_column"] == "generated_text"


def test_classes_scores_and_rewards_are_columns(make_job: Any, tmp_path: Path, llm: LLM) -> None:
    scores = make_job(task_type="score", prompt=None)
    assert run_here(scores, llm).num_rows == 13
    table = pq.read_table(tmp_path / "out").sort_by("id")
    assert table.schema.field("score").type == pa.list_(pa.float64())
    expected = [one.outputs.score for one in llm.score("which row?", TEXTS[:3], use_tqdm=False)]
    np.testing.assert_allclose(table["score"][5].as_py(), expected, atol=1e-5)
    one = make_job(task_type="score", prompt=None, score_columns=["text", "query"], output=str(tmp_path / "one"))
    manifest = run_here(one, llm)
    assert (manifest.num_rows, manifest.num_failed) == (12, 1)
    table = pq.read_table(tmp_path / "one").sort_by("id")
    assert table.schema.field("score").type == pa.float64()
    expected = [one.outputs.score for one in llm.score(TEXTS, ["which row?"] * 12, use_tqdm=False)]
    np.testing.assert_allclose(table["score"].to_pylist(), expected, atol=1e-5)

    judge = tiny_classifier(tmp_path / "judge", "llama", num_labels=1)
    job = make_job(task_type="reward", model=str(judge), output=str(tmp_path / "reward"))
    with LLM(str(judge), dtype="float32") as judging:
        run_here(job, judging)
        logits = judging.encode(TEXTS, pooling_task="classify", use_tqdm=False)
    table = pq.read_table(tmp_path / "reward").sort_by("id")
    inverse = [np.log(one.outputs.data[0] / (1 - one.outputs.data[0])) for one in logits]
    np.testing.assert_allclose(table["reward"].to_pylist(), inverse, atol=1e-3)


@pytest.mark.slow
def test_a_job_classifies(cluster: None, make_job: Any, tmp_path: Path) -> None:
    from millrace.pipeline import run_job

    labels = {0: "no", 1: "perhaps", 2: "yes"}
    model = tiny_classifier(tmp_path / "model", "llama", num_labels=3, id2label=labels)
    summary = run_job(make_job(task_type="classify", model=str(model)))
    assert (summary.num_rows_in, summary.num_rows_failed) == (13, 1)
    table = pq.read_table(tmp_path / "out").sort_by("id")
    assert table.schema.field("probs").type == pa.list_(pa.field("element", pa.float32()), 3)
    with LLM(str(model), dtype="float32") as llm:
        expected = np.array([one.outputs.probs for one in llm.classify(TEXTS, use_tqdm=False)])
    np.testing.assert_allclose(np.array(table["probs"].to_pylist()), expected, atol=1e-4)
    assert table["label"].to_pylist() == [labels[int(one)] for one in expected.argmax(1)]
    np.testing.assert_allclose(table["label_probability"].to_pylist(), expected.max(1), atol=1e-4)


MILLRACE = [sys.executable, "-P", "-c", "from millrace.pipeline.cli import main; main()"]


@pytest.mark.slow
def test_millrace_embed_killed_and_resumed_has_each_row_once(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    texts = [f"line {i} of {i % 7} notes" for i in range(600)]
    (tmp_path / "notes").mkdir()
    for part in range(2):
        half = texts[part * 300 : part * 300 + 300]
        (tmp_path / "notes" / f"{part}.txt").write_text("\n".join(half) + "\n\n")
    options = ["--engine", "dtype=float32", "--engine", "max_num_seqs=8", "--batch-size", "16", "--dimensions", "8"]
    command = [*MILLRACE, "embed", "notes", "out", "--model", str(tiny_model("qwen3")), *options]
    environment = {**os.environ, "MILLRACE_JOB_FLUSH_INTERVAL_S": "0.2"}
    work = tmp_path / "out" / "_millrace" / "work" / "results"
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as one:
        waiting = Retrying(
            stop=stop_after_delay(DEADLINE_S), wait=wait_fixed(0.02), retry=retry_if_result(lambda found: not found)
        )
        waiting(lambda: list(work.glob("*.flush")))
        one.kill()
    assert not (tmp_path / "out" / "_manifest.json").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on with the job" in done.stderr and "600 in, 600 out, 0 failed" in done.stdout
    table = pq.read_table(tmp_path / "out")
    assert sorted(table["text"].to_pylist()) == sorted(texts)
    with LLM(str(tiny_model("qwen3")), runner="pooling", dtype="float32") as llm:
        made = [one.outputs.data[:8] for one in llm.encode(texts, pooling_task="embed", use_tqdm=False)]
    wanted = {text: vector / np.linalg.norm(vector) for text, vector in zip(texts, made, strict=True)}
    for row in table.to_pylist():
        np.testing.assert_allclose(row["embeddings"], wanted[row["text"]], atol=1e-4)
    wrong = subprocess.run(
        [*MILLRACE, "embed", "notes", "other", "--model", str(tiny_model("qwen3")), "--column", "txt"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2 and "the input has no column 'txt'; did you mean 'text'?" in wrong.stderr

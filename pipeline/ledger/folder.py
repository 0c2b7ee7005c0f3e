"""The output folder of a job: what stands where, and what there is to do with what is found there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ...engine.errors import ConfigError
from ..files.delta import DELTA, DELTA_LOG
from ..files.storage import Storage

OURS = "_millrace"
STATE = "job.json"
PLAN = "publish.json"
RETRY = "retry.json"
MANIFEST = "_manifest.json"
FAILED_FOLDER = "_failed"
EXTENSIONS = (".parquet", ".jsonl", ".csv", ".arrow")

FREE = frozenset({
    "max_num_seqs", "max_num_batched_tokens", "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes",
    "gpu_memory_utilization", "enable_prefix_caching", "max_logprobs", "enforce_eager", "cudagraph_capture_sizes",
    "num_threads", "overlap_depth", "tensor_parallel_size", "pipeline_parallel_size", "device", "load_format",
})  # fmt: skip
"""Settings of the engine that change how fast a row is computed, not what comes out."""

FINGERPRINT = (
    "model", "prompt", "messages", "sampling", "seed", "columns", "output_column", "output_format", "key", "order",
    "limit",
)  # fmt: skip
"""Fields of a job that its rows follow from; the engine's settings but `FREE`, and the files of the input, too."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as it was begun.

    Attributes:
        job: Fields of its `JobConfig`.
        inputs: Files of its input: url, size and etag; before them, its Delta tables: table and version.
        num_rows: Rows of the input; None if that is not known.
        input_schema: Columns and types of the input, as base64 of Arrow's form.
        version: Of this package.
    """

    job: dict[str, Any]
    inputs: list[dict[str, Any]]
    num_rows: int | None
    input_schema: str
    version: str

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows of the output follow from."""
        engine = {name: value for name, value in self.job.get("engine", {}).items() if name not in FREE}
        return {**{name: self.job.get(name) for name in FINGERPRINT}, "engine": engine, "input": self.inputs}

    @property
    def table_versions(self) -> dict[str, int]:
        """URLs of the Delta tables of its input, and the versions that it reads."""
        return {one["table"]: one["version"] for one in self.inputs if "table" in one}

    @property
    def writes_table(self) -> bool:
        """Whether the output is a Delta table."""
        return self.job.get("output_format") == DELTA

    def changes(self, other: JobState) -> list[str]:
        """Says in what the fingerprint of another job differs, one line a field."""
        theirs = json.loads(json.dumps(other.fingerprint))
        return [
            f"{name} was {_short(mine)} and is now {_short(theirs[name])}"
            for name, mine in json.loads(json.dumps(self.fingerprint)).items()
            if mine != theirs[name]
        ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True, slots=True)
class JobFolder:
    """An output folder.

    Attributes:
        root: The folder.
    """

    root: Storage

    @property
    def work(self) -> Storage:
        """Where work in progress is."""
        return self.root / OURS / "work"

    @property
    def state_file(self) -> Storage:
        """Where the job is described."""
        return self.root / OURS / STATE

    @property
    def report_file(self) -> Storage:
        """Where the report goes."""
        return self.root / OURS / "report.json"

    @property
    def is_finished(self) -> bool:
        """Whether the output is whole."""
        return (self.root / MANIFEST).exists()

    @property
    def is_publishing(self) -> bool:
        """Whether everything has run, and only the files are to be put in their places."""
        return (self.work / PLAN).exists()

    @property
    def is_retrying(self) -> bool:
        """Whether the dead letters are being run again."""
        return (self.work / RETRY).exists()

    def read_state(self) -> JobState | None:
        """Returns the job that was begun here; None if there was none.

        Raises:
            ConfigError: What describes it is damaged, or of another version.
        """
        try:
            return JobState(**json.loads(self.state_file.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.state_file.url!r} does not describe a job of this version of Millrace ({error}); remove the "
                "folder, or pass another"
            ) from error

    def write_state(self, state: JobState) -> None:
        """Notes the job that begins."""
        self.state_file.write_bytes(json.dumps(asdict(state), indent=2, ensure_ascii=False).encode())

    def check(self, state: JobState, overwrite: bool) -> bool:
        """Decides what is to be done with what is there.

        Args:
            state: The job to run.
            overwrite: Whether the output of another job gives way.

        Returns:
            Whether the job has begun here and is to go on.

        Raises:
            ConfigError: The folder holds something else.
        """
        if (info := self.root.info()) is not None and not info.is_dir:
            raise ConfigError(f"output {self.root.url!r} is a file; pass a folder")
        here = f"output folder {self.root.url!r}"
        present = [one for one in self.root.list() if one.name[0] != "."]  # A death may leave a draft, ".name.tmp".
        began = self.read_state()
        foreign = [one.name for one in present if not _is_ours(one, began)]
        if foreign:
            raise ConfigError(f"{here} already holds {foreign[0]!r}; pass another folder")
        if overwrite:
            return False
        if self.is_finished:
            raise ConfigError(
                f"{here} already holds a finished job; pass --overwrite to replace it, or another folder "
                f"(its failed rows are run again by: millrace retry-failed {self.root.url})"
            )
        if began is None:
            if present:
                raise ConfigError(
                    f"{here} already holds {present[0].name!r}; pass --overwrite to replace it, or another folder"
                )
            return False
        if changes := began.changes(state):
            raise ConfigError(
                f"{here} holds an unfinished job that is another one: {'; '.join(changes)}. Undo the change to go on "
                "with it, pass --overwrite to replace it, or another folder"
            )
        return True

    def check_same(self, state: JobState) -> None:
        """Checks that a finished job is the one that is asked for.

        Raises:
            ConfigError: It is another one.
        """
        began = self.read_state()
        if began is not None and (changes := began.changes(state)):
            raise ConfigError(
                f"output folder {self.root.url!r} already holds a finished job that is another one: "
                f"{'; '.join(changes)}; pass another folder"
            )

    def clear(self, keeps_table: bool = False) -> None:
        """Removes a job, the manifest first: without it nobody takes the rest for whole.

        What describes the job stays until it is written over, so that after a death in between the rest is known as
        ours.

        Args:
            keeps_table: Whether a Delta table stays, as old versions of the one that the next job makes.
        """
        (self.root / MANIFEST).remove()
        began = self.read_state()
        keeps_table = keeps_table and (self.root / DELTA_LOG).exists()
        for one in self.root.list():
            is_kept = one.name == OURS or (keeps_table and _is_of_table(one))
            if _is_ours(one, began) and not is_kept:
                one.remove()
        for one in (self.root / OURS).list():
            if one.name != STATE:
                one.remove()


def _is_of_table(file: Storage) -> bool:
    return file.name == DELTA_LOG or file.name.endswith(".parquet")


def _is_ours(file: Storage, began: JobState | None) -> bool:
    if file.name in (OURS, FAILED_FOLDER):
        return True
    if file.name == DELTA_LOG:  # The table of somebody else is not ours to replace.
        return began is not None and began.writes_table
    return file.name == MANIFEST or (file.name.endswith(EXTENSIONS) and not file.is_dir())

"""`JobFolder`: the output folder of a job, with checks of whether a job may begin or resume in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ...engine.errors import ConfigError
from ...engine.storage.local import DRAFT
from ..files.storage import Storage
from ..ledger.epoch import EPOCHS, FAILED, RESULTS
from ..pooling.task_types import TASK_TYPES
from ..sinks.formats import FORMATS
from ..sinks.manifest import FAILED_FOLDER, MANIFEST
from ..sinks.publish import PLAN, RETRY
from ..sinks.publisher import Publisher

OURS = "_millrace"
STATE = "job.json"
WRITERS = "writers"

PART = re.compile(r"part-\d{5,}(-[0-9a-f]{32})?\.(\w+)")
"""Names of the files of an output. The hexadecimal digits tell the versions of a table apart."""

FREE = frozenset({
    "max_num_seqs", "max_num_batched_tokens", "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes",
    "gpu_memory_utilization", "enable_prefix_caching", "max_logprobs", "enforce_eager", "cudagraph_capture_sizes",
    "num_threads", "overlap_depth", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel",
    "device", "load_format", "max_loras", "max_cpu_loras", "max_lora_rank",
})  # fmt: skip
"""Settings of the engine that change the speed of a row and not its output, so that a resumed job may change them."""

FINGERPRINT = (
    "model", "prompt", "messages", "sampling", "seed", "columns", "output_column", "output_format", "key", "order",
    "limit", "lora_modules", "dynamic_lora_loading_path", "task_type", "pooling", "embedding_dtype", "score_columns",
)  # fmt: skip
"""Fields of a job that determine its output, besides the input files and the engine's settings without `FREE`."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as it was when it began.

    Attributes:
        job: Fields of its `JobConfig`.
        inputs: The tables of its input (table and version), and then the files (url, size and etag).
        num_rows: Rows of the input; None if their number is not known.
        input_schema: Columns and types of the input, serialized by Arrow and encoded as base64.
        version: Version of this package.
    """

    job: dict[str, Any]
    inputs: list[dict[str, Any]]
    num_rows: int | None
    input_schema: str
    version: str

    def check_types(self) -> None:
        """Checks the types of the values, which come from a file.

        Raises:
            ValueError: A value is of another type.
        """
        engine = self.job.get("engine", {}) if isinstance(self.job, dict) else None
        is_job = isinstance(engine, dict) and self.job.get("output_format") in FORMATS.names
        is_job = is_job and self.job.get("task_type", "generate") in TASK_TYPES
        # What `write_results` has begun has no file of its own as input.
        if not is_job or ("input" in self.job and "model" not in self.job):
            raise ValueError("its field 'job' holds no job")
        places = self.inputs if isinstance(self.inputs, list) else [None]
        if not all(isinstance(one, dict) and ("table" not in one or "version" in one) for one in places):
            raise ValueError("its field 'inputs' holds no files")
        if not isinstance(self.input_schema, str) or not isinstance(self.num_rows, int | None):
            raise ValueError("its fields 'input_schema' and 'num_rows' are of other types")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the rows of the output."""
        engine = {name: value for name, value in self.job.get("engine", {}).items() if name not in FREE}
        own = {name: self.job.get(name) for name in FINGERPRINT}
        # A job of an older version names no task, and always its column.
        task = own["task_type"] = own["task_type"] or "generate"
        own["output_column"] = own["output_column"] or TASK_TYPES[task].answers[0]
        return {**own, "engine": engine, "input": self.inputs}

    @property
    def table_versions(self) -> dict[str, int]:
        """URL of each table of the input -> the version that the job reads."""
        return {one["table"]: one["version"] for one in self.inputs if "table" in one}

    @property
    def publisher(self) -> Publisher:
        """The publisher of the output."""
        return FORMATS[self.job["output_format"]].publisher

    def changes(self, other: JobState) -> list[str]:
        """Returns one line for each field in which the fingerprint of another job differs."""
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
    """The output folder of a job.

    Attributes:
        root: The folder.
    """

    root: Storage

    @property
    def work(self) -> Storage:
        """The folder of the work in progress."""
        return self.root / OURS / "work"

    @property
    def state_file(self) -> Storage:
        """The file that describes the job."""
        return self.root / OURS / STATE

    @property
    def writers(self) -> Storage:
        """The folder of the claims of processes that write the output (`Claim`)."""
        return self.root / OURS / WRITERS

    @property
    def report_file(self) -> Storage:
        """The report of the job as JSON."""
        return self.root / OURS / "report.json"

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and published."""
        return (self.root / MANIFEST).exists()

    @property
    def is_publishing(self) -> bool:
        """Whether all rows have run and the publication of the files has begun."""
        return (self.work / PLAN).exists()

    @property
    def is_retrying(self) -> bool:
        """Whether the job is running its dead letters again."""
        return (self.work / RETRY).exists()

    def read_state(self) -> JobState | None:
        """Returns the description of the job that began in this folder; None if no job did.

        Raises:
            ConfigError: The description of the job is damaged, or another version has written it.
        """
        try:
            state = JobState(**self.state_file.read_json())
            state.check_types()
            return state
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.state_file.url!r} does not describe a job of this version of Millrace ({error!s:.200}); "
                "remove the folder, or pass another"
            ) from error

    def write_state(self, state: JobState) -> None:
        """Writes the description of a job into the folder."""
        # The prompts and settings of a job are its owner's.
        self.state_file.write_private(
            json.dumps(asdict(state), indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass")
        )

    def check(self, state: JobState, overwrite: bool) -> bool:
        """Checks that a job may begin in this folder or resume there.

        Args:
            state: The job to run.
            overwrite: Whether the job may replace the output of another job.

        Returns:
            Whether an earlier run began the job here, so that this run resumes it.

        Raises:
            ConfigError: The folder holds other files, or another job.
        """
        if (info := self.root.info()) is not None and not info.is_dir:
            raise ConfigError(f"output {self.root.url!r} is a file; pass a folder")
        here = f"output folder {self.root.url!r}"
        self.check_links()
        began = self.read_state()
        if foreign := self._foreign(began):
            raise ConfigError(f"{here} already holds {foreign[0]!r}; pass another folder")
        if overwrite:
            return False
        if self.is_finished:
            raise ConfigError(
                f"{here} already holds a finished job; pass --overwrite to replace it, or another folder "
                f"(its failed rows are run again by: millrace retry-failed {self.root.url})"
            )
        if began is None:
            present = [one.name for one in self.root.list() if one.name[0] != "."]
            if found := [name for name in present if name != OURS or self._has_work()]:
                raise ConfigError(
                    f"{here} already holds {found[0]!r}; pass --overwrite to replace it, or another folder"
                )
            return False
        if changes := began.changes(state):
            raise ConfigError(
                f"{here} holds an unfinished job that is another one: {'; '.join(changes)}. Undo the change to go on "
                "with it, pass --overwrite to replace it, or another folder"
            )
        return True

    def check_links(self) -> None:
        """Checks that no folder of the job is a link that leads out of the output folder.

        Raises:
            DamagedOutputError: One is.
        """
        in_work = [f"{OURS}/work/{folder}" for folder in (RESULTS, FAILED, EPOCHS)]
        for folder in (*in_work, f"{OURS}/{WRITERS}", FAILED_FOLDER):
            self.root.inside(f"{folder}/file")

    def refuse_input(self, urls: Iterable[str]) -> None:
        """Checks that no file of the input is in this folder, where a job replaces and removes files.

        Args:
            urls: Paths or URLs of the files.

        Raises:
            ConfigError: One is.
        """
        root = _real(self.root.url)
        for url in urls:
            if _real(url).startswith(f"{root.rstrip('/')}/"):
                raise ConfigError(
                    f"output folder {self.root.url!r} holds {url.rpartition('/')[2]!r}, which is a file of the input; "
                    "a job replaces the files of its output folder, so pass another folder"
                )

    def check_same(self, state: JobState) -> None:
        """Checks that the finished job in this folder is the given one.

        Raises:
            ConfigError: The folder holds another job.
        """
        began = self.read_state()
        if began is not None and (changes := began.changes(state)):
            raise ConfigError(
                f"output folder {self.root.url!r} already holds a finished job that is another one: "
                f"{'; '.join(changes)}; pass another folder"
            )

    def clear(self, publisher: Publisher) -> None:
        """Removes the job in this folder, its manifest first, so that readers ignore the remaining files.

        The description of the job stays until the next job writes its own, so that a run recognises the folder as ours
        even if the process died in between.

        Args:
            publisher: The publisher of the next job. A table keeps its older versions.
        """
        kept = {OURS, *publisher.kept_names(self.root), *self._foreign(self.read_state())}
        (self.root / MANIFEST).remove()
        for one in self.root.list():
            if one.name[0] != "." and one.name not in kept:
                one.remove()
        for one in (self.root / OURS).list():
            if one.name not in (STATE, WRITERS):
                one.remove()

    def sweep(self) -> None:
        """Removes the drafts that killed processes have left. Only the process that holds the claim may call this."""
        if self.root.is_local:
            for folder in (self.root, self.root / OURS, self.root / FAILED_FOLDER):
                for one in folder.list(".tmp"):
                    if DRAFT.fullmatch(one.name):
                        one.remove()

    def _foreign(self, began: JobState | None) -> list[str]:
        """Returns the names in the folder that no job has written. Parts are of a job only where a job has begun."""
        known = {OURS, FAILED_FOLDER, MANIFEST}
        log_names = () if began is None else began.publisher.log_names
        known.update(log_names)  # The log of a table is ours if our job has begun it.
        is_output = began is not None or self.is_finished
        names = [one.name for one in self.root.list() if not (is_output and _is_part(one))]
        # Other writers may add files to a table, under names of their own.
        found = [name for name in names if name not in known and not (log_names and name.endswith(".parquet"))]
        found += [f"{FAILED_FOLDER}/{one.name}" for one in (self.root / FAILED_FOLDER).list() if not _is_part(one)]
        return [name for name in found if name.rpartition("/")[2][0] != "."]  # Killed processes leave ".name.tmp".

    def _has_work(self) -> bool:
        """Returns whether the folder of the job holds anything but claims, and drafts that another run just writes."""
        found = (self.root / OURS).walk()
        return any(not one.url.startswith(f"{self.writers.url}/") and not DRAFT.fullmatch(one.name) for one in found)


def _is_part(file: Storage) -> bool:
    """Returns whether a file has a name that a job gives to files of its output."""
    found = PART.fullmatch(file.name)
    extensions = {format.extension for _, format in FORMATS.items()}
    return found is not None and found[2] in extensions and not file.is_dir()


def _real(url: str) -> str:
    """Returns the path that a path leads to, without links on the way; a URL as it is."""
    return url if "://" in url else os.path.realpath(url)

"""The manifest of an output: its files and counts. An output is whole when its manifest exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...engine.errors import DamagedOutputError
from ..files.storage import Storage
from ..ledger.counts import Counts, count_of

MANIFEST = "_manifest.json"
FAILED_FOLDER = "_failed"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of an output.

    Attributes:
        name: Path of the file in the output folder.
        num_rows: Number of rows in the file.
        num_bytes: Size of the file in bytes.
        checksum: BLAKE2b of the file, 16 bytes as text; empty in a manifest of an older version.
    """

    name: str
    num_rows: int
    num_bytes: int
    checksum: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OutputFile:
        """Returns the file of which `dataclasses.asdict` made the plain data; raises as `Manifest.from_dict`."""
        name, checksum = data["name"], data.get("checksum", "")
        if not isinstance(name, str) or not isinstance(checksum, str):
            raise TypeError(f"the name and the checksum of a file are text; got {name!r:.100} and {checksum!r:.100}")
        return cls(name, count_of(data["num_rows"]), count_of(data["num_bytes"]), checksum)


@dataclass(slots=True)
class Manifest:
    """The content of an output.

    Attributes:
        files: Files of results.
        failed_files: Files of dead letters.
        counts: `Counts` of the rows in `files`.
        failed_counts: `Counts` of the rows in `failed_files`.
        table_version: Version of the table that holds the results; None if the output is no table.
    """

    files: list[OutputFile] = field(default_factory=list)
    failed_files: list[OutputFile] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    failed_counts: Counts = field(default_factory=Counts)
    table_version: int | None = None

    @property
    def num_rows(self) -> int:
        """Number of results."""
        return sum(file.num_rows for file in self.files)

    @property
    def num_failed(self) -> int:
        """Number of dead letters."""
        return sum(file.num_rows for file in self.failed_files)

    @property
    def total(self) -> Counts:
        """Counts of results and dead letters together."""
        return Counts.sum([self.counts, self.failed_counts])

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest as plain data for JSON."""
        return {
            "num_rows": self.num_rows,
            "num_failed": self.num_failed,
            "files": [asdict(file) for file in self.files],
            "failed_files": [asdict(file) for file in self.failed_files],
            "counts": self.counts.as_dict(),
            "failed_counts": self.failed_counts.as_dict(),
            **({} if self.table_version is None else {"table_version": self.table_version}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        """Returns the manifest of which `as_dict` made the plain data.

        Raises:
            ValueError: A value is of another kind, as do AttributeError, KeyError and TypeError.
        """
        version = data.get("table_version")
        return cls(
            [OutputFile.from_dict(file) for file in data["files"]],
            [OutputFile.from_dict(file) for file in data["failed_files"]],
            Counts.from_dict(data["counts"]),
            Counts.from_dict(data["failed_counts"]),
            None if version is None else count_of(version),
        )

    @classmethod
    def read(cls, output: Storage) -> Manifest | None:
        """Returns the manifest of an output folder; None if there is none, as the output is not complete.

        Raises:
            DamagedOutputError: The manifest is damaged, or names a file outside the folder.
        """
        file = output / MANIFEST
        if not file.exists():
            return None
        try:
            manifest = cls.from_dict(file.read_json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedOutputError(f"{file.url!r} is no manifest of an output ({error}); pass --overwrite") from error
        manifest.check_names(output)
        return manifest

    def check_names(self, output: Storage) -> None:
        """Checks that the manifest names only files inside its folder.

        Raises:
            DamagedOutputError: A name leads out of the folder.
        """
        for one in (*self.files, *self.failed_files):
            output.inside(one.name)

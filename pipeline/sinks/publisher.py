"""`Publisher`: how the files of a finished job become visible to readers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from ..files.storage import Storage


class Publisher(ABC):
    """Makes the files in an output folder visible to readers, all at once.

    `publish` writes down a plan, moves the files into the output folder, calls `commit`, and writes the manifest. After
    an interruption it carries out the same plan again from the start, so `commit` must have an effect at most once.

    Attributes:
        files_folder: Folder in the output folder that gets the files of results, with a slash; empty for none.
    """

    files_folder: ClassVar[str] = ""

    @property
    @abstractmethod
    def log_names(self) -> Sequence[str]:
        """Names of the entries of an output folder that a commit writes besides the files, such as a table's log."""

    @abstractmethod
    def file_suffix(self, token: str) -> str:
        """Returns the text that the names of new files end with.

        Args:
            token: Text that no other publication has.
        """

    @abstractmethod
    def plan_commit(
        self, token: str, schema: pa.Schema | None, files: Sequence[dict[str, Any]], *, replaces: bool
    ) -> dict[str, Any] | None:
        """Describes the commit as plain data for the plan; None if the manifest is enough.

        Args:
            token: Text that no other publication has.
            schema: Columns and types of the results.
            files: Name, number of rows and size of each new file, as the manifest has them.
            replaces: Whether the new files are the whole output; otherwise they are added to it.
        """

    @abstractmethod
    def commit(self, output: Storage, planned: dict[str, Any] | None) -> int | None:
        """Carries out a commit unless it was made before.

        Args:
            output: The output folder, which holds the files.
            planned: The commit, as `plan_commit` described it.

        Returns:
            The version of the table that holds the files; None where there is no table.
        """

    @abstractmethod
    def kept_names(self, output: Storage) -> set[str]:
        """Returns the names of the entries of an output folder that must stay when a new job replaces the old one."""


class ManifestPublisher(Publisher):
    """A publisher without a commit: files are visible as soon as the manifest names them."""

    log_names = ()

    def file_suffix(self, token: str) -> str:
        """Returns the empty text: the numbers in the names of files are enough to tell them apart."""
        return ""

    def plan_commit(
        self, token: str, schema: pa.Schema | None, files: Sequence[dict[str, Any]], *, replaces: bool
    ) -> dict[str, Any] | None:
        """Returns None, because the manifest is the commit."""
        return None

    def commit(self, output: Storage, planned: dict[str, Any] | None) -> int | None:
        """Does nothing, because the manifest is the commit."""
        return None

    def kept_names(self, output: Storage) -> set[str]:
        """Returns an empty set, because a new job removes the files of the old one."""
        return set()

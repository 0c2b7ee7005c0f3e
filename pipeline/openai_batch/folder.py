"""`BatchFolder`: the folder of a batch in progress, with the settings by which a later run resumes it, and an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..._version import __version__
from ...engine.errors import ConfigError, DamagedOutputError
from ...engine.shown import without_secrets
from ..files.storage import Storage
from ..ledger.epoch import EPOCHS, FAILED, RESULTS
from .batch_config import BatchConfig
from .input_index import InputIndex

FINGERPRINT = (
    "model", "served_model_names", "max_tokens", "engine", "seed", "tool_call_parser", "reasoning_parser",
    "lora_modules", "dynamic_lora_loading_path",
)  # fmt: skip
"""Settings that change the output: a run resumes an unfinished batch only if these are equal."""

STATE, INDEX = "batch.json", "index.npz"


@dataclass(frozen=True)
class BatchFolder:
    """The folder that holds a batch in progress: its settings, the index of its input and its finished lines.

    Attributes:
        config: The settings of the batch.
    """

    config: BatchConfig

    @property
    def root(self) -> Storage:
        """The location of the folder, beside the out file."""
        return self.config.work_folder

    @property
    def writers(self) -> Storage:
        """The folder of the claims of processes that answer the batch, beside the folder of the work."""
        return Storage.at(f"{self.root.url}.writers", options=self.root.options)

    def check(self, overwrite: bool) -> bool:
        """Checks that the batch can write its files, and returns whether it resumes an earlier run. Writes nothing.

        Args:
            overwrite: Whether the run may replace existing files and an unfinished batch.

        Returns:
            True if an earlier run began this batch and this run continues it; False if the batch begins anew.

        Raises:
            ConfigError: The input does not exist, an output file is a folder or exists already, or the folder holds an
                unfinished batch with other settings.
            DamagedOutputError: A folder of the unfinished batch is a link that leads elsewhere.
        """
        state = self._state()
        self._check_links()
        for one in (self.config.output_file, self.config.error_file):
            if one.is_dir():
                raise ConfigError(f"{one.url!r} is a folder; pass a file")
        if overwrite:
            return False
        if (file := self.root / STATE).exists():
            changes = list(_changes(_read_state(file), state))
            if changes:
                raise ConfigError(
                    f"an unfinished batch for {self.config.output!r} is another one: {'; '.join(changes)}. Undo the "
                    "change to go on with it, pass --overwrite to begin anew, or name another out file"
                )
            return True
        for one in (self.config.output_file, self.config.error_file):
            if one.exists():
                raise ConfigError(f"{one.url!r} is there already; pass --overwrite to replace it, or another name")
        return False

    def begin(self) -> None:
        """Removes both output files and the folder of an unfinished batch, and writes the settings of this batch."""
        for one in (self.config.output_file, self.config.error_file, self.root):
            one.remove()
        (self.root / STATE).write_private(json.dumps(self._state(), indent=2).encode())

    def index(self) -> InputIndex:
        """Returns the index of the input. The first call scans the input and keeps the index in the folder."""
        file = self.root / INDEX
        if file.exists() and (kept := InputIndex.from_bytes(file.read_bytes())) is not None:
            return kept
        index = InputIndex.scan(self.config.input_file)
        file.write_bytes(index.to_bytes())
        return index

    def _check_links(self) -> None:
        beside = Storage.at(self.root.url.rpartition("/")[0], options=self.root.options)
        for folder in (RESULTS, FAILED, EPOCHS):
            beside.inside(f"{self.root.name}/work/{folder}/file")
        for one in (self.root, self.writers):
            if one.is_local and os.path.islink(one.url):
                raise DamagedOutputError(f"{one.url!r} is a link, and no batch has made it; name another out file")

    def _state(self) -> dict[str, Any]:
        """Returns the settings that change the output, the identity of the input, and the version of the package."""
        info = self.config.input_file.info()
        if info is None or info.is_dir:
            wrong = "does not exist" if info is None else "is a folder"
            raise ConfigError(f"input {self.config.input!r} {wrong}; pass a file with a request on every line")
        given = {name: getattr(self.config, name) for name in FINGERPRINT}
        state: dict[str, Any] = {**given, "input": [info.url, info.size, info.etag], "version": __version__}
        return {name: without_secrets(value) for name, value in state.items()}


def _read_state(file: Storage) -> dict[str, Any]:
    """Returns the result of `_state` that a former run has kept."""
    try:
        state = file.read_json()
    except ValueError as error:
        raise ConfigError(f"{file.url!r} is damaged ({error}); pass --overwrite to begin anew") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{file.url!r} describes no batch; pass --overwrite to begin anew")
    return state


def _changes(began: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields a description of each setting that differs between two results of `_state`, except the version."""
    for name, value in json.loads(json.dumps(now)).items():
        if name != "version" and began.get(name) != value:
            yield f"{name} was {began.get(name)!r:.120} and is now {value!r:.120}"

"""Work in progress of a batch: what it is, so that a later run knows whether it is the same one, and its index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..._version import __version__
from ...engine.errors import ConfigError
from ..files.storage import Storage
from .batch_config import BatchConfig
from .input_index import InputIndex

FINGERPRINT = (
    "model", "served_model_names", "max_tokens", "engine", "seed", "tool_call_parser", "reasoning_parser",
)  # fmt: skip
"""Settings that the lines of the output follow from."""

STATE, INDEX = "batch.json", "index.npz"


@dataclass(frozen=True)
class BatchFolder:
    """The folder of the work in progress.

    Attributes:
        config: The batch.
    """

    config: BatchConfig

    @property
    def root(self) -> Storage:
        """The folder."""
        return self.config.work_folder

    def check(self, overwrite: bool) -> bool:
        """Decides what is to be done with what is there. Nothing is written.

        Args:
            overwrite: Whether it gives way.

        Returns:
            Whether this batch has begun and is to go on.

        Raises:
            ConfigError: There is no input, the files of another batch are in the way, or another one has begun here.
        """
        state = self._state()
        for one in (self.config.output_file, self.config.error_file):
            if one.is_dir():
                raise ConfigError(f"{one.url!r} is a folder; pass a file")
        if overwrite:
            return False
        if (file := self.root / STATE).exists():
            changes = list(_changes(json.loads(file.read_bytes()), state))
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
        """Clears what is in the way, and notes the batch."""
        for one in (self.config.output_file, self.config.error_file, self.root):
            one.remove()
        (self.root / STATE).write_bytes(json.dumps(self._state(), indent=2).encode())

    def index(self) -> InputIndex:
        """Returns the index of the input; it is made once."""
        file = self.root / INDEX
        if file.exists():
            return InputIndex.from_bytes(file.read_bytes())
        index = InputIndex.scan(self.config.input_file)
        file.write_bytes(index.to_bytes())
        return index

    def _state(self) -> dict[str, Any]:
        info = self.config.input_file.info()
        if info is None or info.is_dir:
            wrong = "does not exist" if info is None else "is a folder"
            raise ConfigError(f"input {self.config.input!r} {wrong}; pass a file with a request on every line")
        given = {name: getattr(self.config, name) for name in FINGERPRINT}
        return {**given, "input": [info.url, info.size, info.etag], "version": __version__}


def _changes(began: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields what is different, in words; another version of the package is no other batch."""
    for name, value in json.loads(json.dumps(now)).items():
        if name != "version" and began.get(name) != value:
            yield f"{name} was {began.get(name)!r:.120} and is now {value!r:.120}"

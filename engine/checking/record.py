"""`CheckRecord`: the digests of a model's tensors at its last check, kept in the user's cache folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

from ..env import cache_folder
from ..errors import ConfigError

__all__ = ["CheckRecord"]


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """The digests of all tensors of a checkpoint at one time.

    Attributes:
        date: The day of the check, as `2026-11-30`.
        digests: Digest of each tensor by its name in the checkpoint.
    """

    date: str
    digests: Mapping[str, str]

    @classmethod
    def of_today(cls, digests: Mapping[str, str]) -> CheckRecord:
        """Returns the record of a check that ends now."""
        return cls(datetime.now(UTC).date().isoformat(), digests)

    @classmethod
    def load(cls, url: str) -> CheckRecord | None:
        """Returns the record of a model's last check; None if there is none, or if the file cannot be read."""
        try:
            found = json.loads(_path(url).read_text(encoding="utf-8"))
            return cls(str(found["date"]), {str(name): str(digest) for name, digest in found["digests"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, url: str) -> None:
        """Keeps the record for the next check.

        Args:
            url: Where the model is.

        Raises:
            ConfigError: The cache folder cannot be written.
        """
        path = _path(url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"model": url, "date": self.date, "digests": self.digests}), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the record of the check cannot be written to {path}: {error}; set XDG_CACHE_HOME to another folder"
            ) from error


def _path(url: str) -> Path:
    return cache_folder() / "checks" / f"{blake2b(url.encode(), digest_size=8).hexdigest()}.json"

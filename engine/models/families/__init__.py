"""One file per model family. A module here that defines `FAMILIES` is found by the registry; nothing else to do."""

from __future__ import annotations

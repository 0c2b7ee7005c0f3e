"""Finds the folder of a model: a local folder, or one that ships inside the package."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent

BUNDLED = {"invoices": PACKAGE / "examples" / "invoices" / "model"}
"""Name -> folder of the models that ship with Millrace."""

PREFIX = "bundled:"


def resolve_model(model: str, what: str = "model") -> Path:
    """Finds the folder of a model.

    Args:
        model: A local folder, or ``"bundled:NAME"``.
        what: How an error names it.

    Returns:
        The folder.

    Raises:
        ConfigError: There is no such folder. This release downloads nothing.
    """
    if model.startswith(PREFIX):
        name = model.removeprefix(PREFIX)
        if name not in BUNDLED:
            raise ConfigError(f"no bundled model is called {name!r}; there is: {', '.join(sorted(BUNDLED))}")
        return BUNDLED[name]
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    raise ConfigError(
        f"{what} {model!r} is not a local folder; this release downloads nothing: pass the path of a folder that holds "
        f"config.json and the weights, or {PREFIX}{next(iter(BUNDLED))!s}"
    )

"""`millrace init [PATH]`: writes a commented job file that runs unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...engine.errors import ConfigError


def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="Job file, or a folder for it.")] = Path("job.yaml"),
) -> None:
    """Write a commented job file, with a few rows for it to run on, and its schema for editors."""
    from ..job.example import ROWS_FILE, SCHEMA_FILE, job_template, sample_rows
    from ..job.schema import schema_text

    file = path / "job.yaml" if path.is_dir() or path.suffix not in (".yaml", ".yml") else path
    texts = {file: job_template(file.name), file.with_name(ROWS_FILE): sample_rows()}
    for one in texts:
        if one.exists():
            raise ConfigError(f"{str(one)!r} is there already; give another path, or remove it")
    texts[file.with_name(SCHEMA_FILE)] = schema_text()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for one, text in texts.items():
            one.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{str(file.parent)!r} cannot be written: {error.strerror or error}") from error
    Console(soft_wrap=True, highlight=False).print(
        f"wrote {', '.join(str(one) for one in texts)}\nnext:  millrace plan {file}\n       millrace run {file}"
    )

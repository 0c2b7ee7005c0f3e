"""Writes docs/modules.md: every module of the package, room by room, with the first line of its docstring.

Run it with `make docs`; a test fails when the file is out of date.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "modules.md"
FOLDERS = ("pipeline", "actors", "engine", "kernels")
HEAD = """# Every module

The rooms of the four folders and the modules in them, each with the first line of its docstring. `make docs` writes
this file. The [tour](architecture.md) says in which order to read.
"""


def first_line(path: Path) -> str:
    """Returns the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def rooms() -> Iterator[Path]:
    """Yields every package of the four folders, parents first; an op of `kernels/` is one entry of its parent."""
    for folder in FOLDERS:
        for face in sorted((ROOT / folder).rglob("__init__.py")):
            if folder != "kernels" or face.parent == ROOT / folder:
                yield face.parent


def entries(room: Path) -> Iterator[tuple[str, str]]:
    """Yields (name, first line) of the modules in a room, and of its ops."""
    for path in sorted(room.glob("*.py")):
        if path.name != "__init__.py":
            yield path.name, first_line(path)
    for path in sorted(room.glob("*/op.py")):
        yield f"{path.parent.name}/", first_line(path)


def index() -> str:
    """Returns the whole file."""
    parts = [HEAD]
    for room in rooms():
        rows = [f"| `{name}` | {line} |" for name, line in entries(room)]
        name = room.relative_to(ROOT).as_posix()
        parts.append(f"\n## {name}/\n\n{first_line(room / '__init__.py')}\n")
        if rows:
            parts.append("\n".join(["", "| module | what it is |", "|---|---|", *rows, ""]))
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(index(), encoding="utf-8")

"""The page on security tells the limits as they are in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+)` in `([\w/.]+)` \|$", PAGE, re.MULTILINE)
UNITS = {"s": 1, "MiB": 1 << 20, "GiB": 1 << 30}


def said(text: str) -> float:
    """Returns the number that a cell of the table tells, such as ``100 MiB`` or ``2^40``."""
    number, _, unit = text.replace(",", "").partition(" ")
    base, _, power = number.partition("^")
    return int(base) ** int(power or 1) * UNITS.get(unit, 1)


def constant(module: str, name: str) -> Any:
    """Returns a constant of a module, without importing the module."""
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and re.search(rf"\b{name}\b", ast.unparse(node.targets[0])):
            scope: dict[str, Any] = {}
            exec(compile(ast.Module([node], []), module, "exec"), scope)
            return scope[name]
    raise AssertionError(f"{module} has no {name}")


@pytest.mark.parametrize(("limit", "default", "name", "module"), ROWS, ids=[one[0] for one in ROWS])
def test_a_limit_is_that_of_the_code(limit: str, default: str, name: str, module: str) -> None:
    value = constant(module, name)
    assert said(default) in (value.values() if isinstance(value, dict) else [value])


def test_the_page_has_the_table() -> None:
    assert len(ROWS) > 20

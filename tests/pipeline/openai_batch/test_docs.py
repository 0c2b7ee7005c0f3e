"""The page on batch files has the table of fields as it is in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from millrace.pipeline.openai_batch.lines.fields import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    ENDPOINTS,
    FIELDS,
    RERANK,
    RESPONSES,
    SCORE,
    TEXT_ENDPOINTS,
    BodyField,
)

PAGE = Path(__file__).resolve().parents[3] / "docs" / "openai_batch.md"

USES = {"request": "taken", "sampling": "taken", "ignored": "no effect", "refused": "refused"}

SPELLINGS = [
    ((CHAT,), "chat"),
    ((COMPLETIONS,), "completion"),
    ((RESPONSES,), "response"),
    ((EMBEDDINGS,), "embedding"),
]
SPELLINGS += [(RERANK, "rerank"), (SCORE, "score"), (CLASSIFY, "classify")]
NAMES = {url: name for urls, name in SPELLINGS for url in urls}
SEVERAL = {ENDPOINTS: "all", TEXT_ENDPOINTS: "texts"}


def row(field: BodyField) -> str:
    where = SEVERAL.get(field.endpoints) or ", ".join(dict.fromkeys(NAMES[one] for one in field.endpoints))
    off = ", ".join(f"`{str(one).lower() if isinstance(one, bool) else one!r}`" for one in field.off)
    use = USES[field.use] + (f", but for {off}" if off else "")
    return f"| `{field.name}` | {where} | {use} | {field.note} |"


def table() -> str:
    return "\n".join(["| field | endpoint | | |", "|---|---|---|---|", *map(row, FIELDS)])


def test_the_page_has_the_table() -> None:
    found = re.search(
        r"^<!-- fields.*?-->\n(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found is not None
    if found[1].strip() != table():
        pytest.fail(f"docs/openai_batch.md is to have this table:\n{table()}")
